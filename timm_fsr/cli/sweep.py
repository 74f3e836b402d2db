"""timm-fsr sweep: train a recipe with each value of a grid, or search for the best."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from timm_fsr.cli.study import read_base, run_study, study_parser

_DESCRIPTION = """Train a recipe with every combination of a grid, or search for the best values.

  timm-fsr sweep --config recipes/fashion_mnist_quickstart.yaml \\
      --grid optim.lr=0.05,0.1 seed=0,1 --output runs/rates
  timm-fsr sweep --config recipes/fashion_mnist_quickstart.yaml \\
      --search optim.lr=0.01..0.5 attack.steps=3,5,10 --trials 20 --output runs/search

A range over a decade or more is searched by its logarithm (:log and :linear say so),
whole numbers stay whole. The search is Optuna's (`pip install 'timm-fsr[sweep]'`): it
looks for the highest robust accuracy on held-out images, and gives up trials that are
below the median of the others at the same epoch. The grid trains all to the end.

Stopped at any time, the same command goes on where it was. In several shells, or on
several machines that share the folder, it shares the work. At its end it prints the
table of `timm-fsr runs`, with means and intervals over seeds, and writes runs.csv and
runs.html. Exit status 75: something is left to do."""


def sweep_command(arguments: Sequence[str]) -> None:
    """`timm-fsr sweep`: see the description above."""
    parser = study_parser("sweep", _DESCRIPTION)
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=A,B", help="values to combine (default: none)")
    parser.add_argument("--search", nargs="+", default=[], metavar="KEY=LOW..HIGH", help="ranges (default: none)")
    parser.add_argument("--trials", type=int, default=20, help="of a search")
    parser.add_argument("--no-prune", action="store_true", help="train every trial of a search to its end")
    options, others = parser.parse_known_args(arguments)

    from timm_fsr.training.studies.study import check_minutes
    from timm_fsr.training.studies.sweep import Sweep, read_grid, read_search

    check_minutes(options.minutes)
    grid, search = read_grid(options.grid), read_search(options.search)
    base = read_base(options, others, dict.fromkeys(grid, "--grid alone") | dict.fromkeys(search, "--search alone"))
    sweep = Sweep(
        flags=[*(f"--config={path}" for path in options.config), *others],
        output=options.output or base.folder,
        grid=grid,
        search=search,
        trials=options.trials,
        prune=not options.no_prune,
    )
    width = shutil.get_terminal_size().columns
    run_study("sweep", arguments, options, lambda: sweep.run(width))
