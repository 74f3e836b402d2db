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

Command = Callable[[Sequence[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 2 after printing what was wrong with the input, 130 after Ctrl-C, or 143 after a SIGTERM, as shells say it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="timm-fsr", description=__doc__)
    parser.add_argument("command", choices=list(_COMMANDS), help="see `timm-fsr COMMAND --help`")
    command = parser.parse_args(given[:1]).command
    try:
        _COMMANDS[command](given[1:])
    except InterruptedRunError as stopped:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: {stopped}", markup=False)
        return 143
    except KeyboardInterrupt:
        text = f"timm-fsr {command}: interrupted; what was written so far is whole"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
        return 130
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, UnsoundError) as error:
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


_COMMANDS: dict[str, Command] = {
    "train": _train,
    "evaluate": evaluate_command,
    "report": report_command,
    "models": models_command,
    "card": card_command,
    "push": push_command,
    "convert": convert_command,
    "demo": _demo,
}
