"""Minimum-norm attacks, FMN and DDN: for each image the nearest one that is misclassified."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from timm_fsr.attacks.base import Judged, LossFunction, OnModels
from timm_fsr.attacks.losses import margin
from timm_fsr.utils.errors import check_images

_DUALS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}  # the norm of the gradient that goes with a norm of distances
_ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
_LAST_GAMMA = 0.001  # FMN's growth and shrinkage of the ball in the last step
_TINY = 1e-12


class Nearest(NamedTuple):
    """What a minimum-norm attack has found.

    Attributes:
        images: (N, C, H, W) in [0, 1], of each the nearest misclassified one; the image itself where none was found.
        distances: (N,) in the attack's norm: 0 for an image that is misclassified already, infinite where nothing was
            found. Each is an upper bound: a nearer one may exist. Where a gradient was not finite, images and distances
            are NaN.
    """

    images: Tensor
    distances: Tensor


def distances(attacked: Tensor, images: Tensor, norm: str) -> Tensor:
    """How far (N,) `attacked` are from `images` (N, C, H, W) in "linf", "l2" or "l1"."""
    return _norms(attacked - images, norm)


def farthest(images: Tensor, norm: str) -> Tensor:
    """How far (N,) the farthest point of [0, 1] is from each of `images` (N, C, H, W)."""
    return _norms(torch.maximum(images, 1 - images), norm)


@dataclass(frozen=True, kw_only=True)
class FMN(OnModels):
    """Fast minimum-norm attack (Pintor et al., 2021, arXiv 2102.12827, algorithm 1).

    Follows the gradient of the margin within a ball that is fitted while it runs. Until the image is misclassified
    once, its radius is a linear estimate of the distance, or `gamma` more than in the step before if that is larger
    (the paper has the estimate alone). Then it shrinks after each success and grows after each failure.

    The loss has to be a margin, which is zero at the boundary: another one would mislead that estimate. The attack has
    no radius of its own, so nothing is trained with it; evaluations know it as "fmn100".

    Attributes:
        norm: "linf", "l2" or "l1".
        steps: number of gradient steps.
        step_size: length of the first step in L2, in pixels of [0, 1]; by a cosine it falls to a hundredth of it.
        gamma: by what share the ball first grows or shrinks; by a cosine it falls to 0.001.

    Raises:
        ValueError: an unknown norm, or a number out of range.
    """

    name: ClassVar[str] = "fmn"
    norm: str = "linf"
    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        if self.norm not in _ORDERS:
            raise ValueError(f"norm={self.norm!r} is unknown; use one of {', '.join(map(repr, _ORDERS))}")
        _check_numbers(self.steps, self.gamma)
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size} must be positive and finite; 1 in the paper")

    @staticmethod
    def model_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """The margin."""
        return margin(logits, labels)

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The images of `nearest`; nothing in this attack is random."""
        del generator
        return self.nearest(loss_fn, images).images

    def nearest(self, loss_fn: LossFunction, images: Tensor) -> Nearest:
        """Attack `images`.

        Args:
            loss_fn: maps images (N, C, H, W) to their margins (N,), positive where they are misclassified, or to these
                and which are misclassified (`Judged`, as `judged_loss` gives).
            images: (N, C, H, W) in [0, 1].

        Raises:
            ValueError: images out of [0, 1] or of another dtype, or a loss of another shape.
        """
        check_images(images)
        images = images.detach()
        closest, limit = _Closest(images, self.norm), farthest(images, self.norm)
        delta, eps = torch.zeros_like(images), torch.full_like(limit, torch.inf)
        for step in range(self.steps):
            step_size = _cosine(self.step_size, self.step_size / 100, step / self.steps)
            gamma = _cosine(self.gamma, _LAST_GAMMA, step / self.steps)
            (loss, fooled), gradient = _decided(loss_fn, images + delta)
            closest.update(delta, fooled, gradient)
            # Algorithm 1, lines 5 to 11: the radius that the next step is projected to.
            estimate = _norms(delta, self.norm) + loss.abs() / _flat_norms(gradient, _DUALS[self.norm]).clamp_min(_TINY)
            # The estimate knows nothing of [0, 1]: where many pixels stop at its ends, its ball stays too small.
            larger = torch.where(eps.isinf(), 0, eps * (1 + gamma))
            outside = torch.where(closest.found, larger, torch.maximum(estimate, larger))
            eps = torch.where(fooled, torch.minimum(eps * (1 - gamma), closest.distances), outside)
            eps = torch.minimum(eps, limit)
            delta = _PROJECTIONS[self.norm](delta + step_size * _unit(gradient), eps)
            delta = (images + delta).clamp_(0, 1) - images
        return closest.result()


