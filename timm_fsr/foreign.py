"""Foreign weights: checkpoints of other code, read without running any of it, as models in timm's format."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from timm_fsr.convert import PLAIN, convert_official, convert_plain, recognise_official, unwrap
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
        ValueError: another network than that, an unknown one, or numbers that cannot be; see `convert_official` and
            `convert_plain`.
    """
    weights, found = unwrap(checkpoint)
    official = {f"{network.backbone}_fsr": network for network in recognise_official(weights)}
    if architecture in PLAIN and not official:
        state = convert_plain(weights, architecture)
    elif architecture in official:
        state = convert_official(weights)
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
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{broken[0]!r} holds numbers that are not finite; the checkpoint is of a run that diverged: take another"
        )
    classes = next(len(state[key]) for key in ("fc.weight", "head.fc.weight") if key in state)
    statistics = {"mean": mean or (found and found.mean), "std": std or (found and found.std)}
    overlay = {key: _of_channels(key, values, 3) for key, values in statistics.items() if values}
    model = timm.create_model(architecture, num_classes=classes, pretrained_cfg_overlay=overlay or None)
    model.load_state_dict(state)
    return model.eval()


def _of_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number for each channel, by which images can be normalised."""
    numbers = tuple(values) * channels if len(values) == 1 else tuple(values)
    if len(numbers) != channels or not all(math.isfinite(number) for number in numbers):
        raise ValueError(
            f"the {name} {tuple(values)} is not one finite number for all or each of {channels} channels; "
            f"give --{name} as such"
        )
    if name == "std" and min(numbers) <= 0:
        raise ValueError(f"the std {numbers} must be positive, for images are divided by it; give another --std")
    return numbers


def _reason(error: Exception) -> str:
    """The line of an error that says what was found, without torch's advice to read the file anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "global" in line]
    return (telling or lines or [type(error).__name__])[0][:300]
