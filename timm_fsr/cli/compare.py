"""timm-fsr compare: train and attack the same network with each feature layer at an equal budget."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from timm_fsr.cli.loading import default_device
from timm_fsr.cli.study import read_base, run_study

if TYPE_CHECKING:
    from timm_fsr.training.studies.compare import Comparison

_DECIDED = {"seed": "--seeds", "model.layer": "--methods", "model.at": "--places"}


def compare_command(options: argparse.Namespace) -> None:
    """`timm-fsr compare`: train and attack what the flags ask for."""
    run_study("compare", options, read_comparison(options).run)


def read_comparison(options: argparse.Namespace) -> Comparison:
    """What the flags ask for.

    Raises:
        ValueError: a flag cannot work; `Comparison.check` says the rest.
    """
    from timm_fsr.training.studies.compare import Comparison, all_methods
    from timm_fsr.training.studies.study import check_minutes

    check_minutes(options.minutes)
    share = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if share is None:
        raise ValueError(f"--part={options.part} is no share; write 1/2 in one shell and 2/2 in another")
    base = read_base(options, _DECIDED)
    return Comparison(
        base=base,
        output=options.output or base.folder,
        methods=options.methods or all_methods(),
        places=options.places,
        seeds=options.seeds,
        images=options.images,
        attacks=options.attacks,
        against=options.against,
        part=(int(share[1]), int(share[2])),
        device=options.device or str(default_device()),
    )
