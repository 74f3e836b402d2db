"""The flags of timm-fsr evaluate."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from timm_fsr.cli.help import CommandParser
from timm_fsr.cli.names import attack_names
from timm_fsr.cli.parsers.model_flags import add_device_flag, add_model_flags
from timm_fsr.utils.defaults import BATCH_SIZE, CLASS_ORDERS, EMBEDDED, ON_ERROR, PAGE, REPORT

NORM, EPS, SPLIT = "linf", 8 / 255, "test"
"""For a model that says nothing of its threat model and its data."""

_DESCRIPTION = """Clean and robust accuracy of a model, and the evidence for it.

Norm, eps, data and split that are not given are those of the report that the model brings: the report.json in its
folder, its tag or its repository. The figure that counts is the per-image worst case of all attacks that are given.

With --output the outcomes are kept: the same command, given again after a kill or with more attacks, goes on where it
was. `accelerate launch -m timm_fsr evaluate` shares the images over processes.

Attacks (numbers are steps, "x5" restarts; "standard" is AutoAttack, "official" what the FSR repository tests):

{attacks}"""


class _Parser(CommandParser):
    """Says where the model went if a flag that takes several names took it too."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        if message == "the following arguments are required: model":
            message = (
                "no MODEL is given; write it first, as in `timm-fsr evaluate MODEL --attacks fgsm`: --attacks, "
                "--transfer-from and --model-args take all names that follow them"
            )
        super().error(message)


def evaluate_parser() -> CommandParser:
    """The flags of `timm-fsr evaluate`."""
    attacks = textwrap.fill(", ".join(attack_names()), 76, break_on_hyphens=False)
    parser = _Parser(
        "evaluate",
        usage="timm-fsr evaluate MODEL [FLAGS]",
        description=_DESCRIPTION.format(attacks=textwrap.indent(attacks, "  ")),
        examples=(
            "evaluate runs/fashion_mnist_fsr/best",
            "evaluate runs/my_run/best --attacks standard adaptive --output out",
            "evaluate hf-hub:user/name --data FOLDER --eps 8/255 --limit 1000",
        ),
    )
    add_model_flags(parser)
    data = parser.add_argument_group("data")
    kinds = "a folder (images, Parquet, IDX), a file (Parquet, npz) or a Hub id"
    data.add_argument(
        "--data", help=f"{EMBEDDED} (embedded), {kinds} (default: that of the model's report, else {EMBEDDED})"
    )
    data.add_argument("--split", help="of the data (default: that of the model's report, else test)")
    data.add_argument(
        "--config", help="configuration of a Hub data set (default: the one of the model's recipe, or its only one)"
    )
    data.add_argument("--image-column", help="column of the images (default: found by its usual names)")
    data.add_argument("--label-column", help="column of the labels (default: found by its usual names)")
    data.add_argument(
        "--size", type=int, help="scale and centre-crop the images to this side (default: that of the model's training)"
    )
    data.add_argument("--channels", type=int, choices=[1, 3], help="default: those that the model takes")
    data.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, where neither model nor data know them"
    )
    data.add_argument(
        "--class-order",
        choices=CLASS_ORDERS,
        help="order of class folders for a model that does not know the names of its classes (default: timm for "
        "--checkpoint and timm's models, codepoint for models saved by timm_fsr)",
    )
    data.add_argument(
        "--limit",
        type=int,
        help="evaluate this many images, balanced (default: as many as the model's report, else all)",
    )
    data.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="stop",
        help="images that cannot be used, such as broken files: name them all and stop, or skip and count them "
        "(default: stop)",
    )
    attack = parser.add_argument_group("attacks")
    attack.add_argument(
        "--norm", choices=["linf", "l2", "l1"], help=f"of the ball (default: that of the model's report, else {NORM})"
    )
    attack.add_argument(
        "--eps",
        type=_number,
        help="radius in pixels of [0, 1], such as 8/255 (default: that of the model's report, else 8/255)",
    )
    attack.add_argument("--attacks", nargs="*", default=["fgsm", "pgd20"], help="see above")
    attack.add_argument(
        "--transfer-from", nargs="+", default=[], metavar="MODEL", help="models to transfer attacks from"
    )
    attack.add_argument(
        "--attacked",
        metavar="FOLDER",
        help="only try the images that another evaluation has saved (default: run the attacks)",
    )
    attack.add_argument("--seed", type=int, default=0, help="of everything random in the attacks")
    attack.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"images per pass, to fit the memory (default {BATCH_SIZE})"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", help=f"folder for {REPORT}, {PAGE} and the outcomes to resume from (default: nothing is written)"
    )
    results.add_argument(
        "--dry-run",
        action="store_true",
        help="load everything, time some passes, print what the attacks would take, and write nothing",
    )
    results.add_argument("--overwrite", action="store_true", help="replace what the folder holds of another evaluation")
    results.add_argument("--save-images", action="store_true", help="keep the attacked images, for --attacked")
    results.add_argument(
        "--evidence",
        type=int,
        default=0,
        metavar="IMAGES",
        help="images for the gradient masking checks",
    )
    results.add_argument(
        "--corruptions",
        type=int,
        default=0,
        metavar="IMAGES",
        help="images for common corruptions (15 kinds, 5 severities)",
    )
    add_device_flag(parser)
    parser.add_import()
    return parser


def _number(text: str) -> float:
    from timm_fsr.training.parsing import parse_number

    try:
        return parse_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
