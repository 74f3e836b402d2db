"""What the commands over several trainings share: a base recipe, an output folder, a time limit."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm_fsr.cli.help import HelpFormatter

if TYPE_CHECKING:
    from timm_fsr.training.recipe import Recipe


def study_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with --config, --output and --minutes; what it does not know are flags of the recipe."""
    parser = argparse.ArgumentParser(
        prog=f"timm-fsr {command}",
        description=f"{description}\n\nFurther flags are the recipe's, as for `timm-fsr train`: --optim.epochs=12",
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # else --seed would be taken for --seeds, and --attack for --attacks
    )
    parser.add_argument("--config", action="append", required=True, help="the recipe that all trainings have in common")
    parser.add_argument("--output", type=Path, help="folder of the results (default: the recipe's)")
    parser.add_argument("--minutes", type=float, help="stop after this time, to go on later (default: no limit)")
    return parser


def read_base(options: argparse.Namespace, others: Sequence[str], decided: dict[str, str]) -> Recipe:
    """The recipe that the flags describe; what it imports is imported.

    Args:
        options: by a `study_parser`.
        others: flags that it left.
        decided: keys that the study sets itself, and the flag to use instead.

    Raises:
        ValueError: such a key was given, or the recipe cannot be read.
    """
    from timm_fsr.training.recipe import Recipe
    from timm_fsr.utils.registry import import_extension

    for key, flag in decided.items():
        if any(other.partition("=")[0] == f"--{key}" for other in others):
            raise ValueError(f"--{key} differs from training to training here; use {flag}")
    recipe = Recipe.load(None, [*(f"--config={path}" for path in options.config), *others])
    for source in recipe.imports:
        import_extension(source)
    return recipe


def run_study(command: str, arguments: Sequence[str], options: argparse.Namespace, run: Callable[[], object]) -> None:
    """Run within --minutes. The errors are those of `stoppable`, and tell the same command as the way to go on."""
    from timm_fsr.training.studies.study import stoppable

    with stoppable(options.minutes, f"timm-fsr {command} {shlex.join(arguments)}"):
        run()


def default_device() -> str:
    """The GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
