"""timm-fsr train: train a model by a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from timm_fsr.training.recipe import parse_arguments, recipe_parser
from timm_fsr.training.trainer import train


def train_command(arguments: Sequence[str]) -> None:
    """`timm-fsr train`: train a model by a recipe."""
    if any(argument in ("-h", "--help") for argument in arguments):
        recipe_parser().print_help()
        return
    train(parse_arguments(arguments))
