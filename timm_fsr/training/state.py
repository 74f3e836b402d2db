"""The state of a run: what goes into a checkpoint and comes back to the bit, and which epoch is the best."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from timm_fsr.attacks.base import Attack
from timm_fsr.attacks.bn_folding import Folding
from timm_fsr.data.dataset import ImageData, Images
from timm_fsr.models.saving import weights_digest
from timm_fsr.reports.comparison import is_free
from timm_fsr.training.checkpoint import Checkpoints
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.recipe import Recipe
from timm_fsr.version import __version__

_FALL = 0.1  # a robust accuracy that falls by so much ...
_SHARE = 0.5  # ... to less than this share of the best one has collapsed


@dataclass
class Selection:
    """The best validation so far, by robust accuracy, then clean accuracy, then the earlier one.

    Attributes:
        robust: its robust accuracy (PGD), in [0, 1].
        clean: its clean accuracy.
        one_step: its accuracy under a single-step attack, where that was measured.
        epoch: when it was, counted from 1; 0 before the first.
        stale: validations since then.
    """

    robust: float = -1.0
    clean: float = -1.0
    one_step: float | None = None
    epoch: int = 0
    stale: int = 0

    def update(self, epoch: int, robust: float, clean: float, one_step: float | None = None) -> bool:
        """Take note of a validation; whether it is the best so far."""
        if (robust, clean) <= (self.robust, self.clean):
            self.stale += 1
            return False
        self.robust, self.clean, self.one_step, self.epoch, self.stale = robust, clean, one_step, epoch, 0
        return True

    def collapsed(self, robust: float, one_step: float | None) -> bool:
        """Whether one-step training has overfitted catastrophically (Wong et al., 2020, arXiv 2001.03994).

        Robust accuracy under several steps has lost half of its best value and at least ten points, while the
        accuracy under one step is higher than it was then.
        """
        if one_step is None or self.one_step is None:
            return False
        return robust < _SHARE * self.robust and self.robust - robust >= _FALL and one_step > self.one_step


@dataclass
class Progress:
    """How far a run is; plain values, the same on every process.

    Attributes:
        step: optimisation steps done, skipped ones included.
        epoch: epochs done, validation included.
        counted: steps of the current epoch that metrics were taken of.
        skipped: steps of the current epoch that were skipped because of a NaN or an infinity.
        skipped_in_a_row: of these, those since the last good step.
        seconds: spent on the current epoch.
        lines: of `metrics.jsonl`.
        selection: the best epoch so far.
        stopped: why the run ended before its last epoch, if it did.
    """

    step: int = 0
    epoch: int = 0
    counted: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    lines: int = 0
    selection: Selection = field(default_factory=Selection)
    stopped: str = ""


@dataclass(eq=False)
class Run:
    """Everything one training run works with.

    Attributes:
        recipe: what was asked.
        accelerator: device, precision and processes.
        timm_model: the model that is trained, in timm's convention.
        prepared: the same in pixel space, as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        schedule: of the learning rate.
        ema: the averaged copy of `timm_model`, if asked for.
        whole: a copy of `timm_model` that is not sharded, under FSDP; `refresh_whole` brings it up to date.
        objective: the training method.
        attack: at full eps.
        folding: what of the model is folded while it is attacked.
        data: training images.
        extra: images mixed into each batch, if asked for.
        held_out: images that choose the best checkpoint.
        console: prints on the main process alone.
        steps_per_epoch: optimisation steps of an epoch.
        progress: how far the run is.
        sums: of each metric over the steps of the current epoch, on this process.
    """

    recipe: Recipe
    accelerator: Accelerator
    timm_model: nn.Module
    prepared: nn.Module
    optimizer: AcceleratedOptimizer
    schedule: Scheduler
    ema: ModelEmaV3 | None
    whole: nn.Module | None
    objective: Objective
    attack: Attack
    folding: Folding
    data: Images
    extra: ImageData | None
    held_out: Images
    console: Console
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and saved: the averaged one if there is one, never a sharded one."""
        if self.whole is not None:
            return self.whole
        return self.timm_model if self.ema is None else self.ema.module

    @functools.cached_property
    def teacher(self) -> str | None:
        """Checksum of the weights that the objective learns from, if it has such."""
        return None if self.objective.teacher is None else weights_digest(self.objective.teacher)

    @property
    def checkpoints(self) -> Checkpoints:
        """Where this run's checkpoints are."""
        return checkpoints_of(self.recipe)


