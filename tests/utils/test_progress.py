"""Progress: a bar on a terminal, a plain line now and then elsewhere, nothing where one is to be quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import timm_fsr.utils.progress
from timm_fsr.utils.progress import LINE_EVERY, bar


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the lines go by; does not run by itself."""
    clock = Clock()
    monkeypatch.setattr(timm_fsr.utils.progress, "time", clock)
    return clock


def shown(console: Console, file: io.StringIO) -> str:
    with bar(console, "epoch 1/2", 20) as show:
        show(5, "adversarial 2.303")
        show(20, "adversarial 1.234")
    return file.getvalue()


def at(clock: Clock, *seconds: float, quiet: bool = False) -> list[str]:
    """The lines of a file that is told of a step at each of these times since the start."""
    file = io.StringIO()
    start = clock.now
    with bar(Console(file=file, quiet=quiet, soft_wrap=True), "epoch 1/2", 20) as show:
        for step, passed in enumerate(seconds, start=1):
            clock.now = start + passed
            show(step, f"adversarial {passed:.1f}")
    return file.getvalue().splitlines()


class TestTerminal:
    def test_it_shows_title_steps_and_text(self):
        file = io.StringIO()
        text = shown(Console(file=file, force_terminal=True, width=120), file)
        for part in ("epoch 1/2", "20/20", "adversarial 1.234"):
            assert part in text

    def test_it_prints_no_lines_besides(self, clock, monkeypatch):
        monkeypatch.setattr(timm_fsr.utils.progress, "LINE_EVERY", 0.0)
        file = io.StringIO()
        assert "epoch 1/2: 5/20" not in shown(Console(file=file, force_terminal=True, width=120), file)


class TestFile:
    def test_a_short_block_shows_nothing(self, clock):
        assert at(clock, 0.0, LINE_EVERY / 2, LINE_EVERY - 0.1) == []

    def test_a_line_comes_once_the_time_has_passed(self, clock):
        assert at(clock, 1.0, LINE_EVERY, LINE_EVERY + 1) == [f"epoch 1/2: 2/20, adversarial {LINE_EVERY:.1f}"]

    def test_and_again_only_after_the_same_time(self, clock):
        times = (0.5, 1.5, 1.9, 2.4, 2.6, 9.0, 9.9)
        lines = at(clock, *(part * LINE_EVERY for part in times))
        assert [line.split(",")[0] for line in lines] == ["epoch 1/2: 2/20", "epoch 1/2: 5/20", "epoch 1/2: 6/20"]

    def test_it_is_a_minute(self):
        assert LINE_EVERY == 60

    def test_lines_are_as_many_as_the_constant_allows(self, monkeypatch):
        monkeypatch.setattr(timm_fsr.utils.progress, "LINE_EVERY", 0.0)
        file = io.StringIO()
        lines = shown(Console(file=file), file).splitlines()
        assert lines == ["epoch 1/2: 5/20, adversarial 2.303", "epoch 1/2: 20/20, adversarial 1.234"]


class TestQuiet:
    @pytest.mark.parametrize("options", [{"force_terminal": False}, {"force_terminal": True}])
    def test_nothing_is_shown(self, options, monkeypatch):
        """On all processes but the first."""
        monkeypatch.setattr(timm_fsr.utils.progress, "LINE_EVERY", 0.0)
        file = io.StringIO()
        assert not shown(Console(file=file, quiet=True, **options), file).strip()
