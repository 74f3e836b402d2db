"""Gradient attacks in Linf and L2 balls; they maximise any loss they are handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from timm_fsr.pixels import check_images


class Judged(NamedTuple):
    """What a loss function may return in the place of the loss, so that no attack trades a success for a higher loss.

    Attributes:
        loss: (N,), to be maximised.
        fooled: (N,) bool: is the image misclassified? By the logits of the same pass, so it costs nothing.
    """

    loss: Tensor
    fooled: Tensor


LossFunction = Callable[[Tensor], Tensor | Judged]
NORMS = ("linf", "l2")


def check_eps(norm: str, eps: float) -> None:
    """Refuse what is no radius in pixels of [0, 1].

    Raises:
        ValueError: a negative or infinite radius, or one in pixels of [0, 255].
    """
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} must be 0 or more: it is a radius in pixels of [0, 1], such as 8/255")
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps={eps:g} is more than pixels in [0, 1] can change by; eps is in these units: write {eps:g}/255"
        )


class Kept:
    """Of each image the best of several attacked ones: a misclassified one before others, then that of highest loss.

    Where a gradient or a loss was NaN, what is kept is NaN too: a better one must not hide that no attack can climb.

    Args:
        attacked: (N, C, H, W), the first ones.
        found: what the loss function has returned for them.
        ties: a later one of equal loss wins.
    """

    def __init__(self, attacked: Tensor, found: Judged, *, ties: bool = False) -> None:
        self.attacked, self.found, self.ties = attacked, found, ties
        self.broken = found.loss.isnan()

    def update(self, attacked: Tensor, found: Judged) -> None:
        """Keep the better of each image."""
        loss, fooled = self.found
        higher = found.loss >= loss if self.ties else found.loss > loss
        better = torch.where(found.fooled == fooled, higher, found.fooled)
        self.attacked = torch.where(better.view(-1, 1, 1, 1), attacked, self.attacked)
        self.found = Judged(torch.where(better, found.loss, loss), fooled | found.fooled)
        self.broken |= found.loss.isnan()

    def result(self) -> Tensor:
        """(N, C, H, W), what is kept of each image."""
        return self.attacked.masked_fill(self.broken.view(-1, 1, 1, 1), torch.nan)


class Attack(Protocol):
    """Anything that turns images (N, C, H, W) in [0, 1] into adversarial ones, given a loss to maximise."""

    @property
    def eps(self) -> float:
        """Radius of the ball, in pixels of [0, 1]."""

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images of the same shape, in [0, 1] and within eps of `images`."""

    def with_eps(self, eps: float) -> Attack:
        """The same attack in another ball."""


@dataclass(frozen=True, kw_only=True)
class PGD:
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
        return replace(self, eps=eps, step_size=_in_proportion(self.step_size, eps, self.eps))

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
        return _ascent_direction(gradient, self.norm)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """The nearest point of the ball around `images`, then of [0, 1]; overwrites `adversarial`."""
        if self.norm == "linf":
            adversarial = torch.clamp(adversarial, images - self.eps, images + self.eps, out=adversarial)
        else:
            delta = adversarial - images
            adversarial = images + delta * (self.eps / _norms(delta).clamp_min(self.eps))
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


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Fast gradient sign method (Goodfellow et al., 2015, arXiv 1412.6572): one step of eps, no random start.

    Attributes:
        norm: "linf", or "l2" (one step along the normalised gradient).
        eps: radius of the ball, in pixels of [0, 1].

    Raises:
        ValueError: an unknown norm, or an eps out of range.
    """

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


@dataclass(frozen=True, kw_only=True)
class NFGSM:
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
        return replace(self, eps=eps, step_size=_in_proportion(self.step_size, eps, self.eps))

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Attack `images`; see `PGD.__call__`."""
        check_images(images)
        if self.eps == 0:
            return images.detach().clone()
        step_size = self.eps if self.step_size is None else self.step_size
        noise = random_in_ball(images, "linf", self.noise * self.eps, generator)
        noisy = (images.detach() + noise).clamp_(0, 1)
        gradient = input_gradient(loss_fn, noisy)
        return (noisy + step_size * _ascent_direction(gradient, "linf")).clamp_(0, 1)


def is_one_step(attack: Attack) -> bool:
    """Whether an attack takes a single gradient step, so that training by it may overfit catastrophically."""
    return getattr(attack, "steps", 1) == 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode (running BN statistics, no noise, no dropout); training flags are restored one by one at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode (running BN statistics, no noise, no dropout) and frozen parameters while an attack runs.

    Training flags and `requires_grad` are restored one by one at the end, also after an exception.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with eval_mode(model):
            yield model
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def input_gradient(loss_fn: LossFunction, images: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to `images`, also inside `torch.no_grad`; nothing else is touched."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = loss_of(loss_fn(images))
        if loss.shape not in ((), images.shape[:1]):
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)} for {len(images)} images; "
                "return one loss per image (N,) or their sum"
            )
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the images; loss_fn must call the model on its argument")
        (gradient,) = torch.autograd.grad(loss.sum(), images)
    return gradient


def anchored(loss_fn: LossFunction) -> LossFunction:
    """The same loss, but with a gradient of zero where it does not depend on the images, instead of an error.

    A model that cuts its gradient off has to be attacked all the same.
    """

    def loss(images: Tensor) -> Tensor | Judged:
        found, nothing = loss_fn(images), 0 * images.sum()
        return Judged(found.loss + nothing, found.fooled) if isinstance(found, Judged) else found + nothing

    return loss


def judged_loss(
    model: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor
) -> LossFunction:
    """What an attack on `model` maximises: `loss` of logits (N, classes) and labels (N,), judged and anchored."""

    def judged(images: Tensor) -> Judged:
        logits = model(images)
        return Judged(loss(logits, labels), logits.detach().argmax(dim=1) != labels)

    return anchored(judged)


def loss_of(found: Tensor | Judged) -> Tensor:
    """The loss alone of what a loss function has returned."""
    return found.loss if isinstance(found, Judged) else found


def random_in_ball(like: Tensor, norm: str, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random point of the ball of radius eps, for each image of the shape of `like` (N, C, H, W)."""
    if norm == "linf":
        return torch.empty_like(like).uniform_(-eps, eps, generator=generator)
    direction = torch.empty_like(like).normal_(generator=generator)
    uniform = torch.empty(len(like), 1, 1, 1, device=like.device, dtype=like.dtype).uniform_(generator=generator)
    radius = eps * uniform ** (1 / like[0].numel())
    return direction * (radius / _norms(direction).clamp_min(torch.finfo(like.dtype).tiny))


def _in_proportion(step_size: float | None, eps: float, old_eps: float) -> float | None:
    """The step size that goes with `eps` as `step_size` went with `old_eps`; None is the attack's own."""
    if step_size is None or not old_eps:
        return step_size
    return step_size * eps / old_eps or None


def _ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that raises the loss most: the sign in Linf, the normalised gradient in L2."""
    if norm == "linf":
        return torch.where(gradient.isnan(), gradient, gradient.sign())  # sign(NaN) is 0, which would hide a fault
    return gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def _norms(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
