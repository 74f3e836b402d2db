"""The flags of timm-fsr report."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser
from timm_fsr.utils.defaults import PAGE


def report_parser() -> CommandParser:
    """The flags of `timm-fsr report`."""
    parser = CommandParser(
        "report",
        description="Draw a page from one report, or from several side by side.",
        examples=(
            "report results",
            "report results_fsr results_plain --output side_by_side.html",
            "report a b --names FSR baseline",
        ),
    )
    parser.add_argument(
        "reports", nargs="+", help="folders that `timm-fsr evaluate --output` wrote, or report.json files"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        help="what to call the models, in the same order (default: as their reports do; by folder where that is equal)",
    )
    parser.add_argument("--output", default=PAGE, help="the page")
    return parser
