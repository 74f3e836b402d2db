"""Evaluation: the outcome of clean images and attacks for every image, in pixel space and full precision."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.bn_folding import Folding, find_folding
from timm_fsr.evaluation.classes import in_order_of, judged_data
from timm_fsr.evaluation.foreign_attacks import AttackFunction
from timm_fsr.evaluation.inference import (
    Batches,
    as_batches,
    check_channels,
    full_precision,
    hardware,
    predict,
)
from timm_fsr.evaluation.model_checks import ModelCheck, check_attacked, check_logits, check_model, examine
from timm_fsr.evaluation.outcomes import (
    CLEAN,
    BatchOutcome,
    Journal,
    KnownSuite,
    Part,
    batch_key,
    open_journal,
    put_together,
    suite_key,
)
from timm_fsr.evaluation.registry import Stage, Suite, Target, as_suites, build_suites, check_names
from timm_fsr.evaluation.saved_images import AttackedBatch, keep_attacked, load_attacked, perturbed, save_attacked
from timm_fsr.models.description import class_names
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.models.saving import weights_digest
from timm_fsr.models.weights import model_digest
from timm_fsr.reports.report import Report
from timm_fsr.utils.distributed import check_agreement, from_main
from timm_fsr.utils.errors import UnsoundError, check_images
from timm_fsr.utils.random import derive_generator, own_randomness
from timm_fsr.version import __version__

__all__ = ["Standing", "evaluate"]

_UNKNOWN = 100.0  # passes that an attack counts as for the progress if its cost is unknown
_TICK = 1.0  # seconds between looks at an attack that runs


@dataclass(frozen=True)
class Standing:
    """How far an evaluation is.

    Attributes:
        images: number of finished images, on this process.
        robust: how many of them were right clean and under every attack.
        stage: what was run last, such as "autoattack: square".
        batch: images of the batch that is being attacked.
        left: how many of these are still right clean and under every attack so far.
        share: how much of the work on that batch is done, in [0, 1].
        next: what runs next, such as "autoattack: square (3 of 5)".
        fresh: whether anything was attacked since the last time, or all of it was known from before.
        accuracies: shares of the finished images that are right clean and under each attack.
    """

    images: int
    robust: int
    stage: str
    batch: int = 0
    left: int = 0
    share: float = 0.0
    next: str = ""
    fresh: bool = True
    accuracies: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """What the robust accuracy of the images seen so far can be at most, in [0, 1]."""
        return (self.robust + self.left) / max(1, self.images + self.batch)


def evaluate(
    model: nn.Module,
    data: Batches,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    attacks: Sequence[str | Suite | AttackFunction] = ("fgsm", "pgd20"),
    seed: int = 0,
    name: str = "",
    data_name: str = "",
    conditions: Mapping[str, Any] | None = None,
    transfer_from: Mapping[str, nn.Module] | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    save_images: bool = False,
    classes: Sequence[str] | None = None,
    batch_size: int | None = None,
    accelerator: Accelerator | None = None,
    progress: Callable[[Standing], None] | None = None,
) -> Report:
    """Clean and robust accuracy of a model, image by image.

    The model runs in eval mode, float32 and without TF32; its mode and gradients flags are restored. What an image's
    outcome is depends on the model, the seed, the attack and the batch that it is in, not on the number of processes;
    "adaptive" takes over what the Square of an AutoAttack named before it has done to an image.

    Args:
        model: a timm model (its `pretrained_cfg` mean and std are put in front) or a pixel-space model.
        data: what `timm_fsr.load_data` returns, whose labels are brought into the order of the model's classes by their
            names; or images (N, C, H, W) in [0, 1] with labels (N,) in that order, or an iterable of such batches.
        norm: "linf" or "l2"; "l1" for AutoAttack.
        eps: radius, in pixels of [0, 1].
        attacks: by name; docs/evaluation.md lists them. "fgsm", "pgd20", "pgd100x5" (restarts), "cw30", "apgd100",
            "official" (what the FSR repository tests), "standard", "plus", "rand" (AutoAttack), its components alone,
            "adaptive", "transfer"; or a `timm_fsr.Suite` of your own; or a function of (model, images, labels) that
            calls another library, see `Suite.from_callable`.
        seed: of the random starts.
        name: of the model, for the report.
        data_name: of the data, for the report.
        conditions: more to say in the report's conditions, as plain JSON values, such as how the model was trained.
        transfer_from: other models by name, whose adversarial images are tried by "adaptive" and "transfer".
        folder: where outcomes are noted as soon as they are known: the same evaluation, started again, goes on there.
        overwrite: replace what `folder` holds of another evaluation.
        save_images: keep the attacked images in `folder`, for `rescore`.
        classes: names that neither model nor data know; see `timm_fsr.evaluation.classes.match_classes`.
        batch_size: images per pass of data that is no iterable of batches; None: 250.
        accelerator: shares the batches over its processes; each returns the whole report.
        progress: called after each attack on a batch.

    Returns:
        The report; its "clean" comes first. What `folder` knows of other attacks on the same images counts too.

    Raises:
        ValueError: an unknown attack, images outside [0, 1], labels or classes that do not fit, a model that does not
            return one finite row of logits per image, no data, other data on another process, or a folder with another
            evaluation.
        ModuleNotFoundError: an attack needs a package that is not installed.
        UnsoundError: a feature layer that does not fire, or an attack that leaves the ball.
    """
    attacks = as_suites(attacks)
    check_names([a for a in attacks if isinstance(a, str)], norm, eps, sources=bool(transfer_from))
    if save_images and folder is None:
        raise ValueError("save_images needs a folder to keep the images in; give folder")
    pixel_model = as_pixel_model(model)
    device = device_of(model)
    judged = judged_data(model, data, classes)
    sources = {
        key: in_order_of(judged.classes, as_pixel_model(source), key).to(device)
        for key, source in (transfer_from or {}).items()
    }
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    with ExitStack() as modes:
        for one in (pixel_model, *sources.values()):
            modes.enter_context(attack_mode(one))
        modes.enter_context(full_precision(device))
        check_model(pixel_model)
        key = {"model": model_digest(pixel_model), "norm": norm, "eps": float(eps), "seed": seed, **_versions()}
        work = _Work(
            model=pixel_model,
            names=attacks,
            threat=(norm, float(eps), seed),
            sources=sources,
            journal=open_journal(folder, key, accelerator, overwrite=overwrite),
            folder=Path(folder) if folder is not None and save_images else None,
            progress=progress,
            classes=judged.classes,
        )
        seen, image_size = hashlib.sha256(), []
        for index, (images, labels) in enumerate(as_batches(judged.batches, batch_size)):
            if index == 0:
                image_size = list(images.shape[1:])
                check_agreement(accelerator, batch_key(0, images, labels), "first batches")
                with _seeded(seed, index, device):
                    work.prepare(images.to(device), labels.to(device), accelerator)
            if accelerator is not None:
                seen.update(batch_key(index, images, labels).encode())
            if index % world == rank:
                with _seeded(seed, index, device):
                    work.evaluate_batch(index, images.to(device), labels.to(device))
    check_agreement(accelerator, seen.hexdigest()[:16], "images or labels")
    parts = [work.result()] if accelerator is None else gather_object([work.result()])
    about = {
        **_conditions(model, name, data_name or judged.name, device, world),
        "image_size": image_size,
        "model_digest": key["model"],
    }
    about |= {**judged.conditions, **(conditions or {})}
    report = put_together(parts, norm, float(eps), seed, about, judged.notes)
    if save_images and rank == 0:
        work.tidy(sum(len(part.batches) for part in parts))
    return report


@dataclass
class _Work:
    """The evaluation of this process's batches."""

    model: nn.Module
    names: Sequence[str | Suite]
    threat: tuple[str, float, int]
    sources: Mapping[str, nn.Module]
    journal: Journal
    folder: Path | None
    progress: Callable[[Standing], None] | None
    classes: tuple[str, ...] | None = None
    suites: list[Suite] = field(default_factory=list)
    model_check: ModelCheck | None = None
    folding: Folding = field(default_factory=Folding)
    outcomes: dict[int, BatchOutcome] = field(default_factory=dict)
    standing: Standing = Standing(0, 0, CLEAN)
    right: Counter[str] = field(default_factory=Counter)
    took: dict[tuple[str, str], float] = field(default_factory=dict)
    passed: dict[tuple[str, str], float] = field(default_factory=dict)
    pace: dict[tuple[str, str], float] = field(default_factory=dict)
    fresh: bool = False

    def evaluate_batch(self, index: int, images: Tensor, labels: Tensor) -> None:
        """The outcomes of batch number `index`, all of them or those that the journal does not know."""
        check_images(images, labels)
        check_channels(self.model, images)
        batch = batch_key(index, images, labels)
        self.fresh, self.took, self.passed = False, {}, {}
        clean = self._clean(batch, images, labels)
        alive = clean.clone()
        found = BatchOutcome(labels.cpu(), clean.cpu())
        for suite in self.suites:
            stages = self._attack(suite, index, batch, images, labels, clean, alive)
            alive &= list(stages.values())[-1]
            found.suites[suite_key(suite)] = {key: flags.cpu() for key, flags in stages.items()}
        for key in self._unasked():
            earlier = self.journal.stages(batch, key)
            if earlier is not None:
                found.suites[key] = earlier
        self.outcomes[index] = found
        self._finished(len(images), int(alive.sum()), found)

    def result(self) -> Part:
        """What the other processes have to know."""
        notes = [] if self.model_check is None else self.model_check.notes()
        asked = {suite_key(suite): KnownSuite.of(suite) for suite in self.suites}
        return Part(self.outcomes, asked, self._unasked(), notes)

    def tidy(self, batches: int) -> None:
        """Remove attacked images of an earlier evaluation on more batches than these."""
        if self.folder is not None:
            for suite in self.suites:
                keep_attacked(self.folder, suite.name, batches)

    def prepare(self, images: Tensor, labels: Tensor, accelerator: Accelerator | None) -> None:
        """Look at the first batch and choose the attacks: on one process for all, which must not differ in them."""
        norm, eps, seed = self.threat
        check_images(images, labels)
        check_channels(self.model, images)
        self.model_check = from_main(accelerator, lambda: examine(self.model, images, labels))
        self.folding = find_folding(self.model, images)
        target = Target(self.model, norm, eps, seed, self.model_check, self.sources)
        for name in self.names:
            self.suites += [name] if isinstance(name, Suite) else build_suites([name], target)
        self.suites = list({suite.name: suite for suite in self.suites}.values())
        for suite in self.suites:
            self.journal.introduce(suite)

    def _unasked(self) -> dict[str, KnownSuite]:
        """What the journal knows of besides the attacks that were asked for."""
        asked = {suite_key(suite) for suite in self.suites}
        return {key: suite for key, suite in self.journal.suites.items() if key not in asked}

    def _clean(self, batch: str, images: Tensor, labels: Tensor) -> Tensor:
        known = self.journal.get(batch, CLEAN, CLEAN)
        if known is not None:
            return known.to(images.device)
        with torch.no_grad():
            logits = self.model(images)
        check_logits(logits, len(images))
        check_images(images, labels, logits.shape[1])
        clean = logits.argmax(dim=1) == labels
        self.journal.put(clean, batch, CLEAN, CLEAN)
        return clean

    def _attack(
        self, suite: Suite, index: int, batch: str, images: Tensor, labels: Tensor, clean: Tensor, alive: Tensor
    ) -> dict[str, Tensor]:
        """(N,) bool after each stage of a suite: was the image still classified correctly?

        `alive` are those that all suites before left; it is only shown.
        """
        correct = torch.ones_like(clean) if suite.every_image else clean.clone()
        flags: dict[str, Tensor] = {}
        attacked, usable = self._attacked_so_far(suite, index, batch, images)
        for number, stage in enumerate(suite.stages, 1):
            key, began = (batch, suite_key(suite), stage.name), time.perf_counter()
            known = self.journal.get(*key) if number <= usable else None
            if known is None:
                attacked_before, broken_before = self._same_attack(suite, stage, batch, clean)
                correct &= ~broken_before
                chosen = (correct & ~attacked_before).nonzero().flatten()
                self.passed[suite.name, stage.name] = _passes(stage) * len(chosen) / len(images)
                if len(chosen):
                    with self._ticking(suite, stage, len(images), int((alive & clean).sum()), len(chosen)):
                        found = self._run(suite, stage, index, images[chosen], labels[chosen])
                    attacked[chosen] = found
                    correct[chosen] = predict(self.model, found, stage.name) == labels[chosen]
                if self.folder is not None:
                    result = AttackedBatch(attacked, labels, perturbed(attacked, images))
                    of = f"{batch} {suite_key(suite)}"
                    save_attacked(self.folder, suite.name, index, result, of=of, stages=number, classes=self.classes)
                self.journal.put(correct, *key)
            else:
                correct = known.to(images.device, copy=True)
            flags[stage.name] = correct.clone()
            self.fresh |= known is None
            self.took[suite.name, stage.name] = time.perf_counter() - began
            self._ran(suite, stage, len(images), int((alive & correct).sum()))
        return flags

    @contextmanager
    def _ticking(self, suite: Suite, stage: Stage, batch: int, left: int, attacked: int) -> Iterator[None]:
        """Tell of a stage now and then while it runs, by counting the images that pass through the model."""
        if self.progress is None or stage.cost is None or _is_compiled(self.model):
            yield
            return
        whole, seen, told = attacked * max(stage.cost.gradients + stage.cost.forwards, 1.0), 0, time.perf_counter()

        def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            nonlocal seen, told
            seen += len(given[0]) if given else 0
            if time.perf_counter() - told >= _TICK:
                told, self.fresh = time.perf_counter(), True
                self._ran(suite, stage, batch, left, min(seen / whole, 0.99))

        handle = self.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def _ran(self, suite: Suite, stage: Stage, batch: int, left: int, part: float = 1.0) -> None:
        """Tell of a stage on a batch of so many images, of which so many are left; `part` of the stage is done."""
        weights, place = self._weights(left / batch), (suite.name, stage.name)
        stages = list(weights)
        done = stages.index(place) + (part == 1)
        before = sum(list(weights.values())[:done]) + (weights[place] * part if part < 1 else 0.0)
        self.standing = dataclasses.replace(
            self.standing,
            batch=batch,
            left=left,
            share=min(before / max(sum(weights.values()), 1e-9), 1.0),
            next=self._named(stages, done) if done < len(stages) else "",
            fresh=self.fresh,
        )
        if part == 1:
            self.standing = dataclasses.replace(self.standing, stage=f"{suite.name}: {stage.name}")
        self._show(self.standing)

    def _finished(self, images: int, robust: int, found: BatchOutcome) -> None:
        """Tell of a batch that is finished."""
        if self.fresh:
            self.pace = self.took
        done = self.standing.images + images
        self.right[CLEAN] += int(found.clean.sum())
        for suite in self.suites:
            self.right[suite.name] += int(list(found.suites[suite_key(suite)].values())[-1].sum())
        stages = list(self._weights())
        self._show(
            Standing(
                done,
                self.standing.robust + robust,
                self.standing.stage,
                next=self._named(stages, 0) if stages else "",
                fresh=self.fresh,
                accuracies={name: count / done for name, count in self.right.items()},
            )
        )

    def _weights(self, left: float = 1.0) -> dict[tuple[str, str], float]:
        """What each stage takes on a batch of which the share `left` is still right.

        Its seconds on the batch before. On the first one, the passes of those that have run, and those that the others
        may need.
        """
        if self.pace:
            return self.pace
        return {
            (suite.name, stage.name): self.passed.get(
                (suite.name, stage.name), _passes(stage) * (1.0 if suite.every_image else left)
            )
            for suite in self.suites
            for stage in suite.stages
        }

    def _named(self, stages: list[tuple[str, str]], number: int) -> str:
        suite, stage = stages[number]
        name = suite if suite == stage else f"{suite}: {stage}"
        return name if len(stages) == 1 else f"{name} ({number + 1} of {len(stages)})"

    def _same_attack(self, suite: Suite, stage: Stage, batch: str, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) bool twice: the images that suites before attacked by this very stage, and those that it broke there.

        Both are empty where the stage is to be run again: as where attacked images are to be kept, which only the other
        suite has.
        """
        attacked, broken = torch.zeros_like(clean), torch.zeros_like(clean)
        if not stage.reuse or self.folder is not None:
            return attacked, broken
        for other in self.suites[: self.suites.index(suite)]:
            before = torch.ones_like(clean) if other.every_image else clean
            for one in other.stages:
                known = self.journal.get(batch, suite_key(other), one.name)
                if known is None:
                    break
                after = known.to(clean.device)
                if (one.name, one.detail) == (stage.name, stage.detail):
                    attacked |= before
                    broken |= before & ~after
                before = after
        return attacked, broken

    def _attacked_so_far(self, suite: Suite, index: int, batch: str, images: Tensor) -> tuple[Tensor, int]:
        """The images as earlier stages left them, and of how many stages the journal's outcomes can be used.

        Where images are to be kept, an outcome without them is of no use.
        """
        if self.folder is None:
            return images.clone(), len(suite.stages)
        kept = load_attacked(self.folder, suite.name, index, of=f"{batch} {suite_key(suite)}")
        return (images.clone(), 0) if kept is None else (kept[0].to(images.device), kept[1])

    def _run(self, suite: Suite, stage: Stage, index: int, images: Tensor, labels: Tensor) -> Tensor:
        norm, eps, seed = self.threat
        stream = f"evaluate {suite.name}" if len(suite.stages) == 1 else f"evaluate {suite.name} {stage.name}"
        generator = derive_generator(seed, 0, index, 0, images.device, stream=stream)
        torch.manual_seed(generator.initial_seed())  # of a model that is random itself
        with self.folding.applied():  # for the attack alone: the model itself decides what has become of the images
            attacked = stage.run(self.model, images, labels, generator)
        _check_budget(attacked, images, norm, eps, stage.name)
        return attacked

    def _show(self, standing: Standing) -> None:
        self.standing = standing
        if self.progress is not None:
            self.progress(standing)


def _passes(stage: Stage) -> float:
    return _UNKNOWN if stage.cost is None else stage.cost.passes


def _is_compiled(model: nn.Module) -> bool:
    """Whether a hook would be compiled too, or be ignored."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


