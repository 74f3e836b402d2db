"""timm-fsr runs: a table of training runs, and one page with their learning curves."""

from __future__ import annotations

import argparse
import shutil

from timm_fsr.training.studies.runs import find_runs, show_runs


def runs_command(options: argparse.Namespace) -> None:
    """`timm-fsr runs FOLDER ...`: the runs in the folders and below, as a table, a file or a page."""
    runs = find_runs(options.folders)
    width = shutil.get_terminal_size().columns
    show_runs(runs, width, sort=options.sort, reverse=options.reverse, csv_file=options.csv, page=options.page)
