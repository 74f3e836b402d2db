"""Auto-PGD (Croce and Hein, 2020, arXiv 2003.01690): projected gradient ascent that finds its own step size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from timm_fsr.attacks.base import Judged, Kept, LossFunction, OnModels, loss_of, register_attack
from timm_fsr.attacks.pgd import PGD
from timm_fsr.utils.errors import check_images

Judge = Callable[[Tensor], Tensor]

_MOMENTUM = 0.75
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06  # lengths of the intervals between checkpoints, in shares of the steps


@register_attack
@dataclass(frozen=True, kw_only=True)
class APGD(OnModels):
    """Auto-PGD, algorithm 1 of the paper: with momentum, and a step that is halved when it has stopped helping.

    Attributes:
        norm: "linf" or "l2".
        eps: radius of the ball, in pixels of [0, 1]; 0 returns the images.
        steps: number of gradient steps.
        restarts: independent runs; each image keeps one that misclassifies it, and of equals that of highest value.
        rho: the step is halved at a checkpoint unless so large a share of the steps before it raised the loss.

    Raises:
        ValueError: an unknown norm, or a number out of range.
    """

    name: ClassVar[str] = "apgd"
    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        self._ball()
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho={self.rho} must lie in [0, 1]: it is a share of steps; 0.75 in the paper")

    def with_eps(self, eps: float) -> APGD:
        """The same attack in another ball."""
        return replace(self, eps=eps)

    def __call__(
        self,
        loss_fn: LossFunction,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        judge: Judge | None = None,
        start: Tensor | None = None,
        radii: Tensor | None = None,
    ) -> Tensor:
        """Attack `images`.

        Args:
            loss_fn: maps images (N, C, H, W) to one value per image (N,), to be maximised, or to that and which images
                are misclassified (`Judged`); with a `judge` also to their sum.
            images: (N, C, H, W) in [0, 1].
            generator: of the random starts, on the images' device; torch's default generator when left out.
            judge: maps images to one value per image (N,). Where it is given, it decides which iterate is kept and
                when steps are halved, and `loss_fn` only gives directions: for attacks that follow a surrogate.
            start: where the first run begins, (N, C, H, W), such as the best point of another attack; it is clipped to
                the ball. A random point of the ball's edge when left out.
            radii: (N,) positive; the radius of each image's own ball, in place of `eps`.

        Returns:
            Adversarial images, detached, in [0, 1] and within eps of `images`: of each the iterate of highest value,
            or the highest of those that were misclassified, if any was.
            An image whose gradient was not finite in some step is NaN, as PGD leaves it: its outcome means nothing.

        Raises:
            ValueError: images out of [0, 1] or of another dtype, or a loss of another shape.
        """
        check_images(images)
        images = images.detach()
        if radii is None and self.eps == 0:
            return images.clone()
        if radii is not None and (radii.shape != images.shape[:1] or not bool((radii > 0).all())):
            raise ValueError(f"radii have shape {tuple(radii.shape)}; give one positive radius for each image (N,)")
        own = None if radii is None else radii.to(images).view(-1, 1, 1, 1)
        kept = self._run(loss_fn, judge, images, generator, own, start)
        for _ in range(self.restarts - 1):
            other = self._run(loss_fn, judge, images, generator, own)
            kept.update(other.attacked, other.found)
            kept.broken |= other.broken
        return kept.result()

    def _run(
        self,
        loss_fn: LossFunction,
        judge: Judge | None,
        images: Tensor,
        generator: torch.Generator | None,
        radii: Tensor | None,
        start: Tensor | None = None,
    ) -> Kept:
        """The iterate to keep of each image."""
        ball = self._ball()
        if start is None:
            point = before = (images + self._start(images, generator, radii)).clamp_(0, 1)
        else:
            point = before = ball.project(start.detach().clone(), images, radii)
        found, gradient = _judged_gradient(loss_fn, judge, point)
        value, ties = found.loss, judge is not None
        best, kept = _Best(point, value, gradient, ties=ties), Kept(point, found, ties=ties)
        step_size = images.new_full((len(images), 1, 1, 1), 2 * self.eps) if radii is None else 2 * radii
        interval = max(int(_FIRST * self.steps), 1)
        since, rises = 0, torch.zeros_like(value)
        value_at_check, halved = value.clone(), torch.ones_like(value, dtype=torch.bool)
        for step in range(self.steps):
            ahead = ball.project(point + step_size * ball.direction(gradient), images, radii)
            pull = _MOMENTUM if step else 1.0
            moved = ball.project(point + pull * (ahead - point) + (1 - pull) * (point - before), images, radii)
            point, before = moved, point
            last, (found, gradient) = value, _judged_gradient(loss_fn, judge, point)
            value = found.loss
            if step:  # as the reference counts: the first step has no loss before it
                rises += value > last
            best.update(point, value, gradient)
            kept.update(point, found)
            since += 1
            if since < interval:
                continue
            stale = ~halved & (value_at_check >= best.value)
            halved = (rises <= self.rho * interval) | stale
            step_size = torch.where(_per_image(halved), step_size / 2, step_size)
            point = torch.where(_per_image(halved), best.point, point)
            gradient = torch.where(_per_image(halved), best.gradient, gradient)
            value_at_check, since, rises = best.value.clone(), 0, torch.zeros_like(value)
            interval = max(interval - max(int(_SHRINK * self.steps), 1), max(int(_SHORTEST * self.steps), 1))
        return kept

    def _start(self, images: Tensor, generator: torch.Generator | None, radii: Tensor | None) -> Tensor:
        """A random point on the edge of the ball."""
        eps: Any = self.eps if radii is None else radii
        if self.norm == "linf":
            noise = torch.empty_like(images).uniform_(-1, 1, generator=generator)
            size = noise.flatten(1).abs().amax(dim=1)
        else:
            noise = torch.empty_like(images).normal_(generator=generator)
            size = noise.flatten(1).norm(dim=1)
        return eps * noise / size.clamp_min(torch.finfo(images.dtype).tiny).view(-1, 1, 1, 1)

    def _ball(self) -> PGD:
        """PGD's checks, projection and direction of ascent."""
        return PGD(norm=self.norm, eps=self.eps, steps=self.steps, restarts=self.restarts)


