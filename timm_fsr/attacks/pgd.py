"""Projected gradient descent and the one-step attacks, in Linf and L2 balls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from timm_fsr.attacks.base import (
    NORMS,
    Judged,
    Kept,
    LossFunction,
    OnModels,
    ascent_direction,
    check_eps,
    in_proportion,
    input_gradient,
    l2_norms,
    loss_of,
    random_in_ball,
    register_attack,
)
from timm_fsr.utils.errors import check_images


@register_attack
@dataclass(frozen=True, kw_only=True)
class PGD(OnModels):
    """Projected gradient descent (Madry et al., 2018, arXiv 1706.06083): ascends the loss, projects, repeats.

    Attributes:
        norm: "linf" or "l2".
        eps: radius of the ball, in pixels of [0, 1]; 0 returns the images.
        steps: number of gradient steps.
        step_size: length of a step; None means 2.5 * eps / steps (0.25 * eps for the 10 steps of the FSR paper).
        random_start: begin at a random point of the ball, drawn uniformly unless `start_noise` is given.
        start_noise: standard deviation of a Gaussian start, in pixels (0.001 in the code of TRADES and of MART).
        restarts: independent runs; each image keeps one that misclassifies it, and of equals that of highest loss.

    Raises:
        ValueError: an unknown norm, or a number out of range.
    """

    name: ClassVar[str] = "pgd"
    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    start_noise: float | None = None
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is unknown; use one of {', '.join(map(repr, NORMS))}")
        check_eps(self.norm, self.eps)
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps={self.steps} and restarts={self.restarts} must be at least 1")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size={self.step_size} must be positive and finite, or None for 2.5 * eps / steps")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} without random_start would repeat the same run")
        if self.start_noise is not None and not (self.random_start and 0 < self.start_noise < float("inf")):
            raise ValueError(
                f"start_noise={self.start_noise} must be a positive standard deviation in pixels, and needs "
                "random_start; leave it out to start uniformly in the ball"
            )

    def with_eps(self, eps: float) -> PGD:
        """The same attack in another ball, with the step in proportion."""
        return replace(self, eps=eps, step_size=in_proportion(self.step_size, eps, self.eps))

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Attack `images`.

        Args:
            loss_fn: maps images (N, C, H, W) to what is to be maximised, one value per image (N,), or to that and
                which images are misclassified (`Judged`); a scalar (their sum) does without restarts. Sum, not mean:
                half precision would lose small gradients.
            images: (N, C, H, W) in [0, 1].
            generator: of the random starts, on the images' device; torch's default generator when left out.

        Returns:
            Adversarial images, detached, in [0, 1] and within eps of `images`.

        Raises:
            ValueError: images out of [0, 1] or of another dtype, or a loss of another shape.
        """
        check_images(images)
        if self.eps == 0:
            return images.detach().clone()
        first = self._run(loss_fn, images, generator)
        if self.restarts == 1:
            return first
        kept = Kept(first, self._judge(loss_fn, first))
        for _ in range(self.restarts - 1):
            candidate = self._run(loss_fn, images, generator)
            kept.update(candidate, self._judge(loss_fn, candidate))
        return kept.result()

    def _run(self, loss_fn: LossFunction, images: Tensor, generator: torch.Generator | None) -> Tensor:
        images = images.detach()
        step_size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        adversarial = images
        if self.random_start:
            adversarial = self.project(images + self._start(images, generator), images)
        for _ in range(self.steps):
            gradient = input_gradient(loss_fn, adversarial)
            adversarial = self.project(adversarial + step_size * self.direction(gradient), images)
        return adversarial

    def _start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.start_noise is None:
            return random_in_ball(images, self.norm, self.eps, generator)
        return torch.empty_like(images).normal_(std=self.start_noise, generator=generator)

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step that raises the loss most: the sign in Linf, the normalised gradient in L2."""
        return ascent_direction(gradient, self.norm)

    def project(self, adversarial: Tensor, images: Tensor, radii: Tensor | None = None) -> Tensor:
        """The nearest point of the ball around `images`, then of [0, 1]; overwrites `adversarial`.

        `radii` (N, 1, 1, 1) gives each image a ball of its own.
        """
        eps: Any = self.eps if radii is None else radii
        if self.norm == "linf":
            adversarial = torch.clamp(adversarial, images - eps, images + eps, out=adversarial)
        else:
            delta = adversarial - images
            adversarial = images + delta * (eps / l2_norms(delta).clamp_min(eps))
        return adversarial.clamp_(0, 1)

    @torch.no_grad()
    def _judge(self, loss_fn: LossFunction, images: Tensor) -> Judged:
        found = loss_fn(images)
        losses = loss_of(found)
        if losses.shape != images.shape[:1]:
            raise ValueError(
                f"restarts={self.restarts} needs one loss per image, but loss_fn returned shape "
                f"{tuple(losses.shape)} for {len(images)} images; use reduction='none'"
            )
        return found if isinstance(found, Judged) else Judged(losses, torch.zeros_like(losses, dtype=torch.bool))


@register_attack
@dataclass(frozen=True, kw_only=True)
class FGSM(OnModels):
    """Fast gradient sign method (Goodfellow et al., 2015, arXiv 1412.6572): one step of eps, no random start.

    Attributes:
        norm: "linf", or "l2" (one step along the normalised gradient).
        eps: radius of the ball, in pixels of [0, 1].

    Raises:
        ValueError: an unknown norm, or an eps out of range.
    """

    name: ClassVar[str] = "fgsm"
    random_start: ClassVar[bool] = False
    norm: str = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        self._as_pgd()

    def with_eps(self, eps: float) -> FGSM:
        """The same attack in another ball."""
        return replace(self, eps=eps)

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Attack `images`; see `PGD.__call__`."""
        return self._as_pgd()(loss_fn, images, generator=generator)

    def _as_pgd(self) -> PGD:
        return PGD(norm=self.norm, eps=self.eps, steps=1, step_size=self.eps or None, random_start=False)


