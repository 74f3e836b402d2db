"""Flips: for each image the smallest perturbation found that changes what a model answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.base import NORMS, ImageLoss, anchored, judged_loss
from timm_fsr.attacks.losses import margin
from timm_fsr.attacks.minimum_norm import DDN, FMN, Nearest, distances, farthest
from timm_fsr.evaluation.model_checks import check_logits
from timm_fsr.hooks.surrogates import list_surrogates, plain, surrogate
from timm_fsr.utils.random import own_randomness

STEPS = 100
"""Gradient steps of each attack."""

_ROUNDS = 12
_FIRST, _LARGEST, _SMALLEST = 0.1, 0.5, 0.025  # by what share Auto-PGD tries to be nearer
_STARTS, _TARGETS = 3, 3


@dataclass(frozen=True, eq=False)
class Flips:
    """What `smallest_flips` has found.

    Attributes:
        images: (N, C, H, W), of each the nearest one with another answer; the image itself where none was found.
        eps: (N,) how far that is, an upper bound on the true distance; infinite where none was found.
        before: (N,) the model's answers to the clean images.
        after: (N,) its answers to `images`.
    """

    images: Tensor
    eps: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class _Way:
    """One kind of gradient that Auto-PGD follows.

    Attributes:
        name: for progress and reports.
        loss: (N,) of logits (N, classes) and labels (N,), to be maximised.
        through: the surrogate that the gradient goes through; None: the model itself.
    """

    name: str
    loss: ImageLoss
    through: str | None = None


def _ways(model: nn.Module) -> list[_Way]:
    towards = [_Way(f"target class {rank}", partial(_towards, rank=rank)) for rank in range(1, 1 + _TARGETS)]
    own = [_Way("margin", margin)] * _STARTS + towards
    return own + [_Way(name, margin, name) for name in list_surrogates(model)]


def _towards(logits: Tensor, labels: Tensor, *, rank: int) -> Tensor:
    """How far the wrong class of that rank (1 is the likeliest) is above the answer, in logits."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf).topk(min(rank, logits.shape[1] - 1), dim=1).values
    return wrong[:, -1] - logits.gather(1, labels[:, None])[:, 0]


def attacks_in_words(model: nn.Module, norm: str) -> str:
    """What `smallest_flips` runs on this model."""
    searched = f"FMN-{STEPS}" + (f" and DDN-{STEPS}" if norm == "l2" else "")
    names = list_surrogates(model)
    through = f", also by the gradients of the surrogates {', '.join(names)}" if names else ""
    tightened = f"APGD-{STEPS} from {_STARTS} starts on the margin and towards {_TARGETS} classes"
    return f"{searched}, tightened by {tightened}{through}"


def smallest_flips(
    model: nn.Module,
    images: Tensor,
    *,
    norm: str = "linf",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Flips:
    """Look for the nearest image to each of `images` that `model` answers otherwise than the image itself.

    FMN (in L2 also DDN) finds a first one. Auto-PGD on the margin then tries smaller balls: 10 % smaller at first, more
    after a success and less after a failure, until it fails at 2.5 %. It goes on from 2.5 % with other starts, towards
    the likeliest wrong classes and, in a model with feature layers, by the gradient of each of the layers' surrogates,
    as adaptive attacks do. The model itself decides about every image.

    Args:
        model: a pixel-space model in eval mode (see `timm_fsr.attack_mode`).
        images: (N, C, H, W) in [0, 1].
        norm: "linf" or "l2".
        seed: of Auto-PGD's random starts.
        progress: called with what is run next.

    Raises:
        ValueError: another norm, or a model that does not return logits.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} has no strong attack here; use one of {', '.join(map(repr, NORMS))}")
    say = progress or (lambda _: None)
    with torch.no_grad():
        logits = model(images)
    check_logits(logits, len(images))
    search = _Search(model, images, logits.argmax(dim=1), norm, torch.Generator(images.device).manual_seed(seed))
    with own_randomness(images.device):
        say("FMN")
        search.offer(FMN(norm=norm, steps=STEPS).nearest(judged_loss(model, margin, search.labels), images))
        if norm == "l2":
            say("DDN")
            loss_fn = judged_loss(model, DDN.model_loss, search.labels)
            search.offer(DDN(steps=STEPS).nearest(loss_fn, images, generator=search.generator))
        for number, way in enumerate(_ways(model)):
            search.tighten(way, _FIRST if number == 0 else _SMALLEST, say)
    return Flips(search.best, search.eps, search.labels, search.after)


class _Search:
    """The nearest image with another answer so far, of each image."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, norm: str, generator: torch.Generator) -> None:
        self.model, self.images, self.labels, self.norm, self.generator = model, images, labels, norm, generator
        self.best, self.after = images.clone(), labels.clone()
        self.eps = torch.full_like(images[:, 0, 0, 0], torch.inf)

    def offer(self, found: Nearest) -> None:
        """Take over what is nearer, as far as the model confirms it."""
        self._take(found.images, torch.arange(len(self.images), device=self.images.device))

    def tighten(self, way: _Way, share: float, say: Callable[[str], None]) -> None:
        """Try smaller and smaller balls by Auto-PGD."""
        shares = torch.full_like(self.eps, share)
        limit = farthest(self.images, self.norm)
        for number in range(_ROUNDS):
            left = (shares >= _SMALLEST).nonzero().flatten()
            if len(left) == 0:
                break
            say(f"APGD by {way.name}, round {number + 1}, {len(left)} image(s)")
            known = ~self.eps[left].isinf()
            radii = torch.where(known, self.eps[left] * (1 - shares[left]), limit[left])
            flipped = self._take(self._attacked(way, left, radii), left)
            shares[left] = torch.where(flipped, (2 * shares[left]).clamp_max(_LARGEST), shares[left] / 2)

    def _attacked(self, way: _Way, left: Tensor, radii: Tensor) -> Tensor:
        images, labels = self.images[left], self.labels[left]
        attack = APGD(norm=self.norm, steps=STEPS)
        if way.through is None:
            loss_fn = judged_loss(self.model, way.loss, labels)
            return attack(loss_fn, images, generator=self.generator, radii=radii)

        def judge(candidate: Tensor) -> Tensor:
            with plain(self.model):
                return margin(self.model(candidate), labels)

        with surrogate(self.model, way.through):  # around the backward pass too
            steer = anchored(lambda x: way.loss(self.model(x), labels))
            return attack(steer, images, generator=self.generator, judge=judge, radii=radii)

    def _take(self, found: Tensor, left: Tensor) -> Tensor:
        """(N,) bool: which of `found`, for the images at `left`, have another answer and are nearer than before."""
        with torch.no_grad(), plain(self.model):
            after = self.model(found).argmax(dim=1)
        size = distances(found, self.images[left], self.norm)
        nearer = (after != self.labels[left]) & (size < self.eps[left])  # False for NaN
        self.best[left] = torch.where(nearer.view(-1, 1, 1, 1), found, self.best[left])
        self.eps[left] = torch.where(nearer, size, self.eps[left])
        # Noted now: on the border rounding may decide otherwise in a batch of another size.
        self.after[left] = torch.where(nearer, after, self.after[left])
        return nearer
