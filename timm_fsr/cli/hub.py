"""timm-fsr models | card | push | convert: the commands that move models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from timm_fsr.cli.listing import listed
from timm_fsr.hub.bundle import read_bundle
from timm_fsr.hub.card import CardOptions, check_card, render_card
from timm_fsr.hub.publish import collect, push_to_hub
from timm_fsr.models.conversion import convert_checkpoint
from timm_fsr.models.pretrained import CARD, REPORT, Pretrained, list_pretrained
from timm_fsr.models.saving import save_pretrained
from timm_fsr.models.weight_files import read_foreign
from timm_fsr.models.weights import CONFIG, check_finite_weights
from timm_fsr.reports.report import STRONG_ATTACKS, Report
from timm_fsr.utils.files import staged, write_text


def models_command(options: argparse.Namespace) -> None:
    """`timm-fsr models`: list the robust checkpoints that timm knows by name."""
    rows = [_row(entry) for entry in list_pretrained()]
    console = Console(highlight=False, soft_wrap=True)
    if options.json:
        console.print(json.dumps(rows, indent=2), markup=False)
        return
    if not rows:
        console.print("this installation of timm_fsr describes no checkpoints")
        return
    for row in rows:
        console.print(row["name"], markup=False)
        console.print(
            listed(
                f"clean {100 * row['clean']:.1f} %, robust {100 * row['robust']:.1f} % ({row['threat']}, "
                f"{row['attacks']}, {row['images']} images)",
                f"data: {row['data']}",
                f"{_megabytes(row['size'])}, from {row['source']}",
            ),
            markup=False,
        )


def card_command(options: argparse.Namespace) -> None:
    """`timm-fsr card FOLDER user/name`: write the model card of a saved model."""
    bundle = read_bundle(options.folder)
    text = render_card(bundle, options.repo_id, _card_options(options), tag=options.tag)
    check_card(text, bundle, options.repo_id)
    path = Path(options.output) if options.output else Path(options.folder) / CARD
    write_text(path, text)
    Console(highlight=False, soft_wrap=True).print(f"card: {path}; review it before it is pushed", markup=False)


def push_command(options: argparse.Namespace) -> None:
    """`timm-fsr push FOLDER user/name`: publish a saved model on the Hub in one commit."""
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
        formats=options.formats,
        **vars(_card_options(options)),
    )
    console.print(done.url if done.changed else f"{options.repo_id} has all of it already: no commit", markup=False)


def convert_command(options: argparse.Namespace) -> None:
    """`timm-fsr convert FILE --arch NAME --output FOLDER`: bring weights of other code into timm's format."""
    if (Path(options.output) / CONFIG).exists() and not options.overwrite:
        raise ValueError(f"{options.output} holds a model already; choose another folder or add --overwrite")
    model: Any = convert_checkpoint(read_foreign(options.file), options.arch, mean=options.mean, std=options.std)
    check_finite_weights(model, f"the weights of {options.file}")
    save_pretrained(model, options.output)
    _tell_conversion(model, options.output)


def _dry_run(options: argparse.Namespace, console: Console) -> None:
    """Collect what would be sent, show it, and write it if asked for."""
    files = collect(options.folder, options.repo_id, _card_options(options), options.formats)
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


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.1f} MB" if size else "of unknown size"