@register_attack
@dataclass(frozen=True, kw_only=True)
class FGSMRS(OnModels):
    """FGSM with a random start (Wong et al., 2020, arXiv 2001.03994): uniform in the ball, one long step, clipped.

    Attributes:
        norm: "linf" or "l2".
        eps: radius of the ball, in pixels of [0, 1].
        step_size: length of the step, in pixels; None means 1.25 * eps.

    Raises:
        ValueError: an unknown norm, or a number out of range.
    """

    name: ClassVar[str] = "fgsm_rs"
    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float | None = None

    def __post_init__(self) -> None:
        self._as_pgd()

    def with_eps(self, eps: float) -> FGSMRS:
        """The same attack in another ball, with the step in proportion."""
        return replace(self, eps=eps, step_size=in_proportion(self.step_size, eps, self.eps))

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Attack `images`; see `PGD.__call__`."""
        return self._as_pgd()(loss_fn, images, generator=generator)

    def _as_pgd(self) -> PGD:
        step_size = self.step_size if self.step_size is not None else 1.25 * self.eps or None
        return PGD(norm=self.norm, eps=self.eps, steps=1, step_size=step_size)


@register_attack
@dataclass(frozen=True, kw_only=True)
class NFGSM(OnModels):
    """N-FGSM (de Jorge et al., 2022, arXiv 2202.01181): one step from an image with much noise, unclipped.

    For training only. The result lies in [0, 1] but up to `noise * eps + step_size` from the image: not clipping it
    to the ball is what keeps one-step training from catastrophic overfitting.

    Attributes:
        eps: radius of the ball that the model is to resist, in pixels of [0, 1].
        noise: half-width of the uniform noise, in multiples of eps.
        step_size: length of the step, in pixels; None means eps.

    Raises:
        ValueError: a number out of range.
    """

    name: ClassVar[str] = "n_fgsm"
    only_trains: ClassVar[bool] = True
    eps: float = 8 / 255
    noise: float = 2.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_eps("linf", self.eps)
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise} must be 0 or more: it is a width in multiples of eps")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size={self.step_size} must be positive and finite, or None for eps")

    def with_eps(self, eps: float) -> NFGSM:
        """The same attack for another radius."""
        return replace(self, eps=eps, step_size=in_proportion(self.step_size, eps, self.eps))

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Attack `images`; see `PGD.__call__`."""
        check_images(images)
        if self.eps == 0:
            return images.detach().clone()
        step_size = self.eps if self.step_size is None else self.step_size
        noise = random_in_ball(images, "linf", self.noise * self.eps, generator)
        noisy = (images.detach() + noise).clamp_(0, 1)
        gradient = input_gradient(loss_fn, noisy)
        return (noisy + step_size * ascent_direction(gradient, "linf")).clamp_(0, 1)
