"""Lists for the terminal: a name, and what is to be said of it below, within the width."""

from __future__ import annotations

import shutil
import textwrap

_NARROWEST, _WIDEST = 40, 100


def listed(*texts: str) -> str:
    """The texts below each other, indented and filled to the terminal's width, or to 80 columns where there is none."""
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns))
    return "\n".join(
        textwrap.fill(text, width, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
        for text in texts
    )
