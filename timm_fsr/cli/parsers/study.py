"""Flags that the commands over several trainings share; what they do not know are flags of the recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_fsr.cli.help import IMPORT_HELP, CommandParser

_RECIPE_FLAGS = "Further flags are the recipe's, as for `timm-fsr train`: --optim.epochs=12"


class StudyParser(CommandParser):
    """--config, --output and --minutes, and whatever the recipe knows.

    Args:
        command: its name.
        description: paragraphs.
        examples: see `CommandParser`.
    """

    def __init__(self, command: str, *, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            command,
            usage=f"timm-fsr {command} --config RECIPE [FLAGS] [--KEY=VALUE ...]",
            description=f"{description}\n\n{_RECIPE_FLAGS}",
            examples=examples,
            allow_abbrev=False,  # else --seed would be taken for --seeds, and --attack for --attacks
        )
        self.add_argument(
            "--config",
            action="append",
            required=True,
            metavar="RECIPE",
            help="the recipe that all trainings have in common",
        )
        self.add_argument("--output", type=Path, metavar="FOLDER", help="of the results (default: the recipe's)")
        self.add_argument("--minutes", type=float, help="stop after this time, to go on later (default: no limit)")
        self.add_argument("--import", metavar="FILE", help=IMPORT_HELP)

    def read(self, arguments: Sequence[str]) -> Any:
        """The options; their `others` are flags of the recipe, and their `given` is all, to tell how to go on."""
        own, imports = [], []
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "--import" and rest:
                imports += [argument, rest.pop(0)]
            elif argument.startswith("--import="):
                imports.append(argument)
            else:
                own.append(argument)
        options, others = self.parse_known_args(own)
        options.others, options.given = [*others, *imports], list(arguments)
        return options


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is compared."""
    parser.add_argument("--methods", nargs="+", help="what is compared (default: none and every layer)")
    parser.add_argument("--places", nargs="+", default=["own"], choices=("own", "same"), help="of the layers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="each method is trained with each")
    parser.add_argument("--images", type=int, default=1000, help="balanced test images that are attacked")
    parser.add_argument("--attacks", nargs="*", default=["pgd20", "standard", "adaptive"], help="on every model")
    parser.add_argument("--against", nargs="+", default=["none"], help="methods that each model is set against")
    parser.add_argument("--part", default="1/1", help="do only this share of the models, such as 1/2")
    parser.add_argument("--device", help="to attack on (default: cuda if there is one, else cpu)")
