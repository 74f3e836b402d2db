"""Progress: bars on a terminal and in a notebook, a plain line now and then elsewhere, nothing where it is quiet."""

from __future__ import annotations

import io
import re
import sys
import types
from typing import Any

import pytest
from rich.console import Console

import timm_fsr.utils.progress
from timm_fsr.utils.progress import FIRST_LINE, LINE_EVERY, Rate, bar, duration, progress


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What progress goes by; does not run by itself."""
    clock = Clock()
    monkeypatch.setattr(timm_fsr.utils.progress, "time", clock)
    return clock


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, color_system=None), file


def at(clock: Clock, *seconds: float, quiet: bool = False) -> list[str]:
    """The lines of a file that is told of a step at each of these times since the start."""
    file = io.StringIO()
    start = clock.now
    with bar(Console(file=file, quiet=quiet, soft_wrap=True), "epoch 1/2", 20) as show:
        for step, passed in enumerate(seconds, start=1):
            clock.now = start + passed
            show.update(step, f"loss {passed:.1f}")
    return file.getvalue().splitlines()


class TestTerminal:
    def test_bar_times_and_text_fit_80_columns(self, clock):
        console, file = terminal()
        text = "1,234 images/s, loss 1.234, " + "a long text " * 20
        with bar(console, "epoch 100/100", 1000, whole="all 100 epochs") as show:
            clock.now += 10
            show.update(250, text, whole=(0.42, 4321.0))
        lines = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]|\r", "\n", file.getvalue()).splitlines()
        rows = [row for row in lines if "250/1000" in row]
        assert rows
        assert max(len(row) for row in lines) <= 80
        assert rows[-1].count("━") + rows[-1].count("╸") > 8  # the text is on a line of its own
        assert rows[-1].rstrip().endswith("30 s left")
        for part in ("all 100 epochs", "42 %", "1 h 12 min left", "1,234 images/s, loss 1.234", "…"):
            assert part in file.getvalue()

    def test_a_title_of_any_length_leaves_the_bar_its_place(self, clock):
        console, file = terminal()
        with bar(console, "a very long title " * 10, 10000) as show:
            show.update(10000)
        assert all(row.count("━") >= 8 for row in file.getvalue().splitlines() if "10000/10000" in row)

    def test_what_is_shown_is_looked_at_by_time(self, clock):
        console, _ = terminal()
        looks = []

        def look() -> str:
            looks.append(clock.now)
            return "loss"

        with bar(console, "epoch", 1000) as show:
            for step in range(1, 101):
                clock.now += 0.1
                show.update(step, look)
        assert len(looks) == pytest.approx(20, abs=2)

    def test_a_bar_inside_another_is_not_shown(self):
        console, file = terminal()
        with bar(console, "outer", 2), bar(console, "inner", 2) as show:
            show.update(1)
        assert "inner" not in file.getvalue()

    def test_it_is_shown_again_after_an_error(self):
        console, file = terminal()
        with pytest.raises(RuntimeError), bar(console, "first", 2):
            raise RuntimeError
        with bar(console, "second", 2):
            pass
        assert "second" in file.getvalue()

    def test_another_part_may_have_no_total(self):
        console, file = terminal()
        with bar(console, "first", 2) as show:
            show.begin("second", None)
            show.update(7)
        assert "second" in file.getvalue()
        assert "7/" not in file.getvalue()


class TestFile:
    def test_a_short_block_shows_nothing(self, clock):
        assert at(clock, 0.0, FIRST_LINE - 0.1) == []

    def test_the_first_line_comes_soon_and_says_how_long(self, clock):
        assert at(clock, 5.0, 10.0) == ["epoch 1/2: 2/20, loss 10.0, 1 min 30 s left"]

    def test_the_others_come_every_minute(self, clock):
        lines = at(clock, *(5.0 * step for step in range(1, 20)))
        assert [line.split(",")[0] for line in lines] == ["epoch 1/2: 2/20", "epoch 1/2: 14/20"]
        assert LINE_EVERY == 60

    def test_what_a_line_says_is_looked_at_only_then(self, clock):
        with bar(Console(file=io.StringIO()), "epoch", 2) as show:
            show.update(1, lambda: pytest.fail("nothing is shown"))

    def test_lines_go_on_over_parts(self, clock):
        """Many short parts would say nothing otherwise."""
        file = io.StringIO()
        with bar(Console(file=file, soft_wrap=True), "", 2, whole="all epochs") as show:
            for epoch in range(8):
                show.begin(f"epoch {epoch}", 2)
                clock.now += 2
                show.update(1, whole=(0.5, 12.0))
        assert file.getvalue().splitlines() == ["epoch 4: 1/2, 2 s left, all epochs: 12 s left"]


class TestQuiet:
    @pytest.mark.parametrize("options", [{"force_terminal": False}, {"force_terminal": True}])
    def test_nothing_is_shown(self, options, clock):
        """On all processes but the first."""
        file = io.StringIO()
        with bar(Console(file=file, quiet=True, **options), "epoch", 20) as show:
            clock.now += 100
            show.update(1, lambda: pytest.fail("nothing is shown"))
        assert file.getvalue() == ""


class TestNotebook:
    def test_the_cell_shows_one_bar_that_is_updated(self, clock, monkeypatch):
        shown: list[Any] = []

        class Handle:
            def update(self, what: Any) -> None:
                bundle = what._repr_mimebundle_([], [])
                shown.append(bundle["text/plain"])

        module = types.ModuleType("IPython.display")
        module.display = lambda what, display_id: Handle()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        with bar(Console(force_jupyter=True), "predicting", 20) as show:
            clock.now += 1
            show.update(5, "a note")
        for part in ("predicting", "5/20", "a note"):
            assert part in shown[-2]
        assert not shown[-1].strip()


class TestProgress:
    def test_it_gives_the_items(self):
        assert list(progress([1, 2, 3], console=Console(quiet=True))) == [1, 2, 3]

    def test_items_may_count_more_than_one(self, clock):
        file = io.StringIO()
        for _ in progress(([0] * 4 for _ in range(5)), 20, "predicting", size=len, console=Console(file=file)):
            clock.now += 6
        assert file.getvalue().splitlines() == ["predicting: 8/20, 18 s left"]

    def test_a_total_may_be_unknown(self, clock):
        file = io.StringIO()
        for _ in progress(iter("abc"), console=Console(file=file)):
            clock.now += 6
        assert file.getvalue().splitlines() == ["working: 2"]


class TestRate:
    def test_it_is_that_of_the_last_minute(self):
        rate = Rate()
        for second in range(200):
            rate.add(second, min(second, 100) + max(0, second - 100) / 10)
        assert rate.seconds_each == pytest.approx(10)

    def test_it_is_known_of_units_that_take_longer(self):
        rate = Rate()
        for unit in range(3):
            rate.add(500.0 * unit, unit)
        assert rate.seconds_each == 500

    def test_it_is_unknown_before_anything_is_done(self):
        rate = Rate()
        rate.add(0.0, 0)
        assert rate.seconds_each is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (332, "5 min 32 s"),
        (3599.7, "1 h 00 min"),
        (50 * 3600, "2 d 2 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
