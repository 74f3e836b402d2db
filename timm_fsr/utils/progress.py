"""Progress: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 60.0
"""Seconds between plain lines."""


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar while the block runs, which is gone afterwards; where there is no terminal, a line every minute.

    Yields:
        A function of (steps done, text beside the bar).
    """
    if console.quiet or not console.is_terminal:
        yield _plain_lines(console, title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _plain_lines(console: Console, title: str, total: int) -> Callable[[int, str], None]:
    last = time.monotonic()

    def show(done: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            console.print(f"{title}: {done}/{total}, {text}")

    return show
