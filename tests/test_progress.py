"""Progress bars: on a terminal, nowhere else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from timm_fsr.progress import bar


def shown(console: Console, file: io.StringIO) -> str:
    with bar(console, "epoch 1/2", 20) as show:
        show(5, "adversarial 2.303")
        show(20, "adversarial 1.234")
    return file.getvalue()


def test_on_a_terminal_it_shows_title_steps_and_text():
    file = io.StringIO()
    text = shown(Console(file=file, force_terminal=True, width=120), file)
    for part in ("epoch 1/2", "20/20", "adversarial 1.234"):
        assert part in text


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"force_terminal": True, "quiet": True}])
def test_in_a_file_and_on_other_processes_it_shows_nothing(options):
    file = io.StringIO()
    assert not shown(Console(file=file, **options), file).strip()
