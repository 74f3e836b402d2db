"""The state of a run: the content of a checkpoint, from which a run continues to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from timm_fsr.reports.comparison import IMPLICIT, is_free
from timm_fsr.training.checkpoint import Checkpoints
from timm_fsr.training.recipe import Recipe
from timm_fsr.version import __version__

# A robust accuracy has collapsed if it fell by at least the first, to less than the second times the best one.
_FALL = 0.1
_SHARE = 0.5


@dataclass
class Selection:
    """The best validation so far: of a model that works, by robust accuracy, then clean accuracy, then the earlier one.

    One class for all images is as robust as its share of the images, and no attack changes that: such a model, or one
    that guesses, is only best while none works.

    Attributes:
        robust: its robust accuracy (PGD), in [0, 1].
        clean: its clean accuracy.
        one_step: its accuracy under a single-step attack, where that was measured.
        epoch: when it was, counted from 1; 0 before the first.
        stale: validations since then.
        works: whether that model classified at all; see `timm_fsr.reports.statistics.collapse`.
    """

    robust: float = -1.0
    clean: float = -1.0
    one_step: float | None = None
    epoch: int = 0
    stale: int = 0
    works: bool = True

    def update(
        self, epoch: int, robust: float, clean: float, one_step: float | None = None, *, works: bool = True
    ) -> bool:
        """Take note of a validation; whether it is the best so far. A NaN is no accuracy, and below all of them."""
        if math.isnan(robust) or math.isnan(clean):
            robust, clean, works = -1.0, -1.0, False
        if self.epoch and (works, robust, clean) <= (self.works, self.robust, self.clean):
            self.stale += 1
            return False
        self.robust, self.clean, self.one_step, self.epoch, self.stale = robust, clean, one_step, epoch, 0
        self.works = works
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

    @classmethod
    def load(cls, values: dict[str, Any]) -> Progress:
        """The progress that was saved as `dataclasses.asdict`."""
        return cls(**{**values, "selection": Selection(**values["selection"])})


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingState:
    """Everything that training changes, but for the counters of `Progress`.

    Attributes:
        model: the model that is trained, in timm's convention.
        optimizer: as Accelerate wrapped it.
        ema: the averaged copy of the model, if there is one.
        scaler: of fp16's gradients, if there is one.
        sharded: FSDP shards the model and the optimizer.
    """

    model: nn.Module
    optimizer: AcceleratedOptimizer
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler | None
    sharded: bool

    def state_dict(self) -> dict[str, Any]:
        """The state by name; under FSDP it is gathered on the main process. Every process has to call this."""
        return {
            **self._trained(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, tensors: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Every process has to call this."""
        if self.sharded:
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.model, tensors["model"], options=options)
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, tensors["optimizer"], options=options)
        else:
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(tensors["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(tensors["scaler"])

    def _trained(self) -> dict[str, Any]:
        if not self.sharded:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        bare = self.optimizer.optimizer  # inside Accelerate's wrapper
        return {
            "model": get_model_state_dict(self.model, options=options),
            "optimizer": get_optimizer_state_dict(self.model, bare, options=options),
        }


def gather_weights(sharded: nn.Module, *, into: nn.Module) -> None:
    """Copy the weights of a model that FSDP shards into a whole one. Every process has to call this."""
    into.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))


def gather_sums(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """One entry per process (W,) for each metric: adding them up here would change how they are rounded."""
    return {name: accelerator.gather(value.reshape(1)).cpu() for name, value in sums.items()}


def scatter_sums(rows: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """The entries of this process, of what `gather_sums` gave."""
    return {name: entries[accelerator.process_index].to(accelerator.device) for name, entries in rows.items()}


def checkpoints_of(recipe: Recipe) -> Checkpoints:
    """Where the checkpoints of a run by `recipe` are."""
    return Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint.keep)


def identity(recipe: Recipe, *, processes: int, fingerprints: list[str], teacher: str | None) -> dict[str, Any]:
    """What a run must have in common with a checkpoint to continue from it.

    Args:
        recipe: of the run.
        processes: their number.
        fingerprints: of the training images, and of the extra ones if there are any.
        teacher: checksum of the frozen model that the objective learns from, if there is one.
    """
    return {
        "recipe": fixed_keys(recipe),
        "processes": processes,
        "data": fingerprints,
        "teacher": teacher,
        "versions": {"timm_fsr": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }


def check_identity(saved: dict[str, Any], mine: dict[str, Any], recipe: Recipe, console: Console) -> None:
    """Compare the `identity` in a checkpoint with that of the run that is to continue; other versions are a warning.

    Raises:
        ValueError: the checkpoint belongs to another recipe, other data, or another number of processes.
    """
    keys = sorted(saved["recipe"].keys() | mine["recipe"].keys())
    values = {key: (saved["recipe"].get(key, IMPLICIT.get(key)), mine["recipe"].get(key)) for key in keys}
    changed = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if changed:
        changes = ", ".join(f"{key} ({before} -> {now})" for key, (before, now) in changed.items())
        raise ValueError(
            f"{recipe.output} holds a run by another recipe: {changes}; resume it with its own recipe.yaml, or "
            "train this one into another --output"
        )
    for key, what in (("processes", "processes"), ("data", "training images (by fingerprint)")):
        if saved[key] != mine[key]:
            raise ValueError(
                f"the run in {recipe.output} had other {what}: {saved[key]}, now {mine[key]}; it can only go on "
                "with the same"
            )
    if saved.get("teacher") != mine["teacher"]:
        raise ValueError(
            f"the run in {recipe.output} began with other weights of {recipe.model.name}, and its frozen "
            "teacher would be another model; put back what it began with, or train into another --output"
        )
    if saved["versions"] != mine["versions"]:
        console.print(
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
