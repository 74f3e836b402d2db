"""The output folder of a run: whether it may be written to, what a run resumes from, and how a run begins there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console

from timm_fsr.training.lock import check_unlocked
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import checkpoints_of
from timm_fsr.utils.errors import UnsoundError
from timm_fsr.utils.files import write_text

ENDED = "ended.json"
"""Of a run that ended for good before its last epoch: {"state": "failed" or "pruned", "reason": a sentence}."""

FAILURES = (FloatingPointError, UnsoundError, torch.OutOfMemoryError)
"""What the recipe itself brings about: the same recipe would fail again."""

_RESULTS = ("metrics.jsonl", "best", "last", "checkpoints", "trackers", "evaluation", "report.json", "training.png")

Snapshot = tuple[dict[str, Any], dict[str, Any]]
"""Tensors and values of a checkpoint."""


def check_output(recipe: Recipe) -> None:
    """Refuse an output folder that must not be written to."""
    output = recipe.folder
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, but results need a folder; choose another with --output")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # else the main process may have the lock for this one already
        check_unlocked(output)
    present = [name for name in _RESULTS if (output / name).exists()]
    ours = "metrics.jsonl" in present or _is_recipe(output / "recipe.yaml")
    if not present or (recipe.overwrite and ours) or (recipe.resume and "metrics.jsonl" in present):
        return
    if "metrics.jsonl" in present:
        raise FileExistsError(
            f"{output} holds a training run; go on with it by --resume=true, replace it by --overwrite=true, or choose "
            "another folder with --output"
        )
    raise FileExistsError(
        f"{output} holds {', '.join(present)}, which no run here has made and this one would replace; choose another "
        "folder with --output (--overwrite=true deletes only what a run has made)"
    )


def find_snapshot(recipe: Recipe, accelerator: Accelerator, console: Console) -> Snapshot | None:
    """The newest checkpoint if the recipe says to resume and there is one; the same on every process.

    Raises:
        ValueError: none of the checkpoints is whole, or the processes find different ones.
        FileExistsError: a run got further than its first checkpoint, and all its checkpoints are gone.
    """
    if not recipe.resume:
        return None
    snapshot = checkpoints_of(recipe).load_newest(lambda problem: console.print(f"warning: {problem}"))
    step = -1 if snapshot is None else snapshot[1]["progress"]["step"]
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {recipe.output} (steps {steps}); it must be a folder that "
            "all of them share"
        )
    if snapshot is None:
        _check_nothing_is_lost(recipe)
        console.print(f"there is no checkpoint in {recipe.output} yet: the run starts from its beginning")
    return snapshot


def begin_output(recipe: Recipe, *, new: bool) -> None:
    """Clear the folder for a new run, and write the recipe into it."""
    folder = recipe.folder
    for path in (folder / name for name in reversed(_RESULTS) if new):  # the file that marks a run is removed last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / ENDED).unlink(missing_ok=True)
    write_text(folder / "recipe.yaml", dataclasses.replace(recipe, resume=False, overwrite=False).to_yaml())


@contextmanager
def failures_noted(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Leave a note in the folder of a run that fails within it; the error goes on."""
    try:
        yield
    except FAILURES as error:
        if accelerator.is_main_process:
            note_end(folder, "failed", str(error))
        raise


def note_end(folder: Path, state: str, reason: str) -> None:
    """Write down that a run ended for good before its last epoch, see `ENDED`."""
    write_text(folder / ENDED, json.dumps({"state": state, "reason": reason}) + "\n")


def how_it_ended(folder: Path) -> dict[str, str]:
    """What `note_end` has written; {} where it has not."""
    try:
        found = json.loads((folder / ENDED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_concluded(folder: Path, *, epochs: int, evaluated: bool) -> bool:
    """Whether a run's folder holds all of its results.

    Args:
        folder: of the run.
        epochs: of its recipe; a run that stopped itself before has drawn its curves nevertheless.
        evaluated: whether the recipe has the run attacked at its end.
    """
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    trained = len(lines) >= epochs or (folder / "training.png").exists()
    return trained and ((folder / "report.json").exists() or not evaluated)


def _is_recipe(path: Path) -> bool:
    """Whether a file is what `begin_output` has written: a recipe with every key."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and {field.name for field in dataclasses.fields(Recipe)} <= found.keys()


def _check_nothing_is_lost(recipe: Recipe) -> None:
    """Refuse to start from the beginning where a run got further than its first checkpoint, which was removed."""
    metrics = recipe.folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if len(lines) > 1 or (recipe.folder / "report.json").exists():
        raise FileExistsError(
            f"{recipe.output} holds a run without checkpoints, which cannot be resumed; replace it by --overwrite=true "
            "or choose another folder with --output"
        )
