"""timm-fsr export: write a model as a file that torch or onnxruntime runs alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from timm_fsr.cli.loading import load_model
from timm_fsr.models.export import Exported, check_formats, export
from timm_fsr.models.pretrained import CARD
from timm_fsr.utils.defaults import EXPORTS


def export_command(options: argparse.Namespace) -> None:
    """`timm-fsr export MODEL --output FOLDER --formats pt2 onnx`: write the files, and say what was compared."""
    folder = _folder(options)
    formats = check_formats(options.formats)
    there = [EXPORTS[name] for name in formats if (folder / EXPORTS[name]).exists()]
    if there and not options.overwrite:
        raise ValueError(f"{folder} holds {' and '.join(there)} already; choose another --output or add --overwrite")
    model = load_model(options, torch.device("cpu"))
    console = Console(highlight=False, soft_wrap=True)
    for found in export(model, folder, formats, size=options.size):
        console.print(_told(found), markup=False)
    if (folder / CARD).is_file():
        console.print(f"{folder / CARD} does not tell of them yet: make it again by timm-fsr card", markup=False)


def _folder(options: argparse.Namespace) -> Path:
    if options.output:
        return Path(options.output)
    name = options.model.removeprefix("local-dir:")
    if not Path(name).is_dir():
        raise ValueError(f"{options.model} is no folder to write into; say where the files go with --output")
    return Path(name)


def _told(found: Exported) -> str:
    same = "logits equal" if found.difference == 0 else f"logits within {found.difference:.1g}"
    return f"{found.path}: {found.path.stat().st_size / 1e6:.1f} MB, {same}, SHA-256 {found.sha256}"
