"""The flags of timm-fsr train: one for each key of a recipe, explained as the dataclasses explain their fields."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from timm_fsr.cli.help import IMPORT_HELP, CommandParser
from timm_fsr.cli.names import attack_names, layer_names, objective_names, training_attack_names
from timm_fsr.training.parsing import Number
from timm_fsr.training.recipe import Recipe, parse_arguments

USUAL = (
    "output",
    "resume",
    "overwrite",
    "seed",
    "mixed_precision",
    "model.name",
    "model.layer",
    "model.pretrained",
    "data.source",
    "data.size",
    "attack.name",
    "attack.eps",
    "attack.steps",
    "objective.name",
    "optim.optimizer",
    "optim.lr",
    "optim.epochs",
    "optim.batch_size",
    "evaluation.attacks",
    "evaluation.validate_every",
)
"""The keys that `--help` shows; `--help-all` shows every one."""

DRY_RUN = "--dry-run"

_DESCRIPTION = """Train a model adversarially by a recipe, and evaluate it.

A recipe is a YAML file, or the name of one that comes with the package (`timm-fsr recipes` lists them). Each of its
keys is a flag too, which wins over the file. The same command with --resume=true goes on with a run that was
stopped."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        recipe: to train by.
        dry_run: only say what that would take.
    """

    recipe: Recipe
    dry_run: bool


class TrainParser(CommandParser):
    """The flags of training; read by the recipe's own reader, of which this parser is the help.

    Args:
        full: whether to show every key.
    """

    def __init__(self, *, full: bool = False) -> None:
        super().__init__(
            "train",
            usage="timm-fsr train --config RECIPE [--KEY=VALUE ...]",
            description=_DESCRIPTION,
            add_help=False,
            examples=(
                "train --config fashion_mnist_quickstart",
                "train --config cifar10_resnet18 --data.source=FOLDER --seed=1",
                "train --config my_recipe.yaml --model.layer=null --output=runs/plain",
            ),
        )
        general = self.add_argument_group("recipe and run")
        general.add_argument("-h", "--help", action="help", help="show the usual keys and exit")
        general.add_argument("--help-all", action="store_true", help="show every key and exit (default: off)")
        general.add_argument(
            "--config",
            metavar="RECIPE",
            help="a YAML file or a name; of several, a later one wins, key by key (default: none)",
        )
        general.add_argument(
            DRY_RUN,
            action="store_true",
            help="build everything, time some steps, print what the run would take and write, and write nothing",
        )
        general.add_argument("--import", metavar="FILE", help=IMPORT_HELP)
        self._add_keys(Recipe, "", general, full)

    def read(self, arguments: Sequence[str]) -> Asked:
        """What is asked for. Prints help and exits where that is asked for, or where nothing is given.

        Raises:
            FileNotFoundError, ValueError: see `timm_fsr.training.recipe.Recipe.load`.
        """
        if "--help-all" in arguments:
            TrainParser(full=True).print_help()
            self.exit()
        if not arguments or {"-h", "--help"} & set(arguments):
            self.print_help(sys.stdout)
            self.exit(0 if arguments else 2)
        others = [argument for argument in arguments if argument != DRY_RUN]
        return Asked(parse_arguments(others), dry_run=len(others) < len(arguments))

    def _add_keys(self, options: type, prefix: str, group: Any, full: bool) -> None:
        """Add the fields of a dataclass, and a group of flags for each that is a dataclass itself."""
        kinds, texts, known = typing.get_type_hints(options), _attributes(options), _known()
        for entry in dataclasses.fields(options):
            key, kind = f"{prefix}{entry.name}", kinds[entry.name]
            if dataclasses.is_dataclass(kind):
                if not full and not any(usual.startswith(f"{key}.") for usual in USUAL):
                    continue
                section = self.add_argument_group(key, (inspect.getdoc(kind) or "").partition("\n")[0])
                self._add_keys(typing.cast(type, kind), f"{key}.", section, full)
            elif full or key in USUAL:
                names = f" Known: {', '.join(known[key]())}" if key in known else ""
                text = (texts[entry.name] + names).removesuffix(".")
                group.add_argument(
                    f"--{key}",
                    metavar=_metavar(kind),
                    help=f"{text} (default: {_default(entry)})".replace("%", "%%"),
                )


def train_parser() -> TrainParser:
    """The flags of `timm-fsr train`."""
    return TrainParser()


def _known() -> dict[str, Any]:
    """By key: what finds the names that may stand there."""
    return {
        "model.layer": layer_names,
        "objective.name": objective_names,
        "attack.name": training_attack_names,
        "evaluation.attacks": attack_names,
    }


def _attributes(options: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each of its fields, on one line each."""
    text = (inspect.getdoc(options) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", textwrap.dedent(text), re.MULTILINE)
    return {name: " ".join(about.split()) for name, about in entries}


def _metavar(kind: Any) -> str:
    """How a value of this type is called."""
    kinds = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, kinds)) + "}"
    if kind is bool:
        return "true|false"
    if typing.get_origin(kind) is dict:
        return "{KEY: VALUE}"
    if any(typing.get_origin(part) is list for part in (kind, *kinds)):
        return "[VALUE, ...]"
    if set(typing.get_args(Number)) & set(kinds):
        return "NUMBER"
    return "N" if int in kinds else "TEXT"


def _default(entry: dataclasses.Field[Any]) -> str:
    """A field's default as YAML would have it."""
    factory = entry.default_factory
    value = entry.default if factory is dataclasses.MISSING else factory()
    if isinstance(value, float):
        steps = value * 255  # of a pixel's value, as radii are written
        return f"{steps:.0f}/255" if steps and math.isclose(steps, round(steps)) else f"{value:.4g}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
