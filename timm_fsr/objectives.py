"""Training objectives: how to attack a batch, and what to minimise on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from timm_fsr.attacks import Attack, LossFunction, attack_mode, eval_mode, random_in_ball
from timm_fsr.sites import record


class LossTerms(dict[str, Tensor]):
    """Weighted scalar loss terms by name; their sum is minimised.

    Attributes:
        logits: (N, classes) for "clean" and "adversarial" images, as far as they were passed; detached, for metrics.
    """

    logits: dict[str, Tensor]

    def total(self) -> Tensor:
        """The sum of the terms."""
        return torch.stack(list(self.values())).sum()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A training method: crafts adversarial images, and names what to minimise.

    A subclass defines `terms`, and `attack_loss` where it is not the cross-entropy. The auxiliary terms of feature
    layers ("fsr.separation", ...) are added on adversarial images, as the FSR paper does (equation 8, where the
    classification loss is that of any adversarial training).

    Attributes:
        label_smoothing: in [0, 1), of the main cross-entropy of the training loss only.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1): it is a share of probability")

    def __call__(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms of `images` (N, C, H, W) in [0, 1] with `labels` (N,): `craft`, then `terms`.

        Args:
            model: in pixel space and training mode; also wrapped by DistributedDataParallel.
            attack: maximises `attack_loss`, with the model in eval mode.
            images: clean images.
            labels: their classes.
            generator: of the attack's random start.
        """
        adversarial = self.craft(model, attack, images, labels, generator=generator)
        return self.terms(model, attack, images, adversarial, labels)

    @property
    def attacks(self) -> bool:
        """Whether the method trains on attacked images at all."""
        return True

    def craft(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images that maximise `attack_loss` with the model in eval mode; the images if nothing `attacks`.

        Under DistributedDataParallel the attack runs through the wrapped module: passing the wrapper would
        synchronise buffers in each step and could pair up wrong collectives.
        """
        if not self.attacks:
            return images
        self.check_attack(attack)
        inner = unwrapped(model)
        with attack_mode(inner):
            return attack(self.attack_loss(inner, images, labels), images, generator=generator)

    def attack_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
        """What the attack maximises, one value per image; called with the model in attack mode."""
        return lambda candidate: F.cross_entropy(model(candidate).float(), labels, reduction="none")

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """What to minimise, given the adversarial images of `craft`; a single forward pass of `model`."""
        raise NotImplementedError

    def check_attack(self, attack: Attack) -> None:
        """Raise ValueError for an attack that cannot work with this method."""

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Natural(Objective):
    """Training on clean images: cross-entropy, and the feature layers' auxiliary terms on them."""

    @property
    def attacks(self) -> bool:
        """Never."""
        return False

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "natural" and the auxiliary ones; `attack` and `adversarial` are not used."""
        logits, aux = _forward(model, images, labels)
        terms = LossTerms(natural=self._cross_entropy(logits, labels), **aux)
        terms.logits = {"clean": logits.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class AT(Objective):
    """Adversarial training (Madry et al., 2018, arXiv 1706.06083): cross-entropy on adversarial images.

    The auxiliary terms are those of the same pass.

    Attributes:
        label_smoothing: see `Objective`.
        grad_align: weight of GradAlign (Andriushchenko and Flammarion, 2020, arXiv 2007.02617, equation 6), which
            keeps one-step training from catastrophic overfitting: 1 - cosine of the input gradients at the image and
            at a uniformly random point of the ball (0.2 for eps 8/255 in its paper); 0 leaves it out. The gradients
            are of the model in eval mode, as the attack's are; the original takes those in training mode.
    """

    grad_align: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("grad_align", self.grad_align)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "adversarial", "grad_align" if asked for, and the auxiliary ones."""
        logits, aux = _forward(model, adversarial, labels)
        terms = LossTerms(adversarial=self._cross_entropy(logits, labels), **aux)
        if self.grad_align:
            terms["grad_align"] = self.grad_align * _gradient_misalignment(model, attack, images, labels)
        terms.logits = {"adversarial": logits.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """TRADES (Zhang et al., 2019, arXiv 1901.08573, equation 5): natural cross-entropy + beta * KL(clean || attacked).

    The attack maximises the divergence, whose gradient is zero at the image itself, so it needs a random start. Clean
    and adversarial images share one forward pass, and so their BatchNorm statistics (the original makes two passes,
    which DistributedDataParallel cannot do with BatchNorm). Auxiliary terms are those of the adversarial half.

    Attributes:
        beta: weight of the divergence (6 in the paper). 0 is natural training: nothing is attacked.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("beta", self.beta)

    @property
    def attacks(self) -> bool:
        """Unless beta is 0."""
        return bool(self.beta)

    def check_attack(self, attack: Attack) -> None:
        """Raise ValueError for an attack without a random start."""
        if self.attacks and not getattr(attack, "random_start", True):
            raise ValueError(
                "TRADES maximises a divergence whose gradient is zero at the image itself, so an attack that starts "
                "there does nothing; use one with random_start=True, such as PGD"
            )

    def attack_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
        """KL divergence of the attacked image's class probabilities from the clean image's."""
        with torch.no_grad():
            clean = model(images).float().log_softmax(dim=1)
        return lambda candidate: _divergence(clean, model(candidate).float().log_softmax(dim=1))

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "natural" and "consistency", and the auxiliary ones."""
        if not self.beta:
            return Natural(label_smoothing=self.label_smoothing).terms(model, attack, images, images, labels)
        clean, attacked, aux = _joint_forward(model, images, adversarial, labels)
        consistency = _divergence(clean.log_softmax(dim=1), attacked.log_softmax(dim=1)).mean()
        terms = LossTerms(natural=self._cross_entropy(clean, labels), consistency=self.beta * consistency, **aux)
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """MART (Wang et al., 2020, ICLR, equation 11): boosted cross-entropy + beta * KL weighted by 1 - p(label | clean).

    The boosted cross-entropy adds -log(1 - p) of the strongest wrong class of the attacked image. The attack maximises
    the cross-entropy. One forward pass and auxiliary terms as in `TRADES`.

    Attributes:
        beta: weight of the divergence (5 in the paper).
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("beta", self.beta)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "adversarial", "margin" and "consistency", and the auxiliary ones."""
        clean, attacked, aux = _joint_forward(model, images, adversarial, labels)
        own = F.one_hot(labels, clean.shape[1]).bool()
        probabilities = attacked.softmax(dim=1)
        rival = probabilities.masked_fill(own, 0).amax(dim=1)
        weights = 1.0000001 - clean.softmax(dim=1)[own]  # these small numbers are the original code's
        divergence = _divergence(clean.log_softmax(dim=1), (probabilities + 1e-12).log())
        terms = LossTerms(
            adversarial=self._cross_entropy(attacked, labels),
            margin=-(1.0001 - rival + 1e-12).log().mean(),
            consistency=self.beta * (weights * divergence).mean(),
            **aux,
        )
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms


OBJECTIVES: dict[str, type[Objective]] = {"natural": Natural, "at": AT, "trades": TRADES, "mart": MART}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name}={weight} must be 0 or more: it weighs a loss term")


def _forward(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, classes) and auxiliary terms."""
    with record(model, labels) as tape:
        logits = model(images).float()
    return logits, tape.losses(logits, labels)


def _joint_forward(
    model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of clean and adversarial images, both (N, classes), and the adversarial ones' auxiliary terms."""
    with record(model, labels.repeat(2)) as tape:
        clean, attacked = model(torch.cat([images, adversarial])).float().chunk(2)
    return clean, attacked, tape.losses(attacked, labels, rows=slice(len(images), None))


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(exp(clean) || exp(attacked)) of log-probabilities (N, classes), one value per image (N,).

    From the logarithms of both: a clean probability that rounds to 0 would have a NaN for its gradient.
    """
    return F.kl_div(attacked, clean, reduction="none", log_target=True).sum(dim=1)


def _gradient_misalignment(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> Tensor:
    """1 - mean cosine of the input gradients at the images and at random points of the ball.

    After the main pass, whose BatchNorm update would otherwise change what this one keeps for its backward pass.
    Attention runs unfused: torch's fused kernels cannot be differentiated twice.
    """
    inner = unwrapped(model)
    noisy = images + random_in_ball(images, getattr(attack, "norm", "linf"), attack.eps)
    with eval_mode(inner), sdpa_kernel(SDPBackend.MATH):
        at_image = _input_gradient(inner, images, labels, differentiable=False)
        at_noise = _input_gradient(inner, noisy, labels, differentiable=True)
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
