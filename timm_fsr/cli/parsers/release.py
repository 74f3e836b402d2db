"""The flags of timm-fsr release."""

from __future__ import annotations

from pathlib import Path

from timm_fsr.cli.parsers.study import StudyParser, add_comparison

_DESCRIPTION = """Train several methods at an equal budget, attack them, and make folders for the Hub of the best.

In this order, and each only if it has not been done: the timings of --speed; the comparison, as in `timm-fsr
compare`; for each method of --release, of its seeds the one with the best robust accuracy on its held-out images, its
weights rounded to half precision and attacked again, in hub/<architecture>.<objective>_<suffix>/ with report, recipe
and card; the archive of --pack, which is made whatever happened before: `cat results.tar.* | tar x`, `sha256sum -c
SHA256SUMS`.

The same command goes on where it was. Exit status 75: something is left to do."""


def release_parser() -> StudyParser:
    """The flags of `timm-fsr release`."""
    parser = StudyParser(
        "release",
        description=_DESCRIPTION,
        examples=(
            "release --config RECIPE --methods none fsr --output OUTPUT",
            "release --config RECIPE --release fsr --suffix cifar10 --pack 15",
            "release --config RECIPE --release fsr --suffix x --evidence 200",
        ),
    )
    add_comparison(parser)
    parser.add_argument("--release", nargs="*", default=[], metavar="METHOD", help="of --methods, what is released")
    parser.add_argument("--suffix", default="", help="end of a checkpoint's tag: its data set (default: none)")
    parser.add_argument("--namespace", default="timm-fsr", help="of the repositories that the cards name")
    parser.add_argument("--license", default="apache-2.0", help="of the weights")
    parser.add_argument("--note", default="", help="a paragraph for each card (default: none)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="of the weights")
    parser.add_argument("--evidence", type=int, default=0, metavar="IMAGES", help="for gradient masking checks")
    parser.add_argument("--corruptions", type=int, default=0, metavar="IMAGES", help="for common corruptions")
    parser.add_argument("--speed", action="store_true", help="time the training step first (in a checkout)")
    parser.add_argument(
        "--official", type=Path, metavar="FOLDER", help="a checkout of the official code, to time it too"
    )
    parser.add_argument("--pack", type=float, metavar="MIB", help="make an archive in parts of at most this size")
    return parser
