"""timm-fsr release: train, attack, round, describe and pack robust checkpoints by one command."""

from __future__ import annotations

import argparse

from timm_fsr.cli.compare import read_comparison
from timm_fsr.cli.study import run_study


def release_command(options: argparse.Namespace) -> None:
    """`timm-fsr release`: train, attack, round and pack what the flags ask for."""
    from timm_fsr.training.studies.release import Release

    plan = Release(
        comparison=read_comparison(options),
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
        run_study("release", options, plan.run)
    finally:
        plan.make_archive()
