"""How long an evaluation will take, from timed passes and the number of passes that each attack may need."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode, input_gradient, judged_loss
from timm_fsr.attacks.bn_folding import find_folding
from timm_fsr.attacks.losses import cross_entropy
from timm_fsr.attacks.pgd import PGD
from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.classes import in_order_of, match_classes
from timm_fsr.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from timm_fsr.evaluation.gradient_masking import RESTARTS, STEPS, part_costs
from timm_fsr.evaluation.inference import BATCH_SIZE, full_precision
from timm_fsr.evaluation.model_checks import check_model, examine
from timm_fsr.evaluation.registry import Stage, Suite, Target, build_suites
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.utils.progress import duration

SECONDS = 5.0
"""How long passes are timed, at least three of each kind."""

_PILOT_STEPS = 10  # of PGD, on the timed images, for the share that stronger attacks have to work on


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Measured passes of a model.

    Attributes:
        forward: seconds for one image without a gradient.
        gradient: seconds for one image forward and back to the image.
        clean: share of the timed images that are right, in [0, 1].
        robust: share of them that PGD-10 does not break either.
        images: how many were timed at once.
    """

    forward: float
    gradient: float
    clean: float
    robust: float
    images: int


@dataclass(frozen=True)
class AttackEstimate:
    """What an attack will take.

    Attributes:
        name: of the suite.
        likely: seconds if as many images survive as survived PGD-10 among the timed ones; None: unknown.
        most: seconds if no image is broken; None: the attack does not say how much it asks of the model.
    """

    name: str
    likely: float | None
    most: float | None

    def __str__(self) -> str:
        if self.most is None:
            return "unknown: the attack does not say how many passes it takes"
        if self.likely is None:
            return f"at most {duration(self.most)}"
        if self.likely >= self.most:
            return duration(self.most)
        return f"about {duration(self.likely)}, at most {duration(self.most)}"


def estimate_attacks(
    model: nn.Module,
    data: Images,
    *,
    norm: str,
    eps: float,
    attacks: Sequence[str],
    seed: int = 0,
    transfer_from: Mapping[str, nn.Module] | None = None,
    batch_size: int = BATCH_SIZE,
    processes: int = 1,
    trained: bool = True,
) -> tuple[Passes, list[AttackEstimate]]:
    """Time passes on the first images, and say what each attack on all of them will take.

    Args:
        model: a timm model or a pixel-space model.
        data: the images of the evaluation.
        norm: see `timm_fsr.evaluate`, as are eps, attacks, seed, transfer_from and batch_size.
        eps: radius, in pixels of [0, 1].
        attacks: by name.
        seed: of everything random.
        transfer_from: other models by name.
        batch_size: images per pass.
        processes: that share the images.
        trained: whether the model is the one that will be attacked, so that its accuracies mean something.

    Raises:
        ValueError: see `timm_fsr.evaluate`.
    """
    pixel_model, device = as_pixel_model(model), device_of(model)
    judged, _ = match_classes(model, data, None) if trained else (data, ())
    sources = {
        key: in_order_of(judged.classes, as_pixel_model(one), key).to(device)
        for key, one in (transfer_from or {}).items()
    }
    images, labels = next(iter(judged.head(batch_size).batches(batch_size)))
    images, labels = images.float().to(device), labels.to(device)
    with ExitStack() as modes:
        for one in (pixel_model, *sources.values()):
            modes.enter_context(attack_mode(one))
        modes.enter_context(full_precision(device))
        check_model(pixel_model)
        check = examine(pixel_model, images, labels)
        suites = build_suites(attacks, Target(pixel_model, norm, eps, seed, check, sources))
        passes = time_passes(pixel_model, images, labels, norm=norm, eps=eps)
    return passes, _estimates(suites, passes, -(-len(data) // processes), trained=trained)


def time_passes(model: nn.Module, images: Tensor, labels: Tensor, *, norm: str, eps: float) -> Passes:
    """Time passes on a batch, and attack it by PGD-10; `model` is in pixel space and in `attack_mode`."""
    loss = judged_loss(model, cross_entropy, labels)
    radius = eps if norm in ("linf", "l2") else 0.0
    with find_folding(model, images).applied():
        gradient = _seconds(lambda: input_gradient(loss, images), images.device)
    with torch.no_grad():
        forward = _seconds(lambda: model(images), images.device)
        clean = model(images).argmax(dim=1) == labels
        attack = PGD(norm=norm if radius else "linf", eps=radius, steps=_PILOT_STEPS)
        attacked = attack(loss, images, generator=torch.Generator(images.device).manual_seed(0))
        robust = clean & (model(attacked).argmax(dim=1) == labels)
    count = len(images)
    return Passes(
        forward=forward / count,
        gradient=gradient / count,
        clean=int(clean.sum()) / count,
        robust=int(robust.sum()) / count,
        images=count,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, the median of several after two that warm up."""
    taken: list[float] = []
    for _ in range(2):
        run()
    while len(taken) < 3 or (sum(taken) < SECONDS and len(taken) < 20):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _estimates(suites: Sequence[Suite], passes: Passes, images: int, *, trained: bool) -> list[AttackEstimate]:
    """Of each suite; attacks that a suite before has run already are taken over."""
    found, done = [], set[tuple[str, str]]()
    for suite in suites:
        likely = most = 0.0
        known = True
        for number, stage in enumerate(suite.stages):
            if stage.reuse and (stage.name, stage.detail) in done:
                continue
            known &= stage.cost is not None
            whole = images * _seconds_each(stage, passes)
            most += whole
            left = 1.0 if suite.every_image else (passes.clean if number == 0 else passes.robust)
            likely += whole * left
        done |= {(stage.name, stage.detail) for stage in suite.stages}
        exact = suite.every_image
        found.append(AttackEstimate(suite.name, likely if trained or exact else None, most if known else None))
    return found


def _seconds_each(stage: Stage, passes: Passes) -> float:
    """For one image, its last judgement included; 0 where that is unknown."""
    if stage.cost is None:
        return 0.0
    return stage.cost.gradients * passes.gradient + (stage.cost.forwards + 1) * passes.forward


def estimate_evidence(passes: Passes, images: int) -> AttackEstimate:
    """The gradient masking checks on that many images; most attack only those that are right."""
    each = sum(part_costs(STEPS, RESTARTS).values()) * passes.gradient * images
    return AttackEstimate("gradient masking checks", each * passes.clean, each)


def estimate_corruptions(data: Images, passes: Passes, images: int) -> AttackEstimate:
    """Common corruptions of that many images, from the time that one image takes; they are made on the CPU."""
    first = next(iter(data.head(1).batches(1)))[0].float()
    taken = 0.0
    for timed in (False, True):  # the first time loads the library
        for kind in CORRUPTIONS:
            began = time.perf_counter()
            corrupt(first, kind, 3, seed=0)
            taken += (time.perf_counter() - began) if timed else 0.0
    each = len(SEVERITIES) * (taken + len(CORRUPTIONS) * passes.forward) * images
    return AttackEstimate("corruptions", each, each)


def together(estimates: Sequence[AttackEstimate]) -> AttackEstimate:
    """All attacks one after the other."""
    likely = [found.likely for found in estimates]
    most = [found.most for found in estimates]
    return AttackEstimate(
        "together",
        None if None in likely else sum(one for one in likely if one is not None),
        None if None in most else sum(one for one in most if one is not None),
    )


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch has held on a GPU, or this process in the machine's memory; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size(count: float) -> str:
    """Bytes in words: "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
