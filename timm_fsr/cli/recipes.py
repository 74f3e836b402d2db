"""timm-fsr recipes: list the recipes that come with the package, print one or copy it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from timm_fsr.cli.listing import listed
from timm_fsr.training.catalog import RecipeEntry, find_recipe, list_recipes
from timm_fsr.utils.files import write_text


def recipes_command(options: argparse.Namespace) -> None:
    """`timm-fsr recipes [NAME]`: list the recipes, print one, or copy it to a file."""
    if options.name is None:
        if options.output or options.overwrite:
            raise ValueError("--output and --overwrite are for one recipe: timm-fsr recipes NAME --output FILE")
        entries = list_recipes()
        sys.stdout.write(_as_json(entries) if options.json else "\n".join(_listing(entries)) + "\n")
        return
    text = find_recipe(options.name).read_text(encoding="utf-8")
    if options.output is None:
        sys.stdout.write(text)
        return
    target = Path(options.output)
    if target.exists() and not options.overwrite:
        raise FileExistsError(f"{target} is there already; choose another file, or add --overwrite")
    write_text(target, text)
    sys.stdout.write(f"{target}; train by it with: timm-fsr train --config {target}\n")


def _listing(entries: list[RecipeEntry]) -> Iterator[str]:
    for entry in entries:
        yield entry.name
        yield listed(
            entry.purpose,
            f"data: {entry.data}; network: {entry.network}",
            f"cost: {entry.cost}; results: {entry.measured}",
        )
    yield "\n`timm-fsr recipes NAME` prints one, `timm-fsr train --config NAME` trains by it."


def _as_json(entries: list[RecipeEntry]) -> str:
    rows = [{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in entries]
    return json.dumps(rows, indent=2) + "\n"
