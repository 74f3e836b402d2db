"""The flags of timm-fsr compare."""

from __future__ import annotations

from timm_fsr.cli.parsers.study import StudyParser, add_comparison

_DESCRIPTION = """Train and attack a network with each feature layer at an equal budget, in one table and one plot.

A method is "none" (the plain network), a feature layer, or one with arguments ("fsr:tau=1.0,noise=false"), with the
objective in front if it is not the recipe's ("trades/none", "trades/fsr"). All else is the recipe's and equal for
all: images, epochs, attack, optimizer, schedule, seeds, and the rule that keeps the checkpoint (PGD on held-out
training images). Every model is then attacked on the same balanced test images; what counts is the worst case over
all attacks. Terms that a layer's paper puts into the training attack come with the layer, and with their cost.

Stopped at any time, the same command goes on where it was. In several shells, or on several machines that share the
folder, it shares the work. The table is written after each model, from the models that are finished. Exit status 75:
something is left to do. The recipes compare/fashion_mnist, compare/fashion_mnist_full and compare/cifar10 come with
the package. "afd" fine-tunes a trained model and is no such method: it needs `objective.name=afd` and
`model.name=FOLDER`."""


def compare_parser() -> StudyParser:
    """The flags of `timm-fsr compare`."""
    parser = StudyParser(
        "compare",
        description=_DESCRIPTION,
        examples=(
            "compare --config compare/fashion_mnist",
            "compare --config compare/cifar10 --methods none fsr cas",
            "compare --config RECIPE --methods none fsr trades/fsr --seeds 0",
        ),
    )
    add_comparison(parser)
    return parser
