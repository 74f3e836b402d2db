"""Plots of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_fsr.files import staged

_CURVES = {
    "train.robust_accuracy": ("training images, attacked", "#b3541e", "-"),
    "held_out.robust_accuracy": ("held-out images, attacked", "#1f5f8b", "-"),
    "held_out.one_step_accuracy": ("held-out images, one step", "#1f5f8b", ":"),
    "train.clean_accuracy": ("training images, clean", "#b3541e", "--"),
    "held_out.clean_accuracy": ("held-out images, clean", "#1f5f8b", "--"),
}


def plot_training(metrics: Sequence[dict[str, float]], path: Path, *, title: str, best_epoch: int) -> None:
    """Draw accuracies over epochs as a PNG: a growing gap between the attacked curves is robust overfitting.

    Args:
        metrics: one dictionary per epoch, as in `metrics.jsonl`.
        path: of the picture.
        title: above it.
        best_epoch: is marked, as the one whose model was kept.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (label, colour, style) in _CURVES.items():
        points = [(line["epoch"], 100 * line[name]) for line in metrics if name in line]
        if points:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, style, color=colour, label=label, marker="o", markersize=3)
    axes.axvline(best_epoch, color="#777777", linewidth=1, label=f"kept: epoch {best_epoch}")
    axes.set(xlabel="epoch", ylabel="accuracy in %", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with staged(path.parent) as scratch:
        figure.savefig(scratch / path.name, dpi=120)
