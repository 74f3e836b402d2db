"""Pictures, drawn by matplotlib: SVG inside a page, in the page's own colours, and PNG files."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from timm_fsr.utils.files import staged

if TYPE_CHECKING:  # loaded only when something is drawn: it takes a while
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 240  # of a chart in a page, in CSS pixels: a telephone shows it at its size, a desk three in a row
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 30, 14, 46
_LEGEND_ROW, _LEGEND_LETTERS, _LEGEND_MOST = 20, 38, 4  # of a name in the legend: longer ones take several rows
_MOST_MARKS = 40  # a line of more points has none
_DASHES = ((), (7, 4), (2, 4), (9, 3, 2, 3))  # so that lines differ without their colour too

# The colours of a light page. Inside a page each becomes the variable of that name, which dark mode changes.
_SERIES = ("#0b5fa5", "#c25100", "#00755a", "#8c3f7c")
_QUIET, _RULE, _INK, _POSITIVE, _NEGATIVE = "#5d6168", "#d9d6ce", "#1d1f22", "#d55e00", "#0072b2"
_VARIABLES = {
    **{colour: f"s{index}" for index, colour in enumerate(_SERIES)},
    **{_QUIET: "quiet", _RULE: "rule", _INK: "ink", _POSITIVE: "positive", _NEGATIVE: "negative"},
}

_STYLE: Any = {
    "font.sans-serif": "DejaVu Sans",  # comes with matplotlib; pages set their own
    "font.size": 13,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",  # text stays text, which can be read out, searched and set in the page's font
    "svg.hashsalt": "timm_fsr",  # else ids are random
    "text.parse_math": False,  # names may have a $
}
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # names may have them
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_NOTE = "note: "  # how the ids of shapes begin that have a note to show under the mouse


Shapes = dict[str | None, ElementTree.Element]


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


def line_chart(
    title: str,
    lines: Sequence[Line],
    ticks: Sequence[tuple[float, str]],
    x_label: str,
    *,
    chance: float | None = None,
) -> Markup:
    """Shares in percent over a quantity, one line for each series.

    Args:
        title: read out by screen readers.
        lines: what to draw; their `x` lie within the range of the ticks.
        ticks: positions on the horizontal axis with their labels, in rising order, at least one.
        x_label: what the horizontal axis shows.
        chance: the share that guessing reaches, marked by a thin line.
    """
    low, high = ticks[0][0], ticks[-1][0]
    with _style():
        names = [_wrapped(line.name) for line in lines] if len(lines) > 1 else []
        figure, axes = _chart(names, x_label, top=1.0)
        axes.set_xlim(low, high if high > low else low + 1)
        kept = _apart(ticks, axes.get_xlim())
        axes.set_xticks([x for x, _ in kept], [label for _, label in kept])
        _mark_chance(axes, chance)
        marks: list[Artist] = []
        for index, line in enumerate(lines):
            colour, dashes = _look(index, len(lines))
            style: Any = (0, dashes) if dashes else "-"
            marks += axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=2.5)
            for x, y in zip(line.x, line.y, strict=True) if len(line.x) <= _MOST_MARKS else ():
                note = f"{_NOTE}{line.name}: {100 * y:.1f} % at {x:g}"
                axes.plot([x], [y], "o", color=colour, markersize=7, gid=note)
        _legend(figure, marks, names)
        return _inline(figure, title, "chart")


def _look(index: int, count: int) -> tuple[str, tuple[int, ...]]:
    """Colour and dashes of a line; of up to 16 no two are the same."""
    row = index if count <= len(_SERIES) else index // len(_SERIES)
    return _SERIES[index % len(_SERIES)], _DASHES[row % len(_DASHES)]


def bar_chart(
    title: str,
    groups: Sequence[tuple[str, Sequence[float | None]]],
    edges: Sequence[float],
    x_label: str,
    *,
    chance: float | None = None,
) -> Markup:
    """Shares in percent by bins of [0, 1], side by side for each group.

    Args:
        title: read out by screen readers.
        groups: by name, one share for each bin, None for a bin without any.
        edges: of the bins, one more than there are bins.
        x_label: what the bins are of.
        chance: the share that guessing reaches, marked by a thin line, where the bars are accuracies.
    """
    from matplotlib.patches import Patch

    largest = max([share for _, shares in groups for share in shares if share is not None], default=1.0)
    top = next(step for step in (0.04, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0) if step >= min(largest, 1.0))
    width = 0.94 / len(groups)  # bins have one width in the picture, whatever their edges
    with _style():
        names = [_wrapped(name) for name, _ in groups] if len(groups) > 1 else []
        figure, axes = _chart(names, x_label, top=top)
        axes.set_xlim(0, len(edges) - 1)
        labelled = [(index, f"{edge:g}") for index, edge in enumerate(edges) if abs(edge * 5 - round(edge * 5)) < 1e-9]
        kept = _apart(labelled, axes.get_xlim())
        axes.set_xticks([x for x, _ in kept], [label for _, label in kept])
        marks: list[Artist] = []
        for index, (name, shares) in enumerate(groups):
            colour = _SERIES[index % len(_SERIES)]
            marks.append(Patch(color=colour))
            for number, share in enumerate(shares):
                if share is not None:
                    note = f"{_NOTE}{name}: {100 * share:.1f} % from {edges[number]:.3g} to {edges[number + 1]:.3g}"
                    axes.bar(number + 0.03 + index * width, share, width, align="edge", color=colour, gid=note)
        _mark_chance(axes, chance)
        _legend(figure, marks, names)
        return _inline(figure, title, "chart")


def heat_map(title: str, values: Sequence[Sequence[float]]) -> Markup:
    """A square of signed values, first row at the bottom; orange is positive, blue negative, pale is near zero."""
    from matplotlib.colors import to_rgba

    largest = max(abs(value) for row in values for value in row) or 1.0
    with _style():
        figure = new_figure(200 / 72, 200 / 72, layout=None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        strength = [[0.12 + 0.88 * min(1.0, abs(value) / largest) ** 0.6 for value in row] for row in values]
        colours = [[_POSITIVE if value > 0 else _NEGATIVE for value in row] for row in values]
        axes.pcolormesh([list(map(to_rgba, *rows)) for rows in zip(colours, strength, strict=True)])
        axes.plot([0.5], [0.5], "+", color=_INK, markersize=12, markeredgewidth=1.5, transform=axes.transAxes)
        return _inline(figure, title, "heat")


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure of this size in inches, made without pyplot: no window, no state between figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_png(figure: Figure, path: Path, *, dpi: int = 120) -> None:
    """Write a figure as a PNG, atomically.

    Args:
        figure: see `new_figure`.
        path: of the picture, in a folder that exists or is made.
        dpi: pixels per inch.
    """
    with staged(path.parent) as scratch:
        figure.savefig(scratch / path.name, format="png", dpi=dpi)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _chart(names: Sequence[str], x_label: str, *, top: float) -> tuple[Figure, Axes]:
    """A figure with room for a legend of these names, and axes whose vertical one goes from 0 to `top` percent."""
    from matplotlib.ticker import PercentFormatter

    legend = _LEGEND_ROW * sum(1 + name.count("\n") for name in names)
    height = HEIGHT + legend
    figure = new_figure(WIDTH / 72, height / 72, layout=None)
    below = _BOTTOM + legend
    size = (WIDTH - _LEFT - _RIGHT) / WIDTH, (HEIGHT - _TOP - _BOTTOM) / height
    axes = figure.add_axes((_LEFT / WIDTH, below / height, *size), facecolor="none")
    axes.set_ylim(0, top)
    axes.set_yticks([top * step / 4 for step in range(5)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=8, labelcolor=_QUIET)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label, color=_QUIET)
    return figure, axes


def _apart(ticks: Sequence[tuple[float, str]], limits: tuple[float, float]) -> list[tuple[float, str]]:
    """Ticks whose labels do not touch: those that would touch the next one are left out, never the last."""
    scale = (WIDTH - _LEFT - _RIGHT) / (limits[1] - limits[0])
    kept: list[tuple[float, str]] = []
    for x, label in reversed(ticks):
        if not kept or scale * (kept[-1][0] - x) >= 4 + 3.6 * (len(label) + len(kept[-1][1])):
            kept.append((x, label))
    return kept[::-1]


def _mark_chance(axes: Axes, chance: float | None) -> None:
    """A thin line at the share that guessing reaches."""
    if chance is not None and chance <= axes.get_ylim()[1]:
        note = f"{_NOTE}chance: {100 * chance:.1f} %"
        axes.axhline(chance, color=_QUIET, linewidth=1, linestyle=(0, (1, 3)), gid=note)
        axes.annotate("chance", (0, chance), (0, 3), "axes fraction", "offset points", color=_QUIET)


def _wrapped(name: str) -> str:
    """A name on as many lines as the legend needs for it."""
    return "\n".join(textwrap.wrap(name, _LEGEND_LETTERS, replace_whitespace=False)[:_LEGEND_MOST]) or name


def _legend(figure: Figure, marks: Sequence[Artist], names: Sequence[str]) -> None:
    """The names of the series below the chart, each next to its mark; none where there is one series."""
    if not names:
        return
    figure.legend(
        marks,
        names,
        loc="lower left",
        frameon=False,
        labelcolor=_QUIET,
        handlelength=2.6,
        borderaxespad=0,
        labelspacing=0.3,
    )


def _inline(figure: Figure, title: str, css_class: str) -> Markup:
    """A figure as SVG for a page: without ids, which would collide with another figure's, in the page's colours."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it is only measured here: the browser draws it
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = ElementTree.fromstring(_NOT_XML.sub("", file.getvalue()))
    shapes = {shape.get("id"): shape for defs in drawn.iter(f"{_SVG}defs") for shape in defs}
    root = ElementTree.Element("svg", {"class": css_class, "viewBox": drawn.get("viewBox", ""), "role": "img"})
    ElementTree.SubElement(root, "title").text = title
    root.extend(_for_page(drawn, shapes))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _for_page(parent: ElementTree.Element, shapes: Shapes) -> list[ElementTree.Element]:
    """What is inside an element of matplotlib's SVG, without ids: shapes that are referred to stand in the place."""
    return [_copied(child, shapes) for child in parent if child.tag.removeprefix(_SVG) not in ("metadata", "defs")]


def _copied(element: ElementTree.Element, shapes: Shapes) -> ElementTree.Element:
    kind = element.tag.removeprefix(_SVG)
    given = {key: value for key, value in element.items() if key not in ("id", "clip-path", _LINK)}
    if kind == "use":
        shape = shapes[element.get(_LINK, "").removeprefix("#")]
        kind, place = "path", f"translate({given.pop('x', 0)} {given.pop('y', 0)})"
        given = {**given, "d": shape.get("d", ""), "transform": place}
        given["style"] = f"{given.get('style', '')}; {shape.get('style', '')}"
    if "style" in given:
        for colour, variable in _VARIABLES.items():
            given["style"] = given["style"].replace(colour, f"var(--{variable}, {colour})")
    found = ElementTree.Element(kind, given)
    found.text = element.text
    note = element.get("id", "")
    if note.startswith(_NOTE):
        ElementTree.SubElement(found, "title").text = note.removeprefix(_NOTE)
    found.extend(_for_page(element, shapes))
    return found
