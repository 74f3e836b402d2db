"""timm-fsr report: one page from the reports of finished runs and evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from timm_fsr.evaluation.benchmark import load_entry
from timm_fsr.reports.page import render_page
from timm_fsr.utils.files import write_text


def report_command(options: argparse.Namespace) -> None:
    """`timm-fsr report FOLDER ...`: draw one page from the reports of one model, or of several side by side."""
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
