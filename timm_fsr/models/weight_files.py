"""Files of weights that any training code wrote, read without running code in them, and loaded into a model."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_checkpoint
from torch import Tensor, nn

from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.hooks.site import layer_groups
from timm_fsr.layers import list_layers
from timm_fsr.models.conversion import unwrap

_AVERAGED = ("state_dict_ema", "model_ema")  # timm's names; as timm does, the averaged weights are taken
_ARRAYS = (".npz", ".npy")  # which timm's models read by code of their own
_ENDS = 3  # tensors that the numbers of channels and classes change: the first kernel, the classifier and its bias
_SHOWN = 3  # keys that a message lists before it only counts


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
        _check_beginning(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):  # timm's own training keeps its options so
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is told below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and is not read: unpickling it could run any code "
            f"({_reason(error)}); ask its author for a state dict, or make one in a sandbox by torch.save(model."
            "state_dict(), path)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({_reason(error)}); download it again") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors; save a state dict")
    return dict(found)


def load_weight_file(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a file into a model, in place, whatever prefixes its training code put before their names.

    Checkpoints of timm, Lightning, DataParallel, torch.compile and `PixelModel` are all read. A mean and std by which
    the other code normalises images become those of the model's configuration.

    Args:
        model: a timm model, with feature layers or without.
        path: `.safetensors`, or what `torch.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or its weights belong to another model; the message names the difference.
    """
    if Path(path).suffix.lower() in _ARRAYS:
        load_checkpoint(model, str(path))
        return
    content = read_foreign(path)
    averaged = next((content[key] for key in _AVERAGED if isinstance(content.get(key), Mapping)), content)
    weights, statistics = unwrap(averaged)
    own = model.state_dict()
    weights = _without_prefix({key.replace("_orig_mod.", ""): value for key, value in weights.items()}, own)
    difference = explain_difference(model, weights)
    if difference:
        raise ValueError(f"the weights in {path} are not those of this model: {difference}")
    model.load_state_dict(weights)
    config = pretrained_cfg_of(model)
    if statistics is not None and isinstance(config, dict):
        config |= {"mean": statistics.mean, "std": statistics.std}


def explain_difference(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Why weights do not fit a model, and what to do, as a sentence; "" if they fit.

    Args:
        model: a timm model, with feature layers or without.
        weights: a state dict.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in own if key not in weights]
    others = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if not (missing or others or shapes):
        return ""
    if len(missing) == len(own):
        return f"none of its tensors is there (but {_listed(others)}); name the network that they belong to"
    return (
        _other_layer(model, missing, others)
        or _other_classes(model, weights, shapes)
        or _other_arguments(model, weights, shapes)
        or _other_channels(model, weights, shapes)
        or "; ".join(
            f"{what}: {_listed(keys)}"
            for what, keys in (
                ("missing", missing),
                ("not part of it", others),
                (
                    "of another shape",
                    [f"{key} {tuple(weights[key].shape)}, here {tuple(own[key].shape)}" for key in shapes],
                ),
            )
            if keys
        )
        + "; name the network that they belong to, with the arguments that it was built with"
    )


def _other_layer(model: nn.Module, missing: list[str], others: list[str]) -> str:
    """A sentence if the weights have another feature layer than the model, or only one of both has one."""
    names = [site.layer.name for group in layer_groups(model) for site in group.sites]
    architecture = str(pretrained_cfg_of(model).get("architecture") or "")
    lacking = next((name for name in names if any(key.startswith(f"{name}.") for key in missing)), None)
    given = next((name for name in list_layers() if any(key.startswith(f"{name}.") for key in others)), None)
    base = architecture.removesuffix(f"_{lacking}")
    if given is not None and given != lacking:
        return f"they have the feature layer {given!r}; name {base}_{given}"
    if lacking is not None and given == lacking:
        return f"their feature layers {lacking!r} are at other places ({_listed(others)}); build the model with at=..."
    if lacking is not None:
        return f"they have no feature layer {lacking!r}; name {base}, the network without it"
    return ""


def _other_classes(model: nn.Module, weights: Mapping[str, Tensor], shapes: list[str]) -> str:
    """A sentence if the weights are for another number of classes."""
    classifier = pretrained_cfg_of(model).get("classifier")
    for name in [classifier] if isinstance(classifier, str) else list(classifier or ()):
        key = f"{name}.weight"
        if key in shapes and len(weights[key]) != len(model.state_dict()[key]):
            found = len(weights[key])
            return (
                f"they are for {found} classes, the model has {len(model.state_dict()[key])}; build it with "
                f"num_classes={found} (on the command line --num-classes={found})"
            )
    return ""


def _other_channels(model: nn.Module, weights: Mapping[str, Tensor], shapes: list[str]) -> str:
    """A sentence if the weights are for images of another number of channels."""
    key = f"{pretrained_cfg_of(model).get('first_conv')}.weight"
    if key not in shapes or weights[key].ndim < 2:
        return ""
    ours, theirs = model.state_dict()[key].shape[1], weights[key].shape[1]
    if ours == theirs:
        return ""
    return (
        f"they are for images of {theirs} channels, the model takes {ours}; build it with in_chans={theirs} (on the "
        f"command line --model-args in_chans={theirs})"
    )


def _other_arguments(model: nn.Module, weights: Mapping[str, Tensor], shapes: list[str]) -> str:
    """A sentence if the weights are of the same feature layer, built with other arguments; names the likely one."""
    for group in layer_groups(model):
        layer = group.sites[0].layer
        mine = [key for key in shapes if key.startswith(f"{layer.name}.")]
        if not mine or len(shapes) - len(mine) > _ENDS:  # then it is another network
            continue
        ours, theirs = model.state_dict()[mine[0]].shape, weights[mine[0]].shape
        changed = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
        argument = next(
            (
                f"{layer.name}_{name}={there}"
                for here, there in changed
                for name, value in layer.resolved_args().items()
                if type(value) is int and value == here
            ),
            None,
        )
        remedy = (
            f"build it with {argument}" if argument else f"build it with the {layer.name}_... arguments of its training"
        )
        flag = argument or f"{layer.name}_...=..."
        return (
            f"their feature layer {layer.name!r} was built with other arguments ({mine[0]} is {tuple(theirs)}, here "
            f"{tuple(ours)}); {remedy} (on the command line --model-args {flag})"
        )
    return ""


def _without_prefix(weights: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model alone, where they are part of a larger module: under the prefix that fits best."""
    heads = {key[: place + 1] for key in weights for place, letter in enumerate(key) if letter == "."}
    found = max(sorted({"", *heads}), key=lambda head: sum(f"{head}{key}" in weights for key in own))
    if not found:
        return weights
    return {key.removeprefix(found): value for key, value in weights.items() if key.startswith(found)}


def _check_beginning(path: Path) -> None:
    """Refuse what `torch.save` cannot have written; unpickling a text fails with an error that says nothing."""
    with path.open("rb") as file:
        first = file.read(16)
    if not first:
        raise ValueError("it is empty")
    if not first.startswith((b"PK", b"\x80")):
        raise ValueError(f"torch.save wrote no file that begins with {first!r}")


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _reason(error: Exception) -> str:
    """The line of an error that says what was found, without torch's advice to read the file anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "global" in line]
    return (telling or lines or [type(error).__name__])[0].partition(" Please use ")[0][:300]
