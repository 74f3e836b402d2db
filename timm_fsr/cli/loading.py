"""The model and the device that a command's flags name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_fsr.models.saving import load
from timm_fsr.utils.documents import read_yaml


def load_model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model that the flags of `add_model_flags` name, in eval or training mode as timm makes it.

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


def given_device(text: str) -> torch.device:
    """The device that --device names.

    Raises:
        ValueError: this machine has no such device, or it cannot compute.
    """
    if text.split(":")[0] == "meta":
        raise ValueError("--device=meta keeps shapes and no numbers, so that nothing can be computed; use cpu")
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={text} is no device of this machine; use cpu") from error


def _model_args(pairs: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from KEY=VALUE, whose values are read as YAML: numbers, true, null, [a, b]."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-args takes KEY=VALUE such as fsr_hidden=16, not {pair!r}")
        if key in ("num_classes", "checkpoint_path"):
            flag = f"--{key.replace('_', '-').removesuffix('-path')}"
            raise ValueError(f"--model-args {pair}: there is a flag for it; write {flag} {value}")
        try:
            found[key] = read_yaml(value)
        except ValueError as error:
            raise ValueError(
                f"--model-args {pair}: the value cannot be read ({error}); quote it: '{key}=...'"
            ) from error
    return found