def checkpoints_of(recipe: Recipe) -> Checkpoints:
    """Where the checkpoints of a run by `recipe` are."""
    return Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint.keep)


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint that `restore` continues from to the bit. Every process has to call it."""
    tensors = {
        **_training_state(run),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
        "sums": _gathered_sums(run),
    }
    if not run.accelerator.is_main_process:
        return
    values = {"progress": dataclasses.asdict(run.progress), "identity": _identity(run)}
    run.checkpoints.save(run.progress.step, tensors, values)


def restore(run: Run, tensors: dict[str, Any], values: dict[str, Any]) -> None:
    """Put a run that was just prepared where the checkpoint was taken.

    Raises:
        ValueError: the checkpoint is of another recipe, other data, or another number of processes.
    """
    _check_identity(run, values["identity"])
    _load_training_state(run, tensors)
    if run.ema is not None:
        run.ema.module.load_state_dict(tensors["ema"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(tensors["scaler"])
    progress = dict(values["progress"])
    run.progress = Progress(**{**progress, "selection": Selection(**progress["selection"])})
    mine = run.accelerator.process_index
    run.sums = {name: rows[mine].to(run.accelerator.device) for name, rows in tensors["sums"].items()}


def refresh_whole(run: Run) -> None:
    """Under FSDP, gather the weights into the copy that is not sharded. Every process has to call it."""
    if run.whole is not None:
        run.whole.load_state_dict(get_model_state_dict(run.timm_model, options=StateDictOptions(full_state_dict=True)))


def _training_state(run: Run) -> dict[str, Any]:
    """State of model and optimizer; under FSDP gathered on the main process, where it counts."""
    if run.whole is None:
        return {"model": run.timm_model.state_dict(), "optimizer": run.optimizer.state_dict()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    bare = run.optimizer.optimizer  # of Accelerate's wrapper
    return {
        "model": get_model_state_dict(run.timm_model, options=options),
        "optimizer": get_optimizer_state_dict(run.timm_model, bare, options=options),
    }


def _load_training_state(run: Run, tensors: dict[str, Any]) -> None:
    if run.whole is None:
        run.timm_model.load_state_dict(tensors["model"])
        run.optimizer.load_state_dict(tensors["optimizer"])
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(run.timm_model, tensors["model"], options=options)
    set_optimizer_state_dict(run.timm_model, run.optimizer.optimizer, tensors["optimizer"], options=options)


def _gathered_sums(run: Run) -> dict[str, Tensor]:
    """For each metric one entry per process (W,): their sum would round differently on the way."""
    return {name: run.accelerator.gather(value.reshape(1)).cpu() for name, value in run.sums.items()}


def _identity(run: Run) -> dict[str, Any]:
    return {
        "recipe": fixed_keys(run.recipe),
        "processes": run.accelerator.num_processes,
        "data": [run.data.fingerprint, *([] if run.extra is None else [run.extra.fingerprint])],
        "teacher": run.teacher,
        "versions": {"timm_fsr": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }


def _check_identity(run: Run, saved: dict[str, Any]) -> None:
    mine = _identity(run)
    keys = sorted(saved["recipe"].keys() | mine["recipe"].keys())
    changed = [key for key in keys if saved["recipe"].get(key) != mine["recipe"].get(key)]
    if changed:
        changes = ", ".join(f"{k} ({saved['recipe'].get(k)} -> {mine['recipe'].get(k)})" for k in changed)
        raise ValueError(
            f"{run.recipe.output} holds a run by another recipe: {changes}; resume it with its own recipe.yaml, or "
            "train this one into another --output"
        )
    for key, what in (("processes", "processes"), ("data", "training images (by fingerprint)")):
        if saved[key] != mine[key]:
            raise ValueError(
                f"the run in {run.recipe.output} had other {what}: {saved[key]}, now {mine[key]}; it can only go on "
                "with the same"
            )
    if saved.get("teacher") != mine["teacher"]:
        raise ValueError(
            f"the run in {run.recipe.output} began with other weights of {run.recipe.model.name}, and its frozen "
            "teacher would be another model; put back what it began with, or train into another --output"
        )
    if saved["versions"] != mine["versions"]:
        run.console.print(
            f"warning: the run was begun with {saved['versions']} and goes on with {mine['versions']}: its results may "
            "differ from those of an uninterrupted run"
        )


def fixed_keys(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that decide the training, flat: {"optim.lr": 0.1, ...}; a resumed run may change the others."""
    flat = flatten(yaml.safe_load(recipe.to_yaml()))
    return {key: value for key, value in flat.items() if not is_free(key)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots; an empty one stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
