"""Model checks: whether a model can be judged by gradient attacks at all, looked at before any attack runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.attacks.base import anchored, input_gradient
from timm_fsr.hooks.site import layer_groups
from timm_fsr.hooks.tape import Tape, record
from timm_fsr.utils.errors import check_images

_OTHER = 1e-3  # of the largest logit: far more than rounding, far less than what other statistics do


@dataclass(frozen=True)
class ModelCheck:
    """What a look at a model and a batch of images found.

    Attributes:
        num_classes: of the model.
        random: two passes over the same images in eval mode gave other logits.
        dynamic: the forward pass computes gradients itself, so that its own gradient may mislead.
        zero_gradients: images whose loss has a gradient of exactly zero.
        auxiliary: its feature layers have auxiliary losses.
        looked_at: the number of these images.
        bounded: all logits lie in [0, 1].
    """

    num_classes: int
    random: bool
    dynamic: bool
    zero_gradients: int
    auxiliary: bool = False
    looked_at: int = 0
    bounded: bool = False

    def notes(self) -> list[str]:
        """What a reader of the results has to know, as sentences."""
        notes = []
        if self.random:
            notes.append(
                "the model is random in eval mode: attack it with 'rand' and 'adaptive', which average over its noise"
            )
        if self.dynamic:
            notes.append("the model computes gradients in its forward pass: gradient attacks may underestimate it")
        if self.zero_gradients:
            notes.append(
                f"{self.zero_gradients} of the first {self.looked_at} images have a gradient of exactly zero: gradient "
                "attacks cannot move them"
            )
        if self.bounded:
            notes.append(
                "all logits lie in [0, 1], as probabilities do: if the model ends in a sigmoid, that hides gradients "
                "from attacks; remove it and evaluate again"
            )
        return notes


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be evaluated as it is.

    Raises:
        ValueError: parameters of another precision than float32, or a module that stays in training mode in eval().
    """
    odd = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if odd:
        raise ValueError(
            f"the model's parameters are {', '.join(sorted(map(str, odd)))}, but half precision hides weak spots and "
            "results must be float32; call model.float() first"
        )
    training = [path for path, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"{training[0] or 'the model'!r} stays in training mode after model.eval(), so its outputs may be random "
            "or depend on the batch; make its train() method pass the mode on"
        )


@torch.no_grad()
def examine(model: nn.Module, images: Tensor, labels: Tensor) -> ModelCheck:
    """Look at a pixel-space model in eval mode.

    Args:
        model: from images to logits.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64 true classes.

    Raises:
        ValueError: the model does not return one row of finite logits per image but, for example, a tuple or
            probabilities, has fewer than two classes, does not know the labels, or has no finite gradient; or what
            it returns for an image depends on the images beside it.
        UnsoundError: a feature layer that does not fire.
    """
    with record(model) as tape, _counting_gradients() as count:
        logits = model(images)
    check_logits(logits, len(images))
    check_images(images, labels, logits.shape[1])
    if layer_groups(model):
        tape.check_fired()
    again = model(images)
    random = not torch.allclose(logits, again, rtol=1e-4, atol=1e-5)
    if not random:
        _check_company(model, images, logits)
    gradients = input_gradient(anchored(lambda x: F.cross_entropy(model(x), labels, reduction="none")), images)
    check_gradients(gradients)
    return ModelCheck(
        num_classes=logits.shape[1],
        random=random,
        dynamic=count[0] > 0,
        zero_gradients=int((gradients.flatten(1) == 0).all(dim=1).sum()),
        auxiliary=_has_auxiliary(tape, logits, labels),
        looked_at=len(images),
        bounded=bool(((logits >= 0) & (logits <= 1)).all()),
    )


def _check_company(model: nn.Module, images: Tensor, logits: Tensor) -> None:
    """Raise ValueError where most images have other logits in other company, so that no outcome is an image's own.

    The first half of the images is put in the place of the second: the shapes stay, so that rounding does too. Most,
    not any: a step in a model may be on the edge of rounding.
    """
    half = len(images) // 2
    if half == 0:
        return
    alone = model(images[torch.arange(len(images), device=images.device) % half])[:half]
    change = (alone - logits[:half]).abs().amax(dim=1)
    if float(change.median()) > _OTHER * float(logits.abs().max()):
        raise ValueError(
            "the model's logits for an image depend on the other images of the batch, so attacking one would change "
            "the others; let BatchNorm use running statistics (track_running_stats=True) in eval mode, and normalise "
            "within images"
        )


def _has_auxiliary(tape: Tape, logits: Tensor, labels: Tensor) -> bool:
    try:
        return bool(tape.losses(logits, labels))
    except (ValueError, RuntimeError):  # heads of another width, or none: they cannot be attacked
        return False


def check_logits(logits: Any, count: int) -> None:
    """Refuse what are no logits (count, classes): tuples, other shapes, NaN, probabilities.

    Raises:
        ValueError: see there.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ValueError(
            f"the model returned {what} for {count} images; it must return logits (N, classes): wrap a model that "
            "returns more in one that gives out its logits alone"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"the model has {logits.shape[1]} class; there is nothing to confuse with fewer than 2")
    check_finite(logits, "clean")
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all()):
        raise ValueError(
            "the model returned probabilities: each row is 0 or more and sums to 1. A softmax at the end hides "
            "gradients from attacks; remove it, so that the model returns logits"
        )


def check_finite(logits: Tensor, kind: str) -> None:
    """Raise ValueError for NaN or infinite logits: argmax would make a class of them, and perhaps the right one."""
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"the model returned NaN or infinite logits for {kind} images; check its weights and its gradients"
        )


def check_gradients(gradients: Tensor) -> None:
    """Raise ValueError for NaN or infinite gradients (N, ...): no attack can follow them, so all would look robust."""
    broken = int((~torch.isfinite(gradients)).flatten(1).any(dim=1).sum())
    if broken:
        raise ValueError(
            f"the gradient of the loss is NaN or infinite for {broken} of {len(gradients)} images, so attacks cannot "
            "follow it and would call any model robust; look in the forward pass for roots and norms of zero and for "
            "divisions, and add a small constant there"
        )


def check_attacked(attacked: Tensor, name: str) -> None:
    """Raise ValueError for attacked images that are NaN, which attacks make of those whose gradient is."""
    if not torch.isfinite(attacked).all():
        raise ValueError(
            f"the attack {name!r} gave NaN or infinite pixels, so the gradients that it follows are such; check the "
            "model's weights, and its forward pass for divisions and for roots and norms of zero"
        )


@contextmanager
def _counting_gradients() -> Iterator[list[int]]:
    """Count calls of autograd in the block, in a list of one number."""
    count = [0]
    originals = {name: getattr(torch.autograd, name) for name in ("grad", "backward")}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(torch.autograd, name, counted(name))
        yield count
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)
