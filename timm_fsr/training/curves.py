"""Learning curves of a run as one picture: accuracies, losses and the learning rate over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm_fsr.reports.charts import new_figure, save_png

if TYPE_CHECKING:  # loaded only when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, float]]

_TRAINING, _HELD_OUT, _GREY, _INK = "#b3541e", "#1f5f8b", "#777777", "#1d1f22"
_ACCURACIES = {
    "train.robust_accuracy": ("training images, attacked", _TRAINING, "-"),
    "held_out.robust_accuracy": ("held-out images, attacked", _HELD_OUT, "-"),
    "held_out.one_step_accuracy": ("held-out images, one step", _HELD_OUT, ":"),
    "train.clean_accuracy": ("training images, clean", _TRAINING, "--"),
    "held_out.clean_accuracy": ("held-out images, clean", _HELD_OUT, "--"),
}
_LOSS = "loss."
_LOSS_COLOURS = ("#00755a", "#8c3f7c", "#a07800", "#3b528b", "#a8340b")
_MOST_MARKS = 40  # epochs; more are drawn without a dot each


def plot_training(metrics: Metrics, path: Path, *, title: str, best_epoch: int, chance: float | None = None) -> None:
    """Draw accuracies, losses and learning rate over epochs as a PNG.

    A growing gap between the attacked curves of training and held-out images is robust overfitting.

    Args:
        metrics: one dictionary per epoch, as in `metrics.jsonl`.
        path: of the picture.
        title: above it.
        best_epoch: is marked, as the one whose model was kept.
        chance: the accuracy of guessing, in [0, 1]; is marked too.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9.5, "axes.titlesize": 12}):  # names may have $
        save_png(_figure(metrics, title, best_epoch, chance), path)


def _figure(metrics: Metrics, title: str, best_epoch: int, chance: float | None) -> Figure:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure(8, 8.5)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 2))
    accuracy, loss, rate = panels
    for name, (label, colour, style) in _ACCURACIES.items():
        _curve(accuracy, metrics, name, label, colour, style, scale=100)
    if chance is not None:
        accuracy.axhline(100 * chance, color=_GREY, linewidth=1, linestyle=":", label="chance")
    accuracy.set(ylabel="accuracy", ylim=(0, 100))
    accuracy.yaxis.set_major_formatter(PercentFormatter(100, decimals=0, symbol=" %"))
    names = list(dict.fromkeys(name for line in metrics for name in line if name.startswith(_LOSS)))
    if len(names) > 1:
        totals = [{"epoch": line["epoch"], "total": sum(line[n] for n in names if n in line)} for line in metrics]
        _curve(loss, totals, "total", "total loss", _INK, "-")
    for index, name in enumerate(names):
        colour = _LOSS_COLOURS[index % len(_LOSS_COLOURS)]
        _curve(
            loss,
            metrics,
            name,
            f"{name.removeprefix(_LOSS).replace('_', ' ')} loss",
            colour,
            "--" if len(names) > 1 else "-",
        )
    loss.set(ylabel="loss on training images")
    if loss.dataLim.y0 >= 0:
        loss.set_ylim(bottom=0)
    _curve(rate, metrics, "lr", "learning rate", _INK, "-")
    rate.set(ylabel="learning rate", xlabel="epoch")
    rate.set_ylim(bottom=0)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in panels:
        axes.axvline(best_epoch, color=_GREY, linewidth=1, label=f"kept: epoch {best_epoch}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not rate:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    figure.align_ylabels(panels)
    return figure


def _curve(axes: Axes, metrics: Metrics, name: str, label: str, colour: str, style: str, *, scale: float = 1.0) -> None:
    """One metric over the epochs that have it; nothing if none has."""
    points = [(line["epoch"], scale * line[name]) for line in metrics if name in line]
    if points:
        epochs, values = zip(*points, strict=True)
        marker = "o" if len(points) <= _MOST_MARKS else None
        axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=3)
