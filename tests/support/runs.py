"""Short training runs, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.base import LossTerms
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer

# Two epochs of three steps of 32 images; a forward pass of the network takes a millisecond per image.
TINY = [
    "--model.layer_args.fsr.hidden=4",
    "--data.limit_train=120",
    "--data.limit_test=20",
    "--data.held_out=20",
    "--attack.steps=2",
    "--attack.eps=0.1",
    "--optim.epochs=2",
    "--optim.batch_size=32",
    "--optim.schedule=constant",
    "--evaluation.attacks=[fgsm]",
    "--evaluation.validation_steps=2",
]


def tiny(output: Path, *flags: str) -> Recipe:
    return Recipe.load(overrides=[*TINY, f"--output={output}", *flags])


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Let `act` happen before the given step of the run, counted from 0."""
    take_step = Trainer.take_step

    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.progress.step == step:
            act()
        take_step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "take_step", watched)


def same_values(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_values, one, other))
    return one == other


def without_seconds(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], poison: Callable[[LossTerms], None]) -> None:
    """Let `poison` act on the loss terms of these passes, counted from 0."""
    original, passes = AT.terms, iter(range(10**6))

    def terms(self: AT, *args: Any) -> LossTerms:
        found = original(self, *args)
        if next(passes) in steps:
            poison(found)
        return found

    monkeypatch.setattr(AT, "terms", terms)


def to_nan(terms: LossTerms) -> None:
    terms["adversarial"] = terms["adversarial"] * math.nan
