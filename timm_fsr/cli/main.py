"""The command line: timm-fsr COMMAND."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from timm_fsr.cli.demo import demo_command
from timm_fsr.cli.evaluate import evaluate_command
from timm_fsr.cli.extensions import import_given
from timm_fsr.cli.failures import DEBUG_HELP, reported, without_debug
from timm_fsr.cli.hub import card_command, convert_command, models_command, push_command
from timm_fsr.cli.runs import report_command
from timm_fsr.cli.train import train_command
from timm_fsr.version import __version__

Command = Callable[[Sequence[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status, as `timm_fsr.cli.failures.reported` describes it.
    """
    given, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:10}{about}" for name, (_, about) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="timm-fsr",
        usage="timm-fsr COMMAND ...",
        description=f"{listing}\n\n`timm-fsr COMMAND --help` tells more. `--import FILE_OR_MODULE`, with any command,\n"
        f"imports code of your own that registers layers, objectives, attacks or suites. {DEBUG_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timm_fsr {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the above")
    command = parser.parse_args(given[:1]).command
    return reported(command, lambda: _run(command, given[1:]), given[1:], debug=debug)


def _run(command: str, arguments: Sequence[str]) -> None:
    others = import_given(arguments)
    _COMMANDS[command][0](arguments if command == "train" else others)  # a recipe remembers what it needs


_COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train_command, "train a model adversarially by a recipe"),
    "evaluate": (evaluate_command, "attack a model: robust accuracy, and the evidence for it"),
    "report": (report_command, "one page from the reports of one model, or of several side by side"),
    "models": (models_command, "list the robust checkpoints that timm knows by name"),
    "card": (card_command, "write the model card of a saved model"),
    "push": (push_command, "publish a saved model on the Hub in one commit"),
    "convert": (convert_command, "bring weights of other code into timm's format"),
    "demo": (demo_command, "train with and without FSR on embedded images, and compare"),
}
