"""Progress: bars on a terminal and in a notebook, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

DRAW_EVERY = 0.5
"""Seconds between looks at what is shown, such as a loss, which may have to wait for the device."""

FIRST_LINE, LINE_EVERY = 10.0, 60.0
"""Seconds until the first plain line, and between those after it."""

_WINDOW = 60.0  # seconds that a rate is taken over
_SAMPLE = 0.25  # seconds between its samples

Item = TypeVar("Item")
Note = str | Callable[[], str]


def progress(
    items: Iterable[Item],
    total: int | None = None,
    description: str = "working",
    *,
    size: Callable[[Item], int] | None = None,
    console: Console | None = None,
) -> Iterator[Item]:
    """Go through `items` and show how far that is and how long it will take, on stderr.

    Args:
        items: what is worked on, one after the other.
        total: of what `size` counts; None: `len(items)`, or unknown.
        description: of the work, in a few words.
        size: how much an item counts, such as the images of a batch; None: each counts one.
        console: where to show it; None: stderr. A quiet one shows nothing.

    Yields:
        The items.
    """
    if total is None and size is None and isinstance(items, Sized):
        total = len(items)
    with bar(Console(stderr=True) if console is None else console, description, total) as show:
        done = 0
        for item in items:
            yield item
            done += 1 if size is None else size(item)
            show.update(done)


@contextmanager
def bar(console: Console, title: str, total: float | None, *, whole: str = "") -> Iterator[Bar]:
    """Show a bar while the block runs, which is gone afterwards; a plain line now and then where there is no terminal.

    A bar inside another one shows nothing: two would draw over each other.

    Args:
        console: where to show it; nothing is shown on a quiet one, as that of all processes but the first.
        title: of the part that the block begins with.
        total: of that part; 1 is shown in percent; None: unknown.
        whole: title of a second bar, for all parts together.
    """
    global _drawing
    view = _View()
    if not console.quiet and not _drawing:
        if console.is_jupyter:
            view = _Notebook(console, whole)
        elif console.is_terminal and not console.is_dumb_terminal:
            view = _Terminal(console, whole)
        else:
            view = _Lines(console, whole)
    before, _drawing = _drawing, True
    try:
        shown = Bar(view, title, total)
        with view:
            yield shown
    finally:
        _drawing = before


_drawing = False


class Rate:
    """How fast something has gone lately."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, seconds: float, done: float) -> None:
        """Note that `done` units are done at this time; both only grow."""
        if len(self._samples) > 1 and seconds - self._samples[-2][0] < _SAMPLE:
            self._samples[-1] = (seconds, done)
        else:
            self._samples.append((seconds, done))
        while len(self._samples) > 2 and seconds - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()

    @property
    def seconds_each(self) -> float | None:
        """Seconds for one unit; None while that is unknown."""
        if len(self._samples) < 2:
            return None
        (start, before), (end, done) = self._samples[0], self._samples[-1]
        return (end - start) / (done - before) if done > before else None


class Bar:
    """What a block shows while it runs: the part that it is in, and perhaps all parts together."""

    def __init__(self, view: _View, title: str, total: float | None) -> None:
        self._view = view
        self.begin(title, total)

    def begin(self, title: str, total: float | None, done: float = 0) -> None:
        """Begin another part, of which `done` of `total` are done already."""
        self._title, self._total, self._rate, self._looked = title, total, Rate(), -float("inf")
        self._rate.add(time.monotonic(), done)
        self._view.begin(title, total, done)

    def update(
        self,
        done: float,
        note: Note = "",
        *,
        counts: bool = True,
        left: float | None = None,
        whole: tuple[float, float | None] | None = None,
    ) -> None:
        """Tell how far the part is.

        Args:
            done: of the part's total.
            note: lines of text, the important first, as long ones are cut; a function is called only when it is shown,
                at most every half a second.
            counts: False if this was only looked up, as after a resumption, and says nothing of the speed.
            left: seconds that the part still takes; None: by its recent rate.
            whole: the share of all parts that is done, in [0, 1], and the seconds that are left, if known.
        """
        now = time.monotonic()
        if not counts:
            self._rate = Rate()
        self._rate.add(now, done)
        last = done == self._total
        if now < self._view.due or (now - self._looked < DRAW_EVERY and not last):
            return
        self._looked = now
        each = self._rate.seconds_each
        if left is None and each is not None and self._total is not None:
            left = each * (self._total - done)
        text = note() if callable(note) else note
        self._view.show(_State(self._title, self._total, done, text, left, whole, now))


