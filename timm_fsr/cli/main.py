"""The command line: timm-fsr COMMAND."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from timm_fsr.cli.compare import compare_command
from timm_fsr.cli.demo import demo_command
from timm_fsr.cli.evaluate import evaluate_command
from timm_fsr.cli.extensions import import_given
from timm_fsr.cli.hub import card_command, convert_command, models_command, push_command
from timm_fsr.cli.release import release_command
from timm_fsr.cli.report import report_command
from timm_fsr.cli.runs import runs_command
from timm_fsr.cli.sweep import sweep_command
from timm_fsr.cli.train import train_command
from timm_fsr.training.step import InterruptedRunError
from timm_fsr.utils.errors import UnsoundError
from timm_fsr.version import __version__

Command = Callable[[Sequence[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 2 after printing what was wrong with the input, 130 after Ctrl-C, or 143 after a SIGTERM, as shells say it; a
        training saves first. 75 if something is left to do of several trainings, as their time was up.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:10}{about}" for name, (_, about) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="timm-fsr",
        usage="timm-fsr COMMAND ...",
        description=f"{listing}\n\n`timm-fsr COMMAND --help` tells more. `--import FILE_OR_MODULE`, with any command,\n"
        "imports code of your own that registers layers, objectives, attacks or suites.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timm_fsr {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the above")
    command = parser.parse_args(given[:1]).command
    try:
        rest = import_given(given[1:])
        _COMMANDS[command][0](given[1:] if command in _WITH_RECIPE else rest)  # a recipe remembers what it needs
    except InterruptedRunError as stopped:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: {stopped}", markup=False)
        return stopped.status
    except KeyboardInterrupt:
        text = f"timm-fsr {command}: interrupted; what was written so far is whole"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError, UnsoundError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: error: {error}", markup=False)
        return 2
    return 0


_COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train_command, "train a model adversarially by a recipe"),
    "evaluate": (evaluate_command, "attack a model: robust accuracy, and the evidence for it"),
    "report": (report_command, "one page from the reports of one model, or of several side by side"),
    "runs": (runs_command, "a table of training runs, and one page with their learning curves"),
    "sweep": (sweep_command, "train a recipe with each value of a grid, or search for the best"),
    "compare": (compare_command, "train and attack a network with each feature layer at an equal budget"),
    "release": (release_command, "train, attack, round and pack robust checkpoints, ready for the Hub"),
    "models": (models_command, "list the robust checkpoints that timm knows by name"),
    "card": (card_command, "write the model card of a saved model"),
    "push": (push_command, "publish a saved model on the Hub in one commit"),
    "convert": (convert_command, "bring weights of other code into timm's format"),
    "demo": (demo_command, "train with and without FSR on embedded images, and compare"),
}

_WITH_RECIPE = ("train", "sweep", "compare", "release")
