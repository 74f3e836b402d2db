"""timm-fsr train: train a model by a recipe."""

from __future__ import annotations

from rich.console import Console

from timm_fsr.cli.parsers.train import Asked
from timm_fsr.training.estimate import estimate
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train


def train_command(asked: Asked) -> None:
    """`timm-fsr train`: train a model by a recipe, or with --dry-run say what that would take."""
    if asked.dry_run:
        _dry_run(asked.recipe)
    else:
        train(asked.recipe)


def _dry_run(recipe: Recipe) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    found = estimate(recipe, console)
    console.print(f"a dry run: nothing was trained or written\n{found}")
    console.print("The more uneven the load of this machine, the more the time can differ from this.")
