"""The command line: timm-fsr train | evaluate | report | models | card | push | convert | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from timm_fsr.commands import evaluate_command, report_command
from timm_fsr.demo import run_demo
from timm_fsr.engine import InterruptedRunError, train
from timm_fsr.faults import UnsoundError
from timm_fsr.hub_commands import card_command, convert_command, models_command, push_command
from timm_fsr.recipe import parse_arguments, recipe_parser
from timm_fsr.version import __version__

Command = Callable[[Sequence[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 2 after printing what was wrong with the input, 130 after Ctrl-C, or 143 after a SIGTERM, as shells say it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:10}{about}" for name, (_, about) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="timm-fsr",
        usage="timm-fsr COMMAND ...",
        description=f"{listing}\n\n`timm-fsr COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timm_fsr {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the above")
    command = parser.parse_args(given[:1]).command
    try:
        _COMMANDS[command][0](given[1:])
    except InterruptedRunError as stopped:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: {stopped}", markup=False)
        return 143
    except KeyboardInterrupt:
        text = f"timm-fsr {command}: interrupted; what was written so far is whole"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError, UnsoundError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: error: {error}", markup=False)
        return 2
    return 0


def _train(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        recipe_parser().print_help()
        return
    train(parse_arguments(arguments))


def _demo(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="timm-fsr demo",
        description="Train a small network adversarially with and without FSR on embedded Fashion-MNIST, and compare.",
    )
    parser.add_argument("--output", default="timm_fsr_demo", help="folder of the results")
    parser.add_argument("--epochs", type=int, help="fewer or more than the default")
    parser.add_argument("--limit", type=int, help="use at most so many training and test images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run_demo(options.output, epochs=options.epochs, limit=options.limit, seed=options.seed)


_COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (_train, "train a model adversarially by a recipe"),
    "evaluate": (evaluate_command, "attack a model: robust accuracy, and the evidence for it"),
    "report": (report_command, "one page from the reports of one model, or of several side by side"),
    "models": (models_command, "list the robust checkpoints that timm knows by name"),
    "card": (card_command, "write the model card of a saved model"),
    "push": (push_command, "publish a saved model on the Hub in one commit"),
    "convert": (convert_command, "bring weights of other code into timm's format"),
    "demo": (_demo, "train with and without FSR on embedded images, and compare"),
}
