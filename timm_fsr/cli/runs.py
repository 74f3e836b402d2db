"""timm-fsr runs: a table of training runs, and one page with their learning curves."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from timm_fsr.cli.help import HelpFormatter


def runs_command(arguments: Sequence[str]) -> None:
    """`timm-fsr runs FOLDER ...`: the runs in the folders and below, as a table, a file or a page."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr runs",
        description="Set training runs side by side: what differs in their recipes, accuracies, time and state.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of runs; searched with all folders inside")
    parser.add_argument("--sort", metavar="COLUMN", help="a heading or recipe key (default: the most robust first)")
    parser.add_argument("--reverse", action="store_true", help="turn the order round")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all columns, accuracies in [0, 1]")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with the learning curves too")
    options = parser.parse_args(arguments)

    from timm_fsr.training.studies.runs import find_runs, show_runs

    runs = find_runs(options.folders)
    width = shutil.get_terminal_size().columns
    show_runs(runs, width, sort=options.sort, reverse=options.reverse, csv_file=options.csv, page=options.page)
