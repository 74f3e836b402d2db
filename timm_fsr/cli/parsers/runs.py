"""The flags of timm-fsr runs."""

from __future__ import annotations

from pathlib import Path

from timm_fsr.cli.help import CommandParser


def runs_parser() -> CommandParser:
    """The flags of `timm-fsr runs`."""
    parser = CommandParser(
        "runs",
        description="Set training runs side by side: what differs in their recipes, accuracies, time and state.",
        examples=(
            "runs runs",
            "runs runs/a runs/b --sort clean",
            "runs runs/sweep --csv runs.csv --page runs.html",
        ),
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of runs; searched with all folders inside")
    parser.add_argument("--sort", metavar="COLUMN", help="a heading or recipe key (default: the most robust first)")
    parser.add_argument("--reverse", action="store_true", help="turn the order round")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all columns, accuracies in [0, 1]")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with the learning curves too")
    return parser
