"""timm-fsr models | card | push | convert: the commands that move models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from timm_fsr.cli.help import HelpFormatter
from timm_fsr.hub.bundle import read_bundle
from timm_fsr.hub.card import CardOptions, check_card, render_card
from timm_fsr.hub.publish import collect, push_to_hub
from timm_fsr.models.conversion import PLAIN, convert_checkpoint
from timm_fsr.models.pretrained import CARD, REPORT, Pretrained, list_pretrained
from timm_fsr.models.saving import save_pretrained
from timm_fsr.models.weight_files import read_foreign
from timm_fsr.models.weights import CONFIG, check_finite_weights
from timm_fsr.reports.report import STRONG_ATTACKS, Report
from timm_fsr.utils.files import staged, write_text


def models_command(arguments: Sequence[str]) -> None:
    """`timm-fsr models`: list the robust checkpoints that timm knows by name."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr models",
        description="List robust checkpoints: timm.create_model(NAME, pretrained=True).",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    rows = [_row(entry) for entry in list_pretrained()]
    console = Console(highlight=False, soft_wrap=True)
    if parser.parse_args(arguments).json:
        console.print(json.dumps(rows, indent=2), markup=False)
        return
    if not rows:
        console.print("this installation of timm_fsr describes no checkpoints")
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        right = name in ("clean", "robust", "size")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name == "name")
    for row in rows:
        table.add_row(*(escape(_cell(key, value)) for key, value in row.items()))
    Console(highlight=False, width=None if console.is_terminal else 240).print(table)  # a file has no width


def card_command(arguments: Sequence[str]) -> None:
    """`timm-fsr card FOLDER user/name`: write the model card of a saved model."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr card",
        description="Write a model card from a folder's config, report and recipe.",
    )
    parser.add_argument("folder", help="with config.json, model.safetensors, report.json and, if known, recipe.yaml")
    parser.add_argument("repo_id", help="user/name that it is or will be on the Hub")
    parser.add_argument("--output", help=f"the card (default FOLDER/{CARD}, which push takes unchanged)")
    parser.add_argument("--tag", help="the name by which timm knows the model without the Hub's (default: none)")
    _add_card_options(parser)
    options = parser.parse_args(arguments)
    bundle = read_bundle(options.folder)
    text = render_card(bundle, options.repo_id, _card_options(options), tag=options.tag)
    check_card(text, bundle, options.repo_id)
    path = Path(options.output) if options.output else Path(options.folder) / CARD
    write_text(path, text)
    Console(highlight=False, soft_wrap=True).print(f"card: {path}; review it before it is pushed", markup=False)


def push_command(arguments: Sequence[str]) -> None:
    """`timm-fsr push FOLDER user/name`: publish a saved model on the Hub in one commit."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr push",
        description="Publish a model with its report, recipe and card in one commit. The access token is HF_TOKEN or "
        "the one stored by `hf auth login`. Nothing is sent unless every part is there and belongs to the others.",
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
    parser.add_argument("--dry-run", action="store_true", help="check everything and send nothing")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="with --dry-run: write there what would be sent (default: nothing is written)",
    )
    _add_card_options(parser)
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.output and not options.dry_run:
        raise ValueError("--output belongs to --dry-run: a push writes no files; add --dry-run")
    if options.dry_run:
        _dry_run(options, console)
        return
    if not (Path(options.folder) / CARD).is_file():
        console.print("the folder has no card, so one is generated; `timm-fsr card` writes it for review", markup=False)
    done = push_to_hub(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        message=options.message,
        **vars(_card_options(options)),
    )
    console.print(done.url if done.changed else f"{options.repo_id} has all of it already: no commit", markup=False)


def convert_command(arguments: Sequence[str]) -> None:
    """`timm-fsr convert FILE --arch NAME --output FOLDER`: bring weights of other code into timm's format."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        prog="timm-fsr convert",
        description="Read a checkpoint of the official FSR code, or of a plain network as RobustBench has them, "
        "without running any code in it, and save the model in timm's format.",
    )
    parser.add_argument("file", help=".pth, .pt or .safetensors")
    known = ", ".join((*PLAIN, "resnet18_cifar_fsr", "vgg16_bn_cifar_fsr", "wrn34_10_cifar_fsr"))
    parser.add_argument("--arch", required=True, help=f"one of {known}")
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
    options = parser.parse_args(arguments)
    if (Path(options.output) / CONFIG).exists() and not options.overwrite:
        raise ValueError(f"{options.output} holds a model already; choose another folder or add --overwrite")
    model: Any = convert_checkpoint(read_foreign(options.file), options.arch, mean=options.mean, std=options.std)
    check_finite_weights(model, f"the weights of {options.file}")
    save_pretrained(model, options.output)
    _tell_conversion(model, options.output)


def _dry_run(options: argparse.Namespace, console: Console) -> None:
    """Collect what would be sent, show it, and write it if asked for."""
    files = collect(options.folder, options.repo_id, _card_options(options))
    for name, content in files.items():
        console.print(f"{len(content):>12,} bytes  {name}", markup=False)
    if options.output:
        with staged(Path(options.output)) as scratch:
            for name, content in files.items():
                (scratch / name).write_bytes(content)
    console.print(f"all parts are valid; nothing was sent to {options.repo_id}", markup=False)


def _tell_conversion(model: nn.Module, folder: str) -> None:
    config: Any = model.pretrained_cfg
    count = sum(parameter.numel() for parameter in model.parameters())
    Console(highlight=False, soft_wrap=True).print(
        f"{config['architecture']} of {model.num_classes} classes ({count / 1e6:.2f} M parameters) in {folder}\n"
        f"It takes images normalised by mean {tuple(config['mean'])} and std {tuple(config['std'])}. If the other code "
        "normalises otherwise, convert again with --mean and --std; `timm-fsr evaluate` shows the clean accuracy.",
        markup=False,
    )


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", metavar="REPORT", help="report of the same training without the layer (default: none)"
    )
    parser.add_argument("--license", help="of the weights (default: the one they were saved with or started from)")
    parser.add_argument("--base-model", help="user/name that the training started from (default: what was loaded)")


def _card_options(options: argparse.Namespace) -> CardOptions:
    baseline = Report.load(options.baseline) if options.baseline else None
    return CardOptions(license=options.license, base_model=options.base_model, baseline=baseline)


def _row(entry: Pretrained) -> dict[str, Any]:
    report = Report.load(entry.folder / REPORT)
    strong = [name for name in STRONG_ATTACKS if name in report.correct]
    return {
        "name": entry.name,
        "data": report.conditions.get("data", ""),
        "threat": report.threat,
        "clean": report.accuracy["clean"],
        "robust": report.worst_case,
        "attacks": " + ".join(strong) or "single attacks only",
        "images": report.count,
        "size": entry.size,
        "source": "package" if entry.weights else f"hf-hub:{entry.hub_id}",
    }


def _cell(key: str, value: Any) -> str:
    if key in ("clean", "robust"):
        return f"{100 * value:.1f} %"
    if key == "size":
        return f"{value / 1e6:.1f} MB" if value else "?"
    return str(value)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write 0.49,0.48,0.45") from error
