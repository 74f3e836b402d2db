"""Foreign weights: checkpoints of other code, read without running any of it, as models in timm's format."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from timm_fsr.convert import PLAIN, convert_official, convert_plain, find_statistics, recognise_official
from timm_fsr.layers.base import unknown


def read_foreign(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file; nothing in it is executed.

    Args:
        path: `.safetensors`, or anything that `torch.save` wrote, which is read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds no dictionary, or needs code to be run, which is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a .pth, .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is not read: unpickling it could run any code "
            f"({_reason(error)}); ask its author for a state dict, or make one in a sandbox by torch.save(model."
            "state_dict(), path)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({_reason(error)}); download it again") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors; save a state dict")
    return dict(found)


def convert_checkpoint(
    checkpoint: Mapping[str, Any],
    architecture: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A model of ours with the weights of other code, in eval mode.

    Args:
        checkpoint: what `read_foreign` gave: weights of the official FSR networks, or of the plain ResNet-18,
            pre-activation ResNet-18 and Wide ResNets as most adversarial training code spells them.
        architecture: "resnet18_cifar_fsr", "vgg16_bn_cifar_fsr" or "wrn34_10_cifar_fsr" for the official FSR networks;
            "resnet18_cifar", "preact_resnet18_cifar", "wrn28_10_cifar" or "wrn34_10_cifar" for plain ones.
        mean: by which the other code normalises images in [0, 1] before its network; None takes what the
            checkpoint says of it, else 0.
        std: the same for the division; None takes what the checkpoint says, else 1.

    Raises:
        ValueError: another network than that, or unknown ones; see `convert_official` and `convert_plain`.
    """
    official = {f"{network.backbone}_fsr": network for network in recognise_official(checkpoint)}
    if architecture in PLAIN and not official:
        state = convert_plain(checkpoint, architecture)
    elif architecture in official:
        state = convert_official(checkpoint)
    elif official:
        raise ValueError(f"these are weights of {', '.join(official)}, not of {architecture}; name that architecture")
    elif architecture.removesuffix("_fsr") in PLAIN:
        raise ValueError(
            f"these weights have no FSR layer: convert them to {architecture.removesuffix('_fsr')}, then train with a "
            "fresh one over them (--model.name=FOLDER --model.layer=fsr)"
        )
    else:
        known = [*PLAIN, "resnet18_cifar_fsr", "vgg16_bn_cifar_fsr", "wrn34_10_cifar_fsr"]
        raise ValueError(unknown("architecture to convert to", architecture, known))
    found = find_statistics(checkpoint)
    statistics = {"mean": mean or (found and found[0]), "std": std or (found and found[1])}
    overlay = {key: tuple(values) for key, values in statistics.items() if values}
    classes = next(len(state[key]) for key in ("fc.weight", "head.fc.weight") if key in state)
    model = timm.create_model(architecture, num_classes=classes, pretrained_cfg_overlay=overlay or None)
    model.load_state_dict(state)
    return model.eval()


def _reason(error: Exception) -> str:
    """The line of an error that says what was found, without torch's advice to read the file anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "global" in line]
    return (telling or lines or [type(error).__name__])[0][:300]
