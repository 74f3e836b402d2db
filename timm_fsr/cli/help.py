"""Help texts that show the default of every option."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description as it is written, and ends each option's help with its default.

    A help text that has the word "default" says it itself, as it must where the default is None.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default == argparse.SUPPRESS or action.required or "default" in text:
            return text
        return f"{text} (default: {_shown(action.default)})".strip()


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).replace("%", "%%")
