"""timm-fsr sweep: train a recipe with each value of a grid, or search for the best."""

from __future__ import annotations

import argparse
import shutil

from timm_fsr.cli.study import read_base, run_study


def sweep_command(options: argparse.Namespace) -> None:
    """`timm-fsr sweep`: train a recipe with each value of a grid, or search."""
    from timm_fsr.training.studies.study import check_minutes
    from timm_fsr.training.studies.sweep import Sweep, read_grid, read_search

    check_minutes(options.minutes)
    grid, search = read_grid(options.grid), read_search(options.search)
    base = read_base(options, dict.fromkeys(grid, "--grid alone") | dict.fromkeys(search, "--search alone"))
    sweep = Sweep(
        flags=[*(f"--config={path}" for path in options.config), *options.others],
        output=options.output or base.folder,
        grid=grid,
        search=search,
        trials=options.trials,
        prune=not options.no_prune,
    )
    width = shutil.get_terminal_size().columns
    run_study("sweep", options, lambda: sweep.run(width))
