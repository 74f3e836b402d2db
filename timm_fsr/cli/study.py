"""What the commands over several trainings share: a base recipe, an output folder, a time limit."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_fsr.training.recipe import Recipe


def read_base(options: argparse.Namespace, decided: dict[str, str]) -> Recipe:
    """The recipe that the flags describe; what it imports is imported.

    Args:
        options: by a `StudyParser`.
        decided: keys that the study sets itself, and the flag to use instead.

    Raises:
        ValueError: such a key was given, or the recipe cannot be read.
    """
    from timm_fsr.training.recipe import Recipe
    from timm_fsr.utils.registry import import_extension

    for key, flag in decided.items():
        if any(other.partition("=")[0] == f"--{key}" for other in options.others):
            raise ValueError(f"--{key} differs from training to training here; use {flag}")
    recipe = Recipe.load(None, [*(f"--config={path}" for path in options.config), *options.others])
    for source in recipe.imports:
        import_extension(source)
    return recipe


def run_study(command: str, options: argparse.Namespace, run: Callable[[], object]) -> None:
    """Run within --minutes. The errors are those of `stoppable`, and tell the same command as the way to go on."""
    from timm_fsr.training.studies.study import stoppable

    with stoppable(options.minutes, f"timm-fsr {command} {shlex.join(options.given)}"):
        run()
