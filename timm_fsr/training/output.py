"""The output folder of a run: whether it may be written to, what a run resumes from, and how a run begins there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from timm_fsr.training.lock import check_unlocked
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import checkpoints_of
from timm_fsr.utils.documents import read_yaml
from timm_fsr.utils.errors import UnsoundError
from timm_fsr.utils.files import write_text

_MODEL = ("config.json", "model.safetensors", "report.json", "recipe.yaml", ".writing-*/*")
_MADE = {
    "metrics.jsonl": (),
    "best": _MODEL,
    "last": _MODEL,
    "checkpoints": tuple(
        f"{folder}/{name}"
        for folder in ("step-[0-9]*", ".writing-*")
        for name in ("tensors.pt", "values.json", "checksums.json")
    ),
    "trackers": ("timm_fsr/**/events.out.tfevents.*", "timm_fsr/hparams.yml"),
    "evaluation": ("outcomes/*.jsonl",),
    "report.json": (),
    "training.png": (),
}
"""What a run leaves in its folder: files, and folders with patterns of the files that it makes in them."""

ENDED = "ended.json"
"""Of a run that ended for good before its last epoch: {"state": "failed" or "pruned", "reason": a sentence}."""

FAILURES = (FloatingPointError, UnsoundError, torch.OutOfMemoryError)
"""What the recipe itself brings about: the same recipe would fail again."""

Snapshot = tuple[dict[str, Any], dict[str, Any]]
"""Tensors and values of a checkpoint."""


def check_output(recipe: Recipe) -> None:
    """Refuse an output folder that must not be written to."""
    output = recipe.folder
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, but results need a folder; choose another with --output")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # else the main process may have the lock for this one already
        check_unlocked(output)
    present = [name for name in _MADE if (output / name).exists()]
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
    """Clear the folder for a new run of what an earlier one has made, and write the recipe into it."""
    if new:
        for name in reversed(_MADE):  # the file that marks a run is removed last
            _remove_made(recipe.folder / name, _MADE[name])
    (recipe.folder / ENDED).unlink(missing_ok=True)
    write_text(recipe.folder / "recipe.yaml", dataclasses.replace(recipe, resume=False, overwrite=False).to_yaml())


def _remove_made(path: Path, patterns: tuple[str, ...]) -> None:
    """Remove a file, or of a folder the files of these patterns and then the folders that are left empty."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for found in [found for pattern in patterns for found in path.glob(pattern)]:
        if found.is_file() or found.is_symlink():
            found.unlink()
    folders = [found for found in path.rglob("*") if found.is_dir()]
    for folder in [*sorted(folders, reverse=True), path]:  # the inner ones first
        with suppress(OSError):  # something of somebody else's is in it
            folder.rmdir()


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
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