@contextmanager
def _seeded(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """What is random in a model that is so even in eval mode depends on the batch's number and on nothing before it."""
    with own_randomness(device):
        torch.manual_seed(derive_generator(seed, 0, index, 0, stream="evaluate clean").initial_seed())
        yield


def _check_budget(attacked: Tensor, images: Tensor, norm: str, eps: float, name: str) -> None:
    """An attack that cheats would make any model look weak, and one that gives NaN any model strong."""
    check_attacked(attacked, name)
    delta = (attacked - images).flatten(1)
    size = {"linf": delta.abs().amax(dim=1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(dim=1)}[norm]
    inside = attacked.shape == images.shape and bool((size <= eps * (1 + 1e-4) + 1e-6).all())
    low, high = float(attacked.min()), float(attacked.max())
    if not (inside and low >= 0 and high <= 1):
        raise UnsoundError(
            f"the attack {name!r} left [0, 1] or the {norm} ball of radius {eps:g} (reached {float(size.max()):g}, "
            f"pixels in [{low:g}, {high:g}]); its result would mean nothing; mend the attack"
        )


def _versions() -> dict[str, str]:
    return {"timm_fsr": __version__, "torch": torch.__version__}


def _conditions(model: nn.Module, name: str, data_name: str, device: torch.device, world: int) -> dict[str, Any]:
    classes = class_names(model)
    return {
        "model": name or type(model).__name__,
        "data": data_name,
        "precision": "float32",
        "weights_sha256": weights_digest(model),
        "hardware": hardware(device, world),
        "processes": world,
        "versions": {**_versions(), "timm": timm.__version__},
        **({"classes": list(classes)} if classes else {}),
    }