@dataclass(frozen=True, kw_only=True)
class DDN(OnModels):
    """Decoupling direction and norm (Rony et al., 2019, arXiv 1811.09600, algorithm 1), in L2.

    Steps along the gradient, then rescales the perturbation to a radius that shrinks after each success and grows after
    each failure. The paper's rounding to 8 bits is left out.

    Attributes:
        steps: number of gradient steps.
        first_eps: radius that the search begins with, in pixels of [0, 1].
        gamma: by what share the radius grows or shrinks.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "ddn"
    norm: ClassVar[str] = "l2"
    steps: int = 100
    first_eps: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        _check_numbers(self.steps, self.gamma)
        if not 0 < self.first_eps < math.inf:
            raise ValueError(f"first_eps={self.first_eps} must be positive and finite; 1 in the paper")

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The images of `nearest`."""
        return self.nearest(loss_fn, images, generator=generator).images

    def nearest(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Nearest:
        """Attack `images`.

        Args:
            loss_fn: maps images (N, C, H, W) to a loss (N,) and which of them are misclassified (`Judged`, as
                `judged_loss` gives); a loss alone is taken for a margin, positive where they are.
            images: (N, C, H, W) in [0, 1].
            generator: of the direction that is taken where the gradient is zero, on the images' device.

        Raises:
            ValueError: images out of [0, 1] or of another dtype, or a loss of another shape.
        """
        check_images(images)
        images = images.detach()
        closest, limit = _Closest(images, self.norm), farthest(images, self.norm)
        delta, eps = torch.zeros_like(images), torch.full_like(limit, self.first_eps)
        for step in range(self.steps):
            step_size = _cosine(1.0, 0.01, step / self.steps)
            (_, fooled), gradient = _decided(loss_fn, images + delta)
            closest.update(delta, fooled, gradient)
            flat = (gradient == 0).flatten(1).all(dim=1).view(-1, 1, 1, 1)
            if bool(flat.any()):
                gradient = torch.where(flat, torch.empty_like(gradient).normal_(generator=generator), gradient)
            delta = delta + step_size * _unit(gradient)
            eps = torch.minimum(eps * torch.where(fooled, 1 - self.gamma, 1 + self.gamma), limit)
            delta = delta * (eps / _norms(delta, "l2").clamp_min(_TINY)).view(-1, 1, 1, 1)
            delta = (images + delta).clamp_(0, 1) - images
        return closest.result()


class _Closest:
    """Of each image the smallest perturbation so far that misclassifies it."""

    def __init__(self, images: Tensor, norm: str) -> None:
        self.images, self.norm = images, norm
        self.delta = torch.zeros_like(images)
        self.distances = torch.full_like(images[:, 0, 0, 0], torch.inf)
        self.found = torch.zeros_like(self.distances, dtype=torch.bool)
        self.broken = torch.zeros_like(self.found)

    def update(self, delta: Tensor, fooled: Tensor, gradient: Tensor) -> None:
        """Keep the smaller of each image; without a finite gradient nothing about it means anything."""
        size = _norms(delta, self.norm)
        smaller = fooled & (size <= self.distances)
        self.delta = torch.where(smaller.view(-1, 1, 1, 1), delta, self.delta)
        self.distances = torch.where(smaller, size, self.distances)
        self.found |= fooled
        self.broken |= ~torch.isfinite(gradient).flatten(1).all(dim=1)

    def result(self) -> Nearest:
        attacked = (self.images + self.delta).masked_fill(self.broken.view(-1, 1, 1, 1), torch.nan)
        return Nearest(attacked, self.distances.masked_fill(self.broken, torch.nan))


def _decided(loss_fn: LossFunction, images: Tensor) -> tuple[Judged, Tensor]:
    """The loss (N,), which images are misclassified, and the gradient of the loss, from one pass."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        found = loss_fn(images)
        loss, fooled = found if isinstance(found, Judged) else (found, found.detach() > 0)
        if loss.shape != images.shape[:1]:
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)} for {len(images)} images; return one loss per image (N,)"
            )
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the images; loss_fn must call the model on its argument")
        (gradient,) = torch.autograd.grad(loss.sum(), images)
    return Judged(loss.detach(), fooled), gradient


def _cosine(first: float, last: float, share: float) -> float:
    """Cosine annealing from `first` at share 0 towards `last` at share 1."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _unit(gradient: Tensor) -> Tensor:
    return gradient / _flat_norms(gradient, 2.0).clamp_min(_TINY).view(-1, 1, 1, 1)


def _norms(delta: Tensor, norm: str) -> Tensor:
    return _flat_norms(delta, _ORDERS[norm])


def _flat_norms(tensor: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), ord=order, dim=1)


def _project_linf(delta: Tensor, eps: Tensor) -> Tensor:
    eps = eps.view(-1, 1, 1, 1)
    return torch.minimum(torch.maximum(delta, -eps), eps)


def _project_l2(delta: Tensor, eps: Tensor) -> Tensor:
    return delta * (eps / _norms(delta, "l2").clamp_min(_TINY)).clamp_max(1).view(-1, 1, 1, 1)


def _project_l1(delta: Tensor, eps: Tensor) -> Tensor:
    """The nearest point of the L1 ball (Duchi et al., 2008): all magnitudes shrink by one threshold, down to zero."""
    size = delta.flatten(1).abs()
    ordered = size.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - eps[:, None]
    count = torch.arange(1, size.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    kept = (ordered * count > excess).sum(dim=1, keepdim=True).clamp_min(1)  # coordinates that stay above zero
    threshold = (excess.gather(1, kept - 1) / kept).clamp_min(0)  # 0 or less: it lies in the ball already
    return (delta.flatten(1).sign() * (size - threshold).clamp_min(0)).view_as(delta)


_PROJECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linf": _project_linf,
    "l2": _project_l2,
    "l1": _project_l1,
}


def _check_numbers(steps: int, gamma: float) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma={gamma} must lie between 0 and 1: it is a share of the radius; 0.05 in the paper")
