"""timm-fsr train: train a model by a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from timm_fsr.training.recipe import Recipe, parse_arguments, recipe_parser
from timm_fsr.training.trainer import train

DRY_RUN = "--dry-run"


def train_command(arguments: Sequence[str]) -> None:
    """`timm-fsr train`: train a model by a recipe, or with --dry-run say what that would take."""
    if any(argument in ("-h", "--help") for argument in arguments):
        parser = recipe_parser()
        parser.add_argument(
            DRY_RUN,
            action="store_true",
            help="build everything, time some steps, print what the run would take and write, and write nothing",
        )
        parser.print_help()
        return
    recipe = parse_arguments([argument for argument in arguments if argument != DRY_RUN])
    if DRY_RUN in arguments:
        _dry_run(recipe)
    else:
        train(recipe)


def _dry_run(recipe: Recipe) -> None:
    from timm_fsr.training.estimate import estimate

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    found = estimate(recipe, console)
    console.print(f"a dry run: nothing was trained or written\n{found}")
    console.print("The more uneven the load of this machine, the more the time can differ from this.")