class _Best:
    """Of each image the iterate of highest value, with its gradient.

    With `ties` a later one of equal value wins: where a judge sees no difference, the way gone is not to be lost.
    """

    def __init__(self, point: Tensor, value: Tensor, gradient: Tensor, *, ties: bool) -> None:
        self.point, self.value, self.gradient, self.ties = point, value, gradient, ties

    def update(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        better = (value >= self.value) if self.ties else (value > self.value)
        self.point = torch.where(_per_image(better), point, self.point)
        self.gradient = torch.where(_per_image(better), gradient, self.gradient)
        self.value = torch.where(better, value, self.value)


def _judged_gradient(loss_fn: LossFunction, judge: Judge | None, point: Tensor) -> tuple[Judged, Tensor]:
    """What decides, and the direction to go in, from one pass where there is no judge.

    Without a finite gradient nothing decides: such a value is NaN.
    """
    with torch.enable_grad():
        point = point.detach().requires_grad_(True)
        found = loss_fn(point)
        loss = loss_of(found)
        if loss.shape != point.shape[:1] and (judge is None or loss.ndim > 0):
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)} for {len(point)} images; return one loss per image (N,)"
            )
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the images; loss_fn must call the model on its argument")
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    broken = ~torch.isfinite(gradient).flatten(1).all(dim=1)
    if judge is None:
        fooled = found.fooled if isinstance(found, Judged) else _nowhere(loss)
        return Judged(loss.detach().masked_fill(broken, torch.nan), fooled), gradient
    with torch.no_grad():
        value = judge(point.detach())
    if value.shape != point.shape[:1]:
        raise ValueError(
            f"judge returned shape {tuple(value.shape)} for {len(point)} images; return one value per image"
        )
    return Judged(value.masked_fill(broken, torch.nan), _nowhere(value)), gradient


def _nowhere(values: Tensor) -> Tensor:
    return torch.zeros_like(values, dtype=torch.bool)


def _per_image(flags: Tensor) -> Tensor:
    return flags.view(-1, 1, 1, 1)
