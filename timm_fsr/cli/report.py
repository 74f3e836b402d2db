"""timm-fsr report: one page from the reports of finished runs and evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from timm_fsr.cli.help import HelpFormatter
from timm_fsr.evaluation.benchmark import PAGE, load_entry
from timm_fsr.reports.page import render_page
from timm_fsr.utils.files import write_text


def report_command(arguments: Sequence[str]) -> None:
    """`timm-fsr report FOLDER ...`: draw one page from the reports of one model, or of several side by side."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr report",
        description="Draw a page from one report, or from several side by side.",
    )
    parser.add_argument(
        "reports", nargs="+", help="folders that `timm-fsr evaluate --output` wrote, or report.json files"
    )
    parser.add_argument(
        "--names", nargs="+", help="what to call the models, in the same order (default: as their reports do)"
    )
    parser.add_argument("--output", default=PAGE, help=f"the page (default {PAGE})")
    options = parser.parse_args(arguments)
    if options.names and len(options.names) != len(options.reports):
        raise ValueError(f"{len(options.names)} names were given for {len(options.reports)} reports; give one for each")
    entries = [load_entry(path) for path in options.reports]
    if options.names:
        entries = [type(e)(name, e.report, e.examples) for name, e in zip(options.names, entries, strict=True)]
    write_text(Path(options.output), render_page(entries))
    console = Console(highlight=False, soft_wrap=True)
    for entry in entries:
        console.print(f"{entry.title}: {entry.report.summary()}", markup=False)
    console.print(f"page: {options.output}", markup=False)
