"""timm-fsr release: train, attack, round, describe and pack robust checkpoints by one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_fsr.cli.compare import add_comparison, read_comparison
from timm_fsr.cli.study import run_study, study_parser

_DESCRIPTION = """Train several methods at an equal budget, attack them, and make folders for the Hub of the best.

  timm-fsr release --config recipes/cifar10_resnet18_one_cycle.yaml --compile=inductor \\
      --methods none fsr --seeds 0 --release fsr --suffix cifar10 --minutes 9 \\
      --attacks pgd20 pgd100 official standard adaptive --pack 15 --output OUTPUT

In this order, and each only if it has not been done: the timings of --speed; the
comparison, as in `timm-fsr compare`; for each method of --release, of its seeds the one
with the best robust accuracy on its held-out images, its weights rounded to half
precision and attacked again, in hub/<architecture>.<objective>_<suffix>/ with report,
recipe and card; the archive of --pack, which is made whatever happened before:
`cat results.tar.* | tar x`, `sha256sum -c SHA256SUMS`.

The same command goes on where it was. Exit status 75: something is left to do."""


def release_command(arguments: Sequence[str]) -> None:
    """`timm-fsr release`: see the description above."""
    from timm_fsr.training.studies.release import Release

    parser = study_parser("release", _DESCRIPTION)
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
        "--official", type=Path, metavar="FOLDER", help="a checkout of the official code to time beside"
    )
    parser.add_argument("--pack", type=float, metavar="MIB", help="make an archive in parts of at most this size")
    options, others = parser.parse_known_args(arguments)
    plan = Release(
        comparison=read_comparison(options, others),
        methods=options.release,
        suffix=options.suffix,
        namespace=options.namespace,
        license=options.license,
        note=options.note,
        dtype=options.dtype,
        evidence=options.evidence,
        corruptions=options.corruptions,
        speed=options.speed,
        official=options.official,
        minutes=options.minutes,
        pack=options.pack,
    )
    plan.check()
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        run_study("release", arguments, options, plan.run)
    finally:
        plan.make_archive()
