"""What an evaluation shows of itself: images done, the running upper bound, what runs next, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from timm_fsr.evaluation.evaluator import Standing
from timm_fsr.reports.report import WORST_CASE
from timm_fsr.utils.progress import Bar, bar


class EvaluationDisplay:
    """Bars for the attacks and for each later part of an assessment."""

    def __init__(self, show: Bar) -> None:
        self._show = show
        self._part = ""

    def attacked(self, now: Standing) -> None:
        """Tell of the attacks, as `timm_fsr.evaluate` calls its `progress`."""
        self._show.update(now.images + now.share * now.batch, lambda: describe(now), counts=now.fresh)

    def part(self, title: str, share: float) -> None:
        """Tell how much of a later part is done, in [0, 1]; `title` says what it is and, after a colon, what runs."""
        title, _, note = title.partition(": ")
        if title != self._part:
            self._part = title
            self._show.begin(title, 1)
        self._show.update(share, note)


def describe(now: Standing) -> str:
    """The running upper bound and what runs next; on a second line the accuracies so far."""
    bound = f"at most {100 * now.bound:.1f} % robust" + (f"; now {now.next}" if now.next else "")
    so_far = ", ".join(f"{name} {100 * share:.1f} %" for name, share in now.accuracies.items() if name != WORST_CASE)
    return f"{bound}\n{so_far}" if so_far else bound


@contextmanager
def evaluation_display(console: Console, images: int) -> Iterator[EvaluationDisplay]:
    """Show how far an evaluation is while the block runs.

    Args:
        console: where; nothing is shown on a quiet one.
        images: of this process.
    """
    with bar(console, "images attacked", images) as show:
        yield EvaluationDisplay(show)