def duration(seconds: float) -> str:
    """A time in two units at most: "45 s", "5 min 32 s", "3 h 05 min", "2 d 4 h"."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = whole // 60
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


@dataclass(frozen=True)
class _State:
    """How far a block is.

    Attributes:
        title: of its part.
        total: of the part; None: unknown.
        done: of the part.
        note: lines of text.
        left: seconds that the part still takes, if known.
        whole: the share of all parts that is done, and the seconds that are left of them.
        now: the time of all this.
    """

    title: str
    total: float | None
    done: float
    note: str
    left: float | None
    whole: tuple[float, float | None] | None
    now: float


class _View:
    """Where progress is shown; here: nowhere.

    Attributes:
        due: the time from which on there is something to show.
    """

    due = float("inf")

    def __enter__(self) -> None:
        """Begin to show."""

    def __exit__(self, *_: object) -> None:
        """Clear what is shown."""

    def begin(self, title: str, total: float | None, done: float) -> None:
        """Show a part that begins."""

    def show(self, state: _State) -> None:
        """Show how far the part is."""


class _Lines(_View):
    """A plain line now and then."""

    def __init__(self, console: Console, whole: str) -> None:
        self._console, self._whole = console, whole
        self.due = time.monotonic() + FIRST_LINE

    def show(self, state: _State) -> None:
        self.due = state.now + LINE_EVERY
        times = [] if state.left is None else [f"{duration(state.left)} left"]
        if state.whole is not None and state.whole[1] is not None:
            times.append(f"{self._whole}: {duration(state.whole[1])} left")
        parts = [f"{state.title}: {_count(state.done, state.total)}", *state.note.splitlines(), *times]
        self._console.print(", ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)


class _Terminal(_View):
    """Bars at the bottom of the terminal, redrawn by rich's own thread."""

    due = -float("inf")

    def __init__(self, console: Console, whole: str) -> None:
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=34)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.fields[count]}", justify="right", table_column=Column(no_wrap=True)),
            _Left(table_column=Column(no_wrap=True, min_width=16)),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=2,
            auto_refresh=not console.is_jupyter,
        )
        self._part = self._bars.add_task("", count="", due=None)
        self._all = self._bars.add_task(whole, total=1.0, count="", due=None) if whole else None

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, title: str, total: float | None, done: float) -> None:
        self._bars.tasks[0].total = total  # rich's own functions take None for "as before"
        self._bars.reset(self._part, description=title, count=_count(done, total), due=None)
        self._bars.update(self._part, completed=done)
        self._bars.note = ""

    def show(self, state: _State) -> None:
        count, due = _count(state.done, state.total), _due(state.now, state.left)
        self._bars.update(self._part, completed=state.done, count=count, due=due)
        if self._all is not None and state.whole is not None:
            share, left = state.whole
            due = _due(state.now, left)
            self._bars.update(self._all, completed=share, count=_count(share, 1), due=due)
        self._bars.note = state.note


class _Notebook(_Terminal):
    """The same bars in the output of a notebook's cell, which needs no widgets."""

    _handle: Any = None

    def __enter__(self) -> None:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

        self._handle = display(self._bars, display_id=True)

    def __exit__(self, *_: object) -> None:
        self._handle.update(Text(""))

    def begin(self, title: str, total: float | None, done: float) -> None:
        super().begin(title, total, done)
        if self._handle is not None:
            self._handle.update(self._bars)

    def show(self, state: _State) -> None:
        super().show(state)
        self._handle.update(self._bars)


class _Bars(Progress):
    """Bars, and below them lines of text that never take their place."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Override of rich's own."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim", no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """The time that is left, counted down between updates; until it is known, the time since the beginning."""

    def render(self, task: Task) -> Text:
        """Override of rich's own."""
        due = task.fields["due"]
        if due is None:
            return Text(f"for {duration(task.elapsed)}" if task.elapsed else "", style="dim")
        left = due - time.monotonic()
        return Text(f"{duration(left)} left" if left >= 0.5 else "soon")


def _due(now: float, left: float | None) -> float | None:
    return None if left is None else now + left


def _count(done: float, total: float | None) -> str:
    if total == 1:
        return f"{100 * done:.0f} %"
    return f"{done:.0f}" if total is None else f"{int(done)}/{total:.0f}"
