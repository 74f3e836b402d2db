"""`timm-fsr train --dry-run`: build everything, time some steps, and say what the run would take and write."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from rich.console import Console
from torch import Tensor

from timm_fsr.attacks.base import is_one_step
from timm_fsr.evaluation.estimate import AttackEstimate, estimate_attacks, peak_memory, size, synchronise, together
from timm_fsr.evaluation.inference import BATCH_SIZE
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.metrics import check_trackers
from timm_fsr.training.output import check_output
from timm_fsr.training.pace import training_passes, validation_passes
from timm_fsr.training.prepare import compilation, with_input_of_model
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import gather_sums
from timm_fsr.training.trainer import Trainer
from timm_fsr.training.validation import validate
from timm_fsr.utils.progress import bar, duration

SECONDS = 15.0
"""How long training steps are timed, after those that warm up."""

_WARM_UP, _FEWEST, _MOST = 2, 3, 15  # steps; so few that skipped ones never end it
_VALIDATION_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What a run would take.

    Attributes:
        trainer: the run, ready to begin.
        test_images: number of images of the final evaluation; 0: there is none.
        timed: number of steps that were timed.
        step: seconds of one, the mean over the run.
        validation: seconds of one validation.
        saving: seconds that it takes to write the models and checkpoints of an epoch, without the disk's.
        attacks: of the final evaluation.
        memory: the most bytes held, on the device or in the machine's memory; None: unknown.
        checkpoint: bytes of one.
        model: bytes of a saved model.
    """

    trainer: Trainer
    test_images: int
    timed: int
    step: float
    validation: float
    saving: float
    attacks: list[AttackEstimate]
    memory: int | None
    checkpoint: int
    model: int

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.trainer.recipe.optim.epochs * self.trainer.steps_per_epoch

    @property
    def validations(self) -> int:
        """Of the whole run; the last epoch is always validated."""
        return math.ceil(self.trainer.recipe.optim.epochs / self.trainer.recipe.evaluation.validate_every)

    @property
    def training_seconds(self) -> float:
        """All steps, validations and checkpoints, without the final evaluation."""
        epochs = self.trainer.recipe.optim.epochs
        return self.steps * self.step + self.validations * self.validation + epochs * self.saving

    def __str__(self) -> str:
        rows = [*self._run_rows(), *self._time_rows(), *self._space_rows()]
        return "\n".join(f"{name:<18}{text}" for name, text in rows)

    def _run_rows(self) -> list[tuple[str, str]]:
        run, optim = self.trainer, self.trainer.recipe.optim
        channels, height, width = run.data.image_size
        parameters = sum(parameter.numel() for parameter in run.timm_model.parameters())
        extra = [] if run.extra is None else [("extra images", f"{len(run.extra):,}")]
        return [
            ("model", f"{run.label}, {parameters / 1e6:.2f} M parameters"),
            ("training images", f"{len(run.data):,} of {channels}x{height}x{width}, {run.data.num_classes} classes"),
            *extra,
            ("held-out images", f"{len(run.held_out):,}"),
            ("test images", f"{self.test_images:,}" if self.test_images else "none: no final evaluation"),
            ("device", f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}"),
            (
                "steps",
                f"{optim.epochs} epochs of {run.steps_per_epoch} steps of {optim.batch_size} images: {self.steps:,}",
            ),
        ]

    def _time_rows(self) -> list[tuple[str, str]]:
        optim, whole = self.trainer.recipe.optim, together(self.attacks)
        final = dataclasses.replace(
            whole,
            likely=None if whole.likely is None else whole.likely + self.training_seconds,
            most=None if whole.most is None else whole.most + self.training_seconds,
        )
        speed, once = optim.batch_size / self.step, duration(self.validation)
        return [
            ("speed", f"{speed:,.0f} images/s, {self.step:.3g} s a step (mean of {self.timed} steps)"),
            ("training", duration(self.steps * self.step)),
            (
                "validation",
                f"{duration(self.validations * self.validation)}, {self.validations} of {once}",
            ),
            ("saving", f"{duration(optim.epochs * self.saving)}, and what the disk takes"),
            *((f"final {found.name}", str(found)) for found in self.attacks),
            ("together", str(final)),
        ]

    def _space_rows(self) -> list[tuple[str, str]]:
        recipe = self.trainer.recipe
        files = ["recipe.yaml", "metrics.jsonl", "training.png"]
        files += ["report.json", "evaluation/"] if recipe.evaluation.attacks else []
        files += ["trackers/"] if recipe.trackers else []
        keep = recipe.checkpoint.keep
        return [
            ("peak memory", "unknown on this system" if self.memory is None else size(self.memory)),
            ("would write", f"{recipe.folder}/: {', '.join(files)}"),
            ("", f"best/ and last/, {size(self.model)} each"),
            ("", f"checkpoints/, {size(self.checkpoint)} each, the newest {keep} are kept"),
        ]


def estimate(recipe: Recipe, console: Console | None = None) -> RunEstimate:
    """Build everything that `train` would, time some steps and a part of a validation; nothing is written.

    Args:
        recipe: of the run. One with `resume` is estimated from its beginning.
        console: shows what is being timed; None: stdout, on the main process.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, FileExistsError: see `train`.
    """
    recipe.check()
    check_trackers(recipe.trackers)
    check_output(recipe)
    accelerator = build_accelerator(recipe)
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.quiet = not accelerator.is_main_process
    recipe = with_input_of_model(recipe, None, console)
    # Not the eps of the first steps, which is 0; and a step that breaks must not save a checkpoint.
    timed = dataclasses.replace(
        recipe,
        attack=dataclasses.replace(recipe.attack, warmup_epochs=0),
        optim=dataclasses.replace(recipe.optim, nonfinite="skip"),
    )
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    try:
        return _measured(Trainer.prepare(timed, accelerator, console), recipe, console)
    finally:
        accelerator.end_training()


