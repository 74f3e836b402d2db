"""Charts: small SVG drawings with axes and labels, styled by the page that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 28, 14, 46
_DASHES = ("", "7 4", "2 4", "9 3 2 3")  # so that lines differ without their colour too
_COLOURS = 4  # the page defines as many classes "s0" to "s3"
_LINE = '<line class="line s{colour}" stroke-dasharray="{dash}" x1="1" x2="27" y1="5" y2="5"/>'  # in the legend
_BAR = '<path class="bar s{colour}" d="M9 0h10v10h-10z"/>'


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        x: positions from left to right.
        y: values in [0, 1], one for each.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(title: str, lines: Sequence[Line], ticks: Sequence[tuple[float, str]], x_label: str) -> Markup:
    """Shares in percent over a quantity, one line for each series.

    Args:
        title: read out by screen readers.
        lines: what to draw; their `x` lie within the range of the ticks.
        ticks: positions on the horizontal axis with their labels, in rising order, at least one.
        x_label: what the horizontal axis shows.
    """
    low, high = ticks[0][0], ticks[-1][0]
    span = high - low or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - low) / span * (WIDTH - _LEFT - _RIGHT), _vertical(y)

    parts = [_percent_axis(), _ticks([(at(x, 0)[0], label) for x, label in ticks]), _x_label(x_label)]
    for index, line in enumerate(lines):
        points = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour, dash = f"s{index % _COLOURS}", _DASHES[index % len(_DASHES)]
        parts.append(Markup('<polyline class="line {}" stroke-dasharray="{}" points="{}"/>').format(colour, dash, path))
        for (x, y), (given, value) in zip(points, zip(line.x, line.y, strict=True), strict=True):
            note = f"{line.name}: {100 * value:.1f} % at {given:g}"
            dot = '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>'
            parts.append(Markup(dot).format(colour, x, y, note))
    return _svg(title, parts) + _legend([line.name for line in lines] if len(lines) > 1 else [], _LINE)


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[float | None]]], edges: Sequence[float], x_label: str
) -> Markup:
    """Shares in percent by bins of [0, 1], side by side for each group.

    Args:
        title: read out by screen readers.
        groups: by name, one share for each bin, None for a bin without any.
        edges: of the bins, one more than there are bins.
        x_label: what the bins are of.
    """
    width = (WIDTH - _LEFT - _RIGHT) / (len(edges) - 1)
    largest = max([share for _, shares in groups for share in shares if share is not None], default=1.0)
    top = next(step for step in (0.04, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0) if step >= min(largest, 1.0))
    labelled = [(edge, index) for index, edge in enumerate(edges) if abs(edge * 5 - round(edge * 5)) < 1e-9]
    parts = [_percent_axis(top), _x_label(x_label)]
    parts.append(_ticks([(_LEFT + index * width, f"{edge:g}") for edge, index in labelled]))
    for index, (name, shares) in enumerate(groups):
        for number, share in enumerate(shares):
            if share is None:
                continue
            x = _LEFT + number * width + 1 + index * (width - 2) / len(groups)
            y = _vertical(share / top)
            bar = '<rect class="bar s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            note = f"{name}: {100 * share:.1f} % from {edges[number]:.3g} to {edges[number + 1]:.3g}"
            tall = HEIGHT - _BOTTOM - y
            parts.append(Markup(bar).format(index % _COLOURS, x, y, (width - 2) / len(groups), tall, note))
    return _svg(title, parts) + _legend([name for name, _ in groups] if len(groups) > 1 else [], _BAR)


def heat_map(title: str, values: Sequence[Sequence[float]]) -> Markup:
    """A square of signed values, first row at the bottom; orange is positive, blue negative, pale is near zero."""
    rows, columns = len(values), len(values[0])
    largest = max(abs(value) for row in values for value in row) or 1.0
    cell_x, cell_y = 200 / columns, 200 / rows
    cells = []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            strength = 0.12 + 0.88 * min(1.0, abs(value) / largest) ** 0.6
            kind = "positive" if value > 0 else "negative"
            rect = '<rect class="{}" fill-opacity="{:.2f}" x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.2f}"/>'
            place = (column * cell_x, 200 - (row + 1) * cell_y, cell_x, cell_y)
            cells.append(Markup(rect).format(kind, strength, *place))
    centre = Markup('<path class="cross" d="M94 100h12M100 94v12"/>')
    return Markup('<svg class="heat" viewBox="0 0 200 200" role="img"><title>{}</title>{}{}</svg>').format(
        title, Markup("").join(cells), centre
    )


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    frame = '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>'
    return Markup(frame).format(WIDTH, HEIGHT, title, Markup("").join(parts))


def _vertical(y: float) -> float:
    return HEIGHT - _BOTTOM - y * (HEIGHT - _TOP - _BOTTOM)


def _percent_axis(top: float = 1.0) -> Markup:
    parts = []
    for step in range(5):
        y = _vertical(step / 4)
        grid = '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        text = '<text class="tick" text-anchor="end" x="{}" y="{:.1f}">{} %</text>'
        parts.append(Markup(grid).format(_LEFT, WIDTH - _RIGHT, y, y))
        parts.append(Markup(text).format(_LEFT - 8, y + 4, f"{25 * step * top:.3g}"))
    return Markup("").join(parts)


def _ticks(ticks: Sequence[tuple[float, str]]) -> Markup:
    """Labels below the axis; those that would touch the one before are left out, never the last."""
    kept: list[tuple[float, str]] = []
    for x, label in reversed(ticks):
        if not kept or kept[-1][0] - x >= 4 + 3.6 * (len(label) + len(kept[-1][1])):
            kept.append((x, label))
    text = '<text class="tick" text-anchor="middle" x="{:.1f}" y="{}">{}</text>'
    return Markup("").join(Markup(text).format(x, HEIGHT - _BOTTOM + 18, label) for x, label in kept)


def _x_label(label: str) -> Markup:
    text = '<text class="label" text-anchor="middle" x="{}" y="{}">{}</text>'
    return Markup(text).format((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, label)


def _legend(names: Sequence[str], mark: str) -> Markup:
    """The names of the series, each beside what it is drawn with."""
    if not names:
        return Markup("")
    items = []
    for index, name in enumerate(names):
        frame = f'<svg viewBox="0 0 28 10" aria-hidden="true">{mark}</svg>'
        drawn = Markup(frame).format(colour=index % _COLOURS, dash=_DASHES[index % len(_DASHES)])
        items.append(Markup("<li>{}{}</li>").format(drawn, escape(name)))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
