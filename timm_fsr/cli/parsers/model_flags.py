"""Flags that say which model a command works on, and where; `timm_fsr.cli.loading` reads them."""

from __future__ import annotations

import argparse


def add_model_flags(parser: argparse._ActionsContainer) -> None:
    """Add MODEL, --checkpoint, --num-classes and --model-args."""
    parser.add_argument(
        "model", help="a folder such as train's OUTPUT/best, or the timm name of a model with weights (hf-hub:)"
    )
    parser.add_argument(
        "--checkpoint",
        help="file of weights (.safetensors or .pth) for a model given by its timm name (default: the model's own)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        help="classes of a model whose weights come from --checkpoint (default: the architecture's)",
    )
    parser.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="how the model is built: arguments of timm.create_model such as fsr_hidden=16 or img_size=384 (default: "
        "as it was saved, or as its architecture is)",
    )


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
