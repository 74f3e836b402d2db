"""timm-fsr compare: train and attack the same network with each feature layer at an equal budget."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from timm_fsr.cli.study import default_device, read_base, run_study, study_parser

if TYPE_CHECKING:
    from timm_fsr.training.studies.compare import Comparison

_DESCRIPTION = """Train and attack the same network with each feature layer at an equal budget, and
draw one table and one plot.

  timm-fsr compare --config recipes/compare/fashion_mnist.yaml
  timm-fsr compare --config recipes/compare/cifar10.yaml --data.source=FOLDER \\
      --methods none fsr fsr:mode=separation cas --places own same --seeds 0 1

A method is "none" (the plain network), a feature layer, or one with arguments
("fsr:tau=1.0,noise=false"), with the objective in front if it is not the recipe's
("trades/none", "trades/fsr"). All else is the recipe's and equal for all: images,
epochs, attack, optimizer, schedule, seeds, and the rule that keeps the checkpoint (PGD
on held-out training images). Every model is then attacked on the same balanced test
images; what counts is the worst case over all attacks. Terms that a layer's paper puts
into the training attack come with the layer, and with their cost.

Stopped at any time, the same command goes on where it was. In several shells, or on
several machines that share the folder, it shares the work. The table is written after
each model, from the models that are finished. Exit status 75: something is left to do.
"afd" fine-tunes a trained model and is no such method: it needs `objective.name=afd`
and `model.name=FOLDER`."""

_DECIDED = {"seed": "--seeds", "model.layer": "--methods", "model.at": "--places"}


def compare_command(arguments: Sequence[str]) -> None:
    """`timm-fsr compare`: see the description above."""
    parser = study_parser("compare", _DESCRIPTION)
    add_comparison(parser)
    options, others = parser.parse_known_args(arguments)
    run_study("compare", arguments, options, read_comparison(options, others).run)


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is compared."""
    parser.add_argument("--methods", nargs="+", help="what is compared (default: none and every layer)")
    parser.add_argument("--places", nargs="+", default=["own"], choices=("own", "same"), help="of the layers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="each method is trained with each")
    parser.add_argument("--images", type=int, default=1000, help="balanced test images that are attacked")
    parser.add_argument("--attacks", nargs="*", default=["pgd20", "standard", "adaptive"], help="on every model")
    parser.add_argument("--against", nargs="+", default=["none"], help="methods that each model is set against")
    parser.add_argument("--part", default="1/1", help="do only this share of the models, such as 1/2")
    parser.add_argument("--device", help="to attack on (default: cuda if there is one, else cpu)")


def read_comparison(options: argparse.Namespace, others: Sequence[str]) -> Comparison:
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
    base = read_base(options, others, _DECIDED)
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
        device=options.device or default_device(),
    )
