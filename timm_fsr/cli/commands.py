"""The commands: a new one is one line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from timm_fsr.cli.help import CommandParser


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        group: heading in the list of commands.
        module: `timm_fsr.cli.parsers.<module>` has a function `<command>_parser` that makes its `CommandParser`, and
            imports nothing heavy, as help, completion and errors in flags need it alone; `timm_fsr.cli.<module>` has a
            function `<command>_command`, which takes what the parser's `read` returns.
        about: one line of help.
        has_recipe: it reads a recipe, which remembers what `--import` names: its parser sees that flag.
    """

    group: str
    module: str
    about: str
    has_recipe: bool = False


_TRAIN, _STUDY, _MODELS, _SHELL = "train and judge", "several trainings", "recipes and models", "shell"

COMMANDS = {
    "train": Command(_TRAIN, "train", "train a model adversarially by a recipe", has_recipe=True),
    "evaluate": Command(_TRAIN, "evaluate", "attack a model: robust accuracy, and the evidence for it"),
    "predict": Command(_TRAIN, "predict", "ask a model about images: classes, masks, smallest eps"),
    "report": Command(_TRAIN, "report", "one page from the reports of one or several models"),
    "demo": Command(_TRAIN, "demo", "train with and without FSR on embedded images, and compare"),
    "runs": Command(_STUDY, "runs", "a table of runs, and one page with their learning curves"),
    "sweep": Command(_STUDY, "sweep", "train each value of a grid, or search for the best", has_recipe=True),
    "compare": Command(_STUDY, "compare", "each feature layer at an equal budget", has_recipe=True),
    "release": Command(_STUDY, "release", "robust checkpoints, ready for the Hub", has_recipe=True),
    "recipes": Command(_MODELS, "recipes", "list the recipes, print one or copy it"),
    "models": Command(_MODELS, "hub", "list the robust checkpoints that timm knows by name"),
    "convert": Command(_MODELS, "hub", "bring weights of other code into timm's format"),
    "export": Command(_MODELS, "export", "write a model as model.pt2 or model.onnx, without timm"),
    "card": Command(_MODELS, "hub", "write the model card of a saved model"),
    "push": Command(_MODELS, "hub", "publish a saved model on the Hub in one commit"),
    "completion": Command(_SHELL, "completion", "print a script that completes commands and flags"),
}


def make_parser(command: str) -> CommandParser:
    """The flags of a command, for help and to read its arguments with."""
    module = import_module(f"timm_fsr.cli.parsers.{COMMANDS[command].module}")
    made: CommandParser = getattr(module, f"{command}_parser")()
    return made


def start(command: str, options: Any) -> None:
    """Do what a command does with what was read; this imports what it needs."""
    module = import_module(f"timm_fsr.cli.{COMMANDS[command].module}")
    getattr(module, f"{command}_command")(options)