def _measured(trainer: Trainer, recipe: Recipe, console: Console) -> RunEstimate:
    """Time all parts of a run that is ready to begin; `recipe` is the one as it was given."""
    with bar(console, "timing training steps", None) as show, compilation(recipe.compile):
        step, count = _step_seconds(trainer)
        memory = peak_memory(trainer.accelerator.device)
        show.begin("timing validation", None)
        validation = _validation_seconds(trainer, step)
        show.begin("timing checkpoints", None)
        saving, checkpoint, model = _saving(trainer)
        show.begin("timing attacks", None)
        test_images, attacks = _final_evaluation(trainer)
    trainer.recipe = recipe
    return RunEstimate(
        trainer=trainer,
        test_images=test_images,
        timed=count,
        step=step,
        validation=validation,
        saving=saving,
        attacks=attacks,
        memory=memory,
        checkpoint=checkpoint,
        model=model,
    )


def _step_seconds(trainer: Trainer) -> tuple[float, int]:
    """Seconds of a step, and of how many that is the mean; with weight perturbation for its share of the epochs."""
    optim = trainer.recipe.optim
    begins = min(math.ceil(optim.awp_start), optim.epochs) if optim.awp_gamma else optim.epochs
    parts = [(0, begins), (begins, optim.epochs - begins)]
    whole, count = 0.0, 0
    for epoch, epochs in ((epoch, epochs) for epoch, epochs in parts if epochs):
        seconds, number = _timed(trainer, epoch)
        whole, count = whole + seconds * epochs / optim.epochs, count + number
    return whole, count


def _timed(trainer: Trainer, epoch: int) -> tuple[float, int]:
    trainer.prepared.train()
    taken: list[float] = []
    batches = _endless(trainer)
    for number in itertools.count():
        enough = len(taken) >= _FEWEST and (sum(taken) >= SECONDS or len(taken) >= _MOST)
        if trainer.accelerator.reduce(torch.tensor(float(enough), device=trainer.accelerator.device), "sum") > 0:
            break
        trainer.progress.step = epoch * trainer.steps_per_epoch
        began = time.perf_counter()
        images, labels = next(batches)
        if trainer.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        trainer.take_step(images, labels)
        synchronise(trainer.accelerator.device)
        if number >= _WARM_UP:
            taken.append(time.perf_counter() - began)
    return sum(taken) / len(taken), len(taken)


def _endless(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from trainer._batches(0)


def _validation_seconds(trainer: Trainer, step: float) -> float:
    """Of all held-out images, by as many of them as take some seconds."""
    recipe, held_out, processes = trainer.recipe, trainer.held_out, trainer.accelerator.num_processes
    expected = step / recipe.optim.batch_size / training_passes(recipe) * validation_passes(recipe)
    count = min(len(held_out), max(processes, min(BATCH_SIZE * processes, int(_VALIDATION_SECONDS / expected))))
    one_step = is_one_step(trainer.attack) and recipe.evaluation.overfitting_alarm
    taken = 0.0
    for some in (min(count, 8 * processes), count):  # the first one warms up
        began = time.perf_counter()
        validate(trainer.judged, held_out.head(some), recipe, trainer.accelerator, one_step=one_step)
        synchronise(trainer.accelerator.device)
        taken = time.perf_counter() - began
    return taken * len(held_out) / count


class _Counted(io.RawIOBase):
    """Takes what is written, counts it and makes its checksum, as a checkpoint's file does."""

    def __init__(self) -> None:
        self.bytes, self._digest = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.bytes += len(view)
        return len(view)


def _saving(trainer: Trainer) -> tuple[float, int, int]:
    """Seconds to write an epoch's models and checkpoints, bytes of a checkpoint, bytes of a model."""
    began = time.perf_counter()
    tensors = {**trainer._state().state_dict(), "sums": gather_sums(trainer.sums, trainer.accelerator)}
    written = _Counted()
    torch.save(tensors, cast(IO[bytes], written))
    taken = time.perf_counter() - began
    model = sum(value.nbytes for value in trainer.judged.state_dict().values())
    checkpoints = 1 + 1 / trainer.recipe.evaluation.validate_every
    return taken * (checkpoints + model / max(written.bytes, 1)), written.bytes, model


def _final_evaluation(trainer: Trainer) -> tuple[int, list[AttackEstimate]]:
    """Number of test images, and what each attack on them takes."""
    recipe, accelerator = trainer.recipe, trainer.accelerator
    if not recipe.evaluation.attacks:
        return 0, []
    test = recipe.data.build_test(
        trainer.data.classes, progress=accelerator.is_main_process, image_size=trainer.data.image_size
    )
    _, found = estimate_attacks(
        trainer.judged,
        test.to(accelerator.device),
        norm=recipe.attack.norm,
        eps=recipe.attack.eps,
        attacks=recipe.evaluation.attacks,
        seed=recipe.seed,
        processes=accelerator.num_processes,
        trained=False,
    )
    return len(test), found
