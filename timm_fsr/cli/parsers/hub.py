"""The flags of timm-fsr models, card, push and convert."""

from __future__ import annotations

import argparse

from timm_fsr.cli.help import CommandParser
from timm_fsr.utils.defaults import CARD, CONVERTIBLE, EXPORTS


def models_parser() -> CommandParser:
    """The flags of `timm-fsr models`."""
    parser = CommandParser(
        "models",
        description="List robust checkpoints: timm.create_model(NAME, pretrained=True).",
        examples=(
            "models",
            "models --json",
            "models --json > checkpoints.json",
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def card_parser() -> CommandParser:
    """The flags of `timm-fsr card`."""
    parser = CommandParser(
        "card",
        description="Write a model card from a folder's config, report and recipe.",
        examples=(
            "card runs/my_run/best user/name",
            "card runs/my_run/best user/name --baseline runs/plain",
            "card runs/my_run/best user/name --license mit --output CARD.md",
        ),
    )
    parser.add_argument("folder", help="with config.json, model.safetensors, report.json and, if known, recipe.yaml")
    parser.add_argument("repo_id", help="user/name that it is or will be on the Hub")
    parser.add_argument("--output", help=f"the card (default FOLDER/{CARD}, which push takes unchanged)")
    parser.add_argument("--tag", help="the name by which timm knows the model without the Hub's (default: none)")
    _add_card_options(parser)
    return parser


def push_parser() -> CommandParser:
    """The flags of `timm-fsr push`."""
    parser = CommandParser(
        "push",
        description="Publish a model with its report, recipe and card in one commit. The access token is HF_TOKEN or "
        "the one stored by `hf auth login`. Nothing is sent unless every part is there and belongs to the others.",
        examples=(
            "push runs/my_run/best user/name --dry-run",
            "push runs/my_run/best user/name --private",
            "push runs/my_run/best user/name --with pt2 onnx",
        ),
    )
    parser.add_argument("folder", help="such as train's OUTPUT/best, or one that save_pretrained wrote")
    parser.add_argument("repo_id", help="user/name; the repository is made if it does not exist")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private (default: the Hub's choice)"
    )
    visibility.add_argument(
        "--public",
        action="store_false",
        dest="private",
        default=None,
        help="make a new repository public (default: the Hub's choice)",
    )
    parser.add_argument("--revision", help="branch to commit to, made if missing (default: the main one)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", help="of the commit (default: one that names the model)")
    parser.add_argument(
        "--with",
        dest="formats",
        nargs="+",
        choices=list(EXPORTS),
        default=[],
        help="publish the model as model.pt2 or model.onnx too, which run without timm (default: those in FOLDER)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and send nothing")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="with --dry-run: write there what would be sent (default: nothing is written)",
    )
    _add_card_options(parser)
    return parser


def convert_parser() -> CommandParser:
    """The flags of `timm-fsr convert`."""
    parser = CommandParser(
        "convert",
        description="Read a checkpoint of the official FSR code, or of a plain network as RobustBench has them, "
        "without running any code in it, and save the model in timm's format.",
        examples=(
            "convert model.pth --arch resnet18_cifar_fsr --output converted",
            "convert plain.pt --arch wrn28_10_cifar --output converted",
            "convert x.pt --arch resnet18_cifar --mean 0,0,0 --output converted",
        ),
    )
    parser.add_argument("file", help=".pth, .pt or .safetensors")
    parser.add_argument("--arch", required=True, help=f"one of {', '.join(CONVERTIBLE)}")
    parser.add_argument("--output", required=True, help="folder for config.json and model.safetensors")
    parser.add_argument(
        "--mean",
        type=_numbers,
        help="by which the other code normalises images, such as 0.5,0.5,0.5 (default: the file's, else the network's)",
    )
    parser.add_argument(
        "--std", type=_numbers, help="the same for the division (default: the file's, else the network's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that the folder holds")
    return parser


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", metavar="REPORT", help="report of the same training without the layer (default: none)"
    )
    parser.add_argument("--license", help="of the weights (default: the one they were saved with or started from)")
    parser.add_argument("--base-model", help="user/name that the training started from (default: what was loaded)")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write 0.49,0.48,0.45") from error
