"""timm-fsr report: one page from the reports of finished runs and evaluations."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from timm_fsr.evaluation.benchmark import load_entry
from timm_fsr.reports.page import Entry, render_page
from timm_fsr.utils.files import write_text


def report_command(options: argparse.Namespace) -> None:
    """`timm-fsr report FOLDER ...`: draw one page from the reports of one model, or of several side by side."""
    if options.names and len(options.names) != len(options.reports):
        raise ValueError(f"{len(options.names)} names were given for {len(options.reports)} reports; give one for each")
    paths = [Path(path) for path in options.reports]
    entries = [load_entry(path) for path in paths]
    if options.names:
        entries = [replace(entry, title=name) for name, entry in zip(options.names, entries, strict=True)]
    else:
        entries = [replace(entry, title=title) for title, entry in zip(_titles(entries, paths), entries, strict=True)]
    write_text(Path(options.output), render_page(entries))
    console = Console(highlight=False, soft_wrap=True)
    for entry in entries:
        console.print(f"{entry.title}: {entry.report.summary()}", markup=False)
    console.print(f"page: {options.output}", markup=False)


def _titles(entries: Sequence[Entry], paths: Sequence[Path]) -> list[str]:
    """What the reports call their models; those that share a name are called by their folders too."""
    named = [entry.title for entry in entries]
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    twice = {folder for folder, name in zip(folders, named, strict=True) if named.count(name) > 1}
    if len(twice) < 2:  # nothing to tell apart, or the same folder twice
        return named
    above = Path(os.path.commonpath([folder.parent for folder in twice]))
    return [
        f"{name} ({folder.relative_to(above).as_posix()})" if folder in twice else name
        for name, folder in zip(named, folders, strict=True)
    ]
