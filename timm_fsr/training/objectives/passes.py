"""Forward passes that training objectives are made of, with what the feature layers add to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_fsr.attacks.base import Attack, LossFunction, eval_mode, random_in_ball
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.hooks.tape import Tape, record


def attack_loss(
    model: nn.Module, labels: Tensor, main_loss: Callable[[Tensor], Tensor], clean: Tape | None = None
) -> LossFunction:
    """What a training attack maximises: the main loss, and the terms of the layers that have an `attack_weight`.

    No label reaches the layers themselves. Without such layers nothing is recorded.

    Args:
        model: in attack mode.
        labels: (N,) true classes, or (N, classes) shares of them.
        main_loss: of the logits (N, classes), one value per image.
        clean: recorded on the clean images, where `main_loss` is a divergence from these.
    """
    if not joins_attacks(model):
        return lambda candidate: main_loss(model(candidate).float())

    def joint(candidate: Tensor) -> Tensor:
        with record(model) as tape:
            logits = model(candidate).float()
        return main_loss(logits) + _layer_terms(tape, logits, labels, clean)

    return joint


def joins_attacks(model: nn.Module) -> bool:
    """Whether a feature layer of `model` has a term of its own in training attacks."""
    return any(layer.attack_weight for layer in feature_layers(model))


def _layer_terms(tape: Tape, logits: Tensor, labels: Tensor, clean: Tape | None) -> Tensor:
    """The layers' terms (N,): the mean over the sites of each kind of layer, and their sum."""
    said = [None] * len(tape.recorded()) if clean is None else [aux for _, aux in clean.recorded()]
    terms: dict[str, list[Tensor]] = {}
    for (site, aux), before in zip(tape.recorded(), said, strict=True):
        if site.layer.attack_weight:
            term = site.layer.attack_losses(aux, logits, labels, before)
            if term is not None:
                terms.setdefault(site.layer.name, []).append(term)
    total = torch.zeros_like(logits[:, 0])
    for values in terms.values():
        total = total + torch.stack(values).mean(dim=0)
    return total


def forward(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, classes) and auxiliary terms."""
    with record(model, labels) as tape:
        logits = model(images).float()
    return logits, tape.losses(logits, labels)


def joint_forward(
    model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of clean and adversarial images, both (N, classes), and the adversarial ones' auxiliary terms."""
    with record(model, torch.cat([labels, labels])) as tape:
        clean, attacked = model(torch.cat([images, adversarial])).float().chunk(2)
    return clean, attacked, tape.losses(attacked, labels, rows=slice(len(images), None))


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(exp(clean) || exp(attacked)) of log-probabilities (N, classes), one value per image (N,).

    From the logarithms of both: a clean probability that rounds to 0 would have a NaN for its gradient.
    """
    return F.kl_div(attacked, clean, reduction="none", log_target=True).sum(dim=1)


def gradient_misalignment(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> Tensor:
    """1 - mean cosine of the input gradients at the images and at random points of the ball.

    After the main pass, whose BatchNorm update would otherwise change what this one keeps for its backward pass.
    Attention runs unfused: torch's fused kernels cannot be differentiated twice.
    """
    noisy = images + random_in_ball(images, getattr(attack, "norm", "linf"), attack.eps)
    with eval_mode(model), sdpa_kernel(SDPBackend.MATH):
        at_image = _input_gradient(model, images, labels, differentiable=False)
        at_noise = _input_gradient(model, noisy, labels, differentiable=True)
    one, other = at_image.flatten(1), at_noise.flatten(1)
    # A gradient of zero has no direction: such images are left out, as in the original code.
    counted = (one.detach().abs().amax(dim=1) > 0) & (other.detach().abs().amax(dim=1) > 0)
    misaligned = (1 - F.cosine_similarity(one, other, dim=1)).where(counted, 0.0)
    return misaligned.sum() / counted.sum().clamp_min(1)


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, differentiable: bool) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the images; differentiable in the parameters if asked."""
    images = images.detach().requires_grad_(True)
    loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=differentiable)
    return gradient
