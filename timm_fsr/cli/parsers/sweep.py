"""The flags of timm-fsr sweep."""

from __future__ import annotations

from timm_fsr.cli.parsers.study import StudyParser

_DESCRIPTION = """Train a recipe with every combination of a grid, or search for the best values.

A range over a decade or more is searched by its logarithm (:log and :linear say so), whole numbers stay whole. The
search is Optuna's (`pip install 'timm-fsr[sweep]'`): it looks for the highest robust accuracy on held-out images, and
gives up trials that are below the median of the others at the same epoch. The grid trains all to the end.

Stopped at any time, the same command goes on where it was. In several shells, or on several machines that share the
folder, it shares the work. At its end it prints the table of `timm-fsr runs`, with means and intervals over seeds,
and writes runs.csv and runs.html. Exit status 75: something is left to do."""


def sweep_parser() -> StudyParser:
    """The flags of `timm-fsr sweep`."""
    parser = StudyParser(
        "sweep",
        description=_DESCRIPTION,
        examples=(
            "sweep --config RECIPE --grid optim.lr=0.05,0.1 seed=0,1",
            "sweep --config RECIPE --search optim.lr=0.01..0.5 --trials 20",
            "sweep --config RECIPE --grid seed=0,1,2 --minutes 60",
        ),
    )
    parser.add_argument("--grid", nargs="+", default=[], metavar="KEY=A,B", help="values to combine (default: none)")
    parser.add_argument("--search", nargs="+", default=[], metavar="KEY=LOW..HIGH", help="ranges (default: none)")
    parser.add_argument("--trials", type=int, default=20, help="of a search")
    parser.add_argument("--no-prune", action="store_true", help="train every trial of a search to its end")
    return parser
