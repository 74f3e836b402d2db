"""Which model a command works on, and where: flags that `evaluate` and `predict` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from timm_fsr.models.saving import load


def add_model_flags(parser: argparse.ArgumentParser) -> None:
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
        help="arguments of timm.create_model, such as img_size=384 or pretrained=false for random weights",
    )


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Add --device."""
    parser.add_argument("--device", type=_device, help=f"cpu, cuda, ... (default {default_device()})")


def load_model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model that the flags name, in eval or training mode as timm makes it.

    Raises:
        ValueError: flags that do not go together, or what `timm_fsr.models.saving.load` refuses.
        FileNotFoundError: there is no such file of weights.
    """
    arguments = _model_args(options.model_args)
    if options.checkpoint is None:
        if options.num_classes is not None:
            raise ValueError("--num-classes belongs to --checkpoint; other weights bring their own number of classes")
        return load(options.model, **{"pretrained": True, **arguments}).to(device)
    classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
    if not Path(options.checkpoint).is_file():
        raise FileNotFoundError(f"there is no file {options.checkpoint}; check the path given with --checkpoint")
    given = {"pretrained": False, "checkpoint_path": options.checkpoint, **classes}
    both = sorted(given.keys() & arguments.keys())
    if both:
        raise ValueError(f"--model-args {both[0]} does not go with --checkpoint, which decides it; leave it out")
    return load(options.model, **given, **arguments).to(device)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model_args(pairs: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from KEY=VALUE, whose values are read as YAML: numbers, true, null, [a, b]."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-args {pair!r} is no KEY=VALUE; write, for example, --model-args img_size=384")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--model-args {pair!r} has a value that cannot be read; quote it: '{key}=...'") from error
    return found


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; use cpu") from error
