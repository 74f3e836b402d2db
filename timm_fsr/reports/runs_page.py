"""A table of runs, as text for a terminal and as a page with the learning curves laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from timm_fsr.reports.charts import Line, line_chart

Cell = str | float | int | None

MOST_CURVES = 16  # more could not be told apart
_DROPPED = ("held_out.clean", "test.clean", "seconds")  # in this order where a terminal is too narrow
_KEPT = ("run", "held_out.robust", "test.worst", "state")
_LONGEST = 28  # characters of a cell in a terminal


@dataclass(frozen=True)
class Column:
    """One column of a table of runs.

    Attributes:
        key: of its values in the rows.
        head: its group ("" for none) and its heading.
        kind: "text", "recipe" (a value of a recipe), "share" (in [0, 1], shown in percent) or "time" (in seconds).
    """

    key: str
    head: tuple[str, str]
    kind: Literal["text", "recipe", "share", "time"]

    def show(self, value: Cell) -> str:
        """A value as people read it."""
        if value is None:
            return ""
        if self.kind == "share":
            return f"{100 * float(value):.1f}"
        if self.kind == "time":
            return _duration(float(value))
        return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Table:
    """Runs side by side.

    Attributes:
        columns: from left to right.
        rows: values by the columns' keys.
        notes: sentences for below the table.
    """

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    notes: tuple[str, ...] = ()

    def sorted_by(self, column: Column, *, reverse: bool = False) -> Table:
        """The rows by a column: the best share first, else in rising order; rows without a value come last."""
        known = [row for row in self.rows if row.get(column.key) is not None]
        known.sort(key=lambda row: _order(row[column.key]), reverse=(column.kind == "share") != reverse)
        return replace(self, rows=[*known, *(row for row in self.rows if row.get(column.key) is None)])

    def to_text(self, width: int = 80) -> str:
        """The table for a terminal of this many characters; columns that find no room are named below."""
        columns, dropped = list(self.columns), list[Column]()
        attacks = [column.key for column in columns if column.key.startswith("test.") and column.key not in _KEPT]
        order = [*(key for key in attacks if key not in _DROPPED), *_DROPPED]
        order += [column.key for column in reversed(columns) if column.kind == "recipe"]
        for key in order:
            if len(_lines(columns, self.rows)[0]) <= width:
                break
            if key not in _KEPT:
                dropped += [column for column in columns if column.key == key]
                columns = [column for column in columns if column.key != key]
        lines = [line[:width].rstrip() for line in _lines(columns, self.rows)]
        notes = ["accuracies in %", *self.notes] if any(c.kind == "share" for c in columns) else list(self.notes)
        if dropped:
            names = ", ".join(" ".join(filter(None, column.head)) for column in dropped)
            notes.append(f"no room for {names}: --csv and --page have all")
        return "\n".join([*lines, *notes])


def render_runs_page(table: Table, curves: Mapping[str, Sequence[Line]], *, title: str, chance: float | None) -> str:
    """One HTML file that needs no other: the table, which a click sorts, and learning curves over each other.

    Args:
        table: its first rows give the curves that are drawn, if there are too many to tell apart.
        curves: by what they show, one line for each run, of accuracies over epochs.
        title: of the page.
        chance: the accuracy of guessing.
    """
    environment = Environment(
        loader=PackageLoader("timm_fsr.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [str(row["run"]) for row in table.rows[:MOST_CURVES]]
    charts = []
    for what, lines in curves.items():
        chosen = sorted((line for line in lines if line.name in drawn), key=lambda line: drawn.index(line.name))
        if chosen:
            charts.append({"title": what, "chart": _curves(what, chosen, chance)})
    return environment.get_template("runs.html").render(
        title=title,
        columns=table.columns,
        rows=[
            [{"text": column.show(row.get(column.key)), "value": row.get(column.key)} for column in table.columns]
            for row in table.rows
        ],
        notes=table.notes,
        charts=charts,
        left_out=len(table.rows) - len(drawn),
    )


def _curves(title: str, lines: Sequence[Line], chance: float | None) -> Markup:
    last = int(max(max(line.x) for line in lines))
    step = max(1, last // 10)
    ticks = [(float(epoch), str(epoch)) for epoch in sorted({1, *range(step, last + 1, step), last})]
    return line_chart(title, lines, ticks, "epoch", chance=chance)


def _lines(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Two lines of headings and one for each row; numbers to the right."""
    cells = [[_fitted(column.show(row.get(column.key))) for column in columns] for row in rows]
    heads = [[column.head[part] for column in columns] for part in (0, 1)]
    for place in range(len(columns) - 1, 0, -1):  # a group is named once
        if heads[0][place] == heads[0][place - 1]:
            heads[0][place] = ""
    widths = [
        max(len(line[place]) for line in [heads[1], *cells, *([heads[0]] if heads[0][place] else [])])
        for place in range(len(columns))
    ]
    left = [column.kind == "text" for column in columns]
    return [
        "  ".join(
            text.ljust(width) if flush else text.rjust(width)
            for text, width, flush in zip(line, widths, left, strict=True)
        )
        for line in [*heads, *cells]
    ]


def _fitted(text: str) -> str:
    """A long text without its middle: names differ at their ends."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def _order(value: Cell) -> tuple[bool, float, str]:
    """Numbers by size, then texts by letter."""
    return (False, float(value), "") if isinstance(value, (int, float)) else (True, 0.0, str(value))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
