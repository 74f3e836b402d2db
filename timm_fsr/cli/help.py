"""Help texts of 80 columns with every default and with examples, and messages that name the nearest flag."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from timm_fsr.utils.errors import unknown

IMPORT_HELP = "a Python file or module that registers layers, objectives, attacks or suites; may be given several times"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the width, keeps indented lines, and ends each option's help with its default.

    A help text that has the word "default" says it itself, as it must where the default is None.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **settings})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (
            part if part.startswith("  ") or "\n  " in part else textwrap.fill(part, width)
            for part in text.split("\n\n")
        )
        return textwrap.indent("\n\n".join(lines), indent)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else super()._get_default_metavar_for_optional(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default == argparse.SUPPRESS or action.required or "default" in text:
            return text
        return f"{text} (default: {_shown(action.default)})".strip()


class CommandParser(argparse.ArgumentParser):
    """The flags of one command.

    Args:
        command: its name.
        description: paragraphs; lines that begin with two spaces stay as they are.
        examples: commands without "timm-fsr", of at most 69 characters each.
    """

    def __init__(self, command: str, *, description: str, examples: Sequence[str] = (), **settings: Any) -> None:
        self.examples = tuple(examples)
        lines = "\n".join(f"  timm-fsr {example}" for example in examples)
        super().__init__(
            prog=f"timm-fsr {command}",
            description=description,
            epilog=f"examples:\n{lines}" if examples else None,
            formatter_class=HelpFormatter,
            **settings,
        )

    def read(self, arguments: Sequence[str]) -> Any:
        """What the command needs to know; exits with a message, or after help, like `parse_args`."""
        options, others = self.parse_known_args(list(arguments))
        if others:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            flag = others[0].partition("=")[0]
            self.error(unknown("flag", flag, flags) if flag.startswith("-") else f"{flag!r} is one argument too many")
        return options

    def add_import(self) -> None:
        """Show the flag `--import`, which is taken out of the arguments before they come here."""
        self.add_argument("--import", metavar="FILE", help=IMPORT_HELP)

    def error(self, message: str) -> NoReturn:
        """Print one line of usage and what is wrong, and exit with status 2."""
        self.exit(2, f"usage: {self.prog} ...; `{self.prog} --help` shows all\n{self.prog}: error: {message}\n")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).replace("%", "%%")
