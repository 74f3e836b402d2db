"""Metrics of a run: a line per epoch, `metrics.jsonl`, and Accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console

from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import Progress, flatten
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.files import write_text

_FILE = "metrics.jsonl"

# Of metrics that are neither losses nor accuracies; the learning rate is written to the file alone.
_FORMATS = {
    "seconds": "{value:.0f} s",
    "skipped_steps": "{value:.0f} steps skipped",
    "held_out.collapsed": "",  # a warning has said so
    "eps": "eps {value:.4f}",
    "lr": "",
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or that it would leave out silently: their package is missing.

    Raises:
        ValueError: such a name.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            raise ValueError(unknown("tracker", name, known))
        if name not in {str(tracker) for tracker in get_available_trackers()}:
            raise ValueError(f"the tracker {name!r} is not installed here; run `pip install {name}` or leave it out")


def begin_tracking(recipe: Recipe, accelerator: Accelerator, *, lines: int) -> None:
    """Start the recipe's trackers, and cut `metrics.jsonl` to the first `lines` that the run knows of."""
    if recipe.trackers:
        config = flatten(yaml.safe_load(recipe.to_yaml()))
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        options = _tracker_options(recipe, resumed=lines > 0) if accelerator.is_main_process else {}
        accelerator.init_trackers("timm_fsr", config=plain, init_kwargs=options)
    if accelerator.is_main_process:
        write_text(recipe.folder / _FILE, "".join(_lines(recipe.folder)[:lines]))


def _tracker_options(recipe: Recipe, *, resumed: bool) -> dict[str, dict[str, Any]]:
    """The run's name, and a folder inside of its own for what a tracker writes, unless the user has chosen another."""
    folder = recipe.folder.resolve()
    name = folder.parent.name if folder.name == "training" else folder.name  # as a trial of a study
    options: dict[str, dict[str, Any]] = {}
    if "wandb" in recipe.trackers:
        place = folder / "trackers"
        place.mkdir(parents=True, exist_ok=True)  # else wandb would take a temporary folder
        options["wandb"] = {"name": name} if "WANDB_DIR" in os.environ else {"name": name, "dir": str(place)}
        for variable, inner in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
            os.environ.setdefault(variable, str(place / "wandb" / inner))
    if "trackio" in recipe.trackers:
        options["trackio"] = {"name": name, "resume": "allow" if resumed else "never"}
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackers" / "trackio"))  # read when trackio is imported
    return options


def log_epoch(
    metrics: dict[str, float],
    progress: Progress,
    *,
    recipe: Recipe,
    accelerator: Accelerator,
    console: Console,
    left: str = "",
) -> None:
    """Print, write and track the metrics of the last epoch of `progress`, which counts the line.

    `left` is the time that the run still takes, in words.
    """
    progress.lines += 1
    accelerator.log(metrics, step=progress.epoch)
    if accelerator.is_main_process:
        line = json.dumps({"epoch": progress.epoch, **metrics}) + "\n"
        write_text(recipe.folder / _FILE, "".join([*_lines(recipe.folder), line]))
        after = f"; {left}" if left else ""
        console.print(f"epoch {progress.epoch}/{recipe.optim.epochs}: {describe(metrics)}{after}")


def describe(metrics: dict[str, float]) -> str:
    """Metrics on one line: losses as they are, accuracies in percent."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("accuracy"):
            parts.append(f"{name.removesuffix('_accuracy').replace('.', ' ')} {100 * value:.1f} %")
        else:
            parts.append(_FORMATS.get(name, "{name} {value:.3f}").format(name=name.removeprefix("loss."), value=value))
    return ", ".join(filter(None, parts))


def summarise(metrics: dict[str, float]) -> str:
    """The most important metrics of training steps, for a line of a terminal: "loss 1.234, robust 45.6 %"."""
    losses = [value for name, value in metrics.items() if name.startswith("loss.")]
    parts = [f"loss {sum(losses):.3f}"] if losses else []
    for name in ("robust", "clean"):
        if (share := metrics.get(f"train.{name}_accuracy")) is not None:
            parts.append(f"{name} {100 * share:.1f} %")
    return ", ".join(parts)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in a run's folder, one per epoch."""
    return [json.loads(line) for line in _lines(folder)]


def _lines(folder: Path) -> list[str]:
    path = folder / _FILE
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
