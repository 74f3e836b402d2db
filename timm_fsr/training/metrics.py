"""Metrics of a run: a line per epoch, `metrics.jsonl`, and Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from timm_fsr.training.state import Run, flatten
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.files import write_text

# Of what is neither a loss nor an accuracy; the rate has its place in the file alone.
_FORMATS = {
    "seconds": "{value:.0f} s",
    "skipped_steps": "{value:.0f} steps skipped",
    "eps": "eps {value:.4f}",
    "lr": "",
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or would leave out without a word for want of their package.

    Raises:
        ValueError: such a name.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            raise ValueError(unknown("tracker", name, known))
        if name not in {str(tracker) for tracker in get_available_trackers()}:
            raise ValueError(f"the tracker {name!r} is not installed here; run `pip install {name}` or leave it out")


def begin_tracking(run: Run) -> None:
    """Start the recipe's trackers, and cut `metrics.jsonl` to what the run knows of (nothing for a new one)."""
    if run.recipe.trackers:
        config = flatten(yaml.safe_load(run.recipe.to_yaml()))
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        run.accelerator.init_trackers("timm_fsr", config=plain)
    if run.accelerator.is_main_process:
        write_text(run.recipe.folder / "metrics.jsonl", "".join(_lines(run)[: run.progress.lines]))


def log_epoch(run: Run, metrics: dict[str, float]) -> None:
    """Print, write and track the metrics of the epoch that has just ended."""
    epoch = run.progress.epoch
    run.progress.lines += 1
    run.accelerator.log(metrics, step=epoch)
    if run.accelerator.is_main_process:
        line = json.dumps({"epoch": epoch, **metrics}) + "\n"
        write_text(run.recipe.folder / "metrics.jsonl", "".join([*_lines(run), line]))
        run.console.print(f"epoch {epoch}/{run.recipe.optim.epochs}: {describe(metrics)}")


def read_metrics(run: Run) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, one per epoch."""
    return [json.loads(line) for line in _lines(run)]


def describe(metrics: dict[str, float]) -> str:
    """Metrics on one line: losses as they are, accuracies in percent."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("accuracy"):
            parts.append(f"{name.removesuffix('_accuracy').replace('.', ' ')} {100 * value:.1f} %")
        else:
            parts.append(_FORMATS.get(name, "{name} {value:.3f}").format(name=name.removeprefix("loss."), value=value))
    return ", ".join(filter(None, parts))


def _lines(run: Run) -> list[str]:
    path = run.recipe.folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
