"""Weights of other code, read without running any of it, as models of this package."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from timm_fsr.utils import defaults
from timm_fsr.utils.errors import unknown

Shape = tuple[int, ...]

WRAPPERS = ("state_dict", "net", "model")  # names under which checkpoints keep the state dict
PREFIXES = ("module.", "model.", "net.")  # what DataParallel and wrappers put before each key
STATISTICS = ("mu", "sigma", "mean", "std", "normalize.mean", "normalize.std")  # buffers of wrappers that normalise
VGG_BLOCKS = ((0, 6), (7, 13), (14, 23), (24, 33), (34, 43))  # in timm's `features`; a pool follows each

HIDDEN = 64  # width of the official separation and recalibration networks
NESTED = 10  # wrappers and prefixes that are taken off
SHOWN = 8  # keys that an error message lists before it only counts


class Slot(NamedTuple):
    """Where an official weight goes: our key, and the shape it must have there."""

    key: str
    shape: Shape


class Statistics(NamedTuple):
    """By what images in [0, 1] are normalised, for each channel or for all alike."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class OfficialNetwork:
    """How one official network corresponds to ours.

    Attributes:
        title: the official name.
        backbone: our timm name of the network without FSR.
        place: index in `feature_info` of the feature map that FSR changes.
        signature: an official key that the other networks lack.
        spelling: pairs (pattern, replacement) that turn, in order, our key into the official one.
        unused: prefixes of official weights that take no part in the forward pass.
    """

    title: str
    backbone: str
    place: int
    signature: str
    spelling: tuple[tuple[str, str], ...]
    unused: tuple[str, ...] = ()


NETWORKS = (
    OfficialNetwork(
        title="ResNet18_FSR",
        backbone="resnet18_cifar",
        place=-1,
        signature="linear.weight",
        spelling=((r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut.")),
    ),
    OfficialNetwork(
        title="vgg16_FSR",
        backbone="vgg16_bn_cifar",
        place=3,
        signature="block0.0.weight",
        spelling=(
            *(
                (rf"^features\.{index}\.", f"block{block}.{index - first}.")
                for block, (first, end) in enumerate(VGG_BLOCKS)
                for index in range(first, end)
            ),
            (r"^pre_logits\.fc1\.", "classifier.0."),
            (r"^pre_logits\.fc2\.", "classifier.2."),
            (r"^head\.fc\.", "classifier.4."),
        ),
    ),
    OfficialNetwork(
        title="WideResNet34_FSR",
        backbone="wrn34_10_cifar",
        place=-1,
        signature="block1.layer.0.conv1.weight",
        spelling=(
            (r"^stem\.conv\.", "conv1."),
            (r"^stages\.0\.blocks\.", "block1.layer."),
            (r"^stages\.1\.blocks\.", "block2.layer."),
            (r"^stages\.2\.blocks\.", "block3.layer."),
            (r"\.norm([12])\.", r".bn\1."),
            (r"\.downsample\.conv\.", ".convShortcut."),
            (r"^norm\.", "bn1."),
            (r"^head\.fc\.", "fc."),
        ),
        unused=("sub_block1.",),
    ),
)

_RESNET, _, _WIDE = NETWORKS
_PREACT = OfficialNetwork(
    title="PreActResNet18",
    backbone="preact_resnet18_cifar",
    place=-1,
    signature="layer1.0.bn1.weight",
    spelling=(
        (r"^stem\.conv\.", "conv1."),
        *((rf"^stages\.{stage}\.blocks\.", f"layer{stage + 1}.") for stage in range(4)),
        (r"\.norm([12])\.", r".bn\1."),
        (r"\.downsample\.conv\.", ".shortcut.0."),
        (r"^norm\.", "bn."),
        (r"^head\.fc\.", "linear."),
    ),
)

PLAIN = {
    network.backbone: network
    for network in (
        dataclasses.replace(_RESNET, title="ResNet-18"),
        dataclasses.replace(_WIDE, title="WideResNet-34-10"),
        dataclasses.replace(_WIDE, title="WideResNet-28-10", backbone="wrn28_10_cifar"),
        _PREACT,
    )
}
"""By our name: the networks without FSR whose common spelling is known."""


def convert_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the official FSR weights for `resnet18_cifar_fsr`, `vgg16_bn_cifar_fsr` or `wrn34_10_cifar_fsr`.

    The network is recognised from the keys. Load the result with `load_state_dict` into that variant, built
    with the same `num_classes`.

    Args:
        state_dict: the official state dict for 32x32 images, or a checkpoint that holds it under
            `state_dict`, `net` or `model`; a `module.` before every key (DataParallel) is ignored.

    Returns:
        Our state dict. Its tensors share memory with the given ones; no value is changed, and linear weights
        (out, in) become (out, in, 1, 1) where timm has a 1x1 convolution.

    Raises:
        ValueError: none of the three networks, missing or unknown keys, or a tensor of another shape.
    """
    official = _bare(state_dict)
    network = _recognise(official)
    head = official.get("aux.0.weight")
    wanted = _wanted(network, num_classes=len(head) if head is not None and head.ndim else 10)
    return _renamed(official, wanted, network)


def _renamed(official: Mapping[str, Any], wanted: Mapping[str, Slot], network: OfficialNetwork) -> dict[str, Tensor]:
    missing = [key for key in wanted if key not in official]
    unknown = [key for key in official if key not in wanted and not key.startswith(network.unused)]
    if missing or unknown:
        found = {"missing": missing, "unknown": unknown}
        problems = "; ".join(f"{what}: {_listed(keys)}" for what, keys in found.items() if keys)
        raise ValueError(
            f"the state dict looks like {network.title}, but its keys differ ({problems});"
            " give that network's state dict, whole and unchanged"
        )
    return {slot.key: _fitted(official[key], slot, key) for key, slot in wanted.items()}


def convert_plain(state_dict: Mapping[str, Any], architecture: str) -> dict[str, Tensor]:
    """Rename the weights of a network without FSR, as most adversarial training code spells them, for ours.

    Args:
        state_dict: in the spelling of kuangliu's ResNets or TRADES's Wide ResNets, as RobustBench has them, or
            in timm's; a wrapper (`state_dict`, `net`, `model`) around it or before each key is taken off.
        architecture: one of `PLAIN`, such as "resnet18_cifar".

    Returns:
        Our state dict, with as many classes as the given one.

    Raises:
        ValueError: no such network, missing or unknown keys, a tensor of another shape, or a wrapper's mean and std.
    """
    if architecture not in PLAIN:
        raise ValueError(unknown("network to convert to", architecture, list(PLAIN)))
    network, given = PLAIN[architecture], _bare(state_dict)
    if any(key.startswith("separation.") for key in given):
        raise ValueError(f"these weights have FSR layers; convert them to {architecture}_fsr")
    spellings = (network, dataclasses.replace(network, spelling=()))  # the common one, and timm's
    candidates = [_wanted_backbone(spelling, count_classes(given)) for spelling in spellings]
    wanted = min(candidates, key=lambda keys: len(set(keys) ^ set(given)))
    return _renamed(given, wanted, network)


def recognise_official(state_dict: Mapping[str, Any]) -> list[OfficialNetwork]:
    """The official FSR network that weights belong to, alone in a list; none for networks without FSR."""
    given, _ = unwrap(state_dict)
    if not any(key.startswith("separation.") for key in given):
        return []
    return [network for network in NETWORKS if network.signature in given][:1]


def count_classes(state_dict: Mapping[str, Any]) -> int:
    """Classes of the last linear layer in a state dict; 10 if none is recognised."""
    for key in ("linear.weight", "fc.weight", "head.fc.weight", "classifier.4.weight"):
        if key in state_dict and state_dict[key].ndim:
            return len(state_dict[key])
    return 10


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Statistics | None]:
    """The state dict in a checkpoint, and by which mean and std its wrapper normalised images before the network.

    Args:
        checkpoint: a state dict, or a mapping that holds one under `state_dict`, `net` or `model`, as often as that;
            prefixes that DataParallel and wrappers put before every key are taken off.

    Raises:
        ValueError: what is left is no state dict, or is nested without end.
    """
    state: dict[Any, Any] = dict(checkpoint)
    for _ in range(NESTED):
        inner = next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is not None:
            beside = {key: state[key] for key in STATISTICS if isinstance(state.get(key), Tensor)}
            state = {**beside, **inner}
            continue
        bare = [str(key) for key in state if key not in STATISTICS]
        prefix = next((prefix for prefix in PREFIXES if bare and all(key.startswith(prefix) for key in bare)), None)
        if prefix is None:
            break
        state = {str(key).removeprefix(prefix): value for key, value in state.items()}
    else:
        raise ValueError(f"the checkpoint is wrapped more than {NESTED} times, or holds itself; give a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{key!r} in the checkpoint is no named tensor but {kind}; give a state dict")
    for mean, std in zip(STATISTICS[::2], STATISTICS[1::2], strict=True):
        if mean in state and std in state:
            found = [tuple(state.pop(name).flatten().tolist()) for name in (mean, std)]
            return state, Statistics(*found)
    return state, None


def _bare(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict alone; ValueError if that loses how images are normalised."""
    state, statistics = unwrap(state_dict)
    if statistics:
        raise ValueError(
            f"these weights come with the mean {statistics.mean} and std {statistics.std} by which their wrapper "
            "normalises images, which a state dict cannot keep; use `timm-fsr convert`, or leave the two out and "
            "normalise the images"
        )
    return state


def _recognise(official: Mapping[str, Any]) -> OfficialNetwork:
    for network in NETWORKS:
        if network.signature in official:
            return network
    titles = ", ".join(network.title for network in NETWORKS)
    signatures = ", ".join(network.signature for network in NETWORKS)
    raise ValueError(
        f"the state dict (keys: {_listed(official)}) is none of the official FSR networks {titles}: it has"
        f" none of the keys {signatures}; weights made with this package load without conversion"
    )


def _wanted(network: OfficialNetwork, num_classes: int) -> dict[str, Slot]:
    """Each official key that must be there, and where it goes."""
    with torch.device("meta"):
        backbone: Any = timm.create_model(network.backbone, num_classes=num_classes)
    info = backbone.feature_info[network.place]
    site = info["module"].replace(".", "_")
    fsr = _wanted_fsr(f"fsr.{site}", info["num_chs"], num_classes)
    return _wanted_backbone(network, num_classes) | fsr


def _wanted_backbone(network: OfficialNetwork, num_classes: int) -> dict[str, Slot]:
    """The same for the network without FSR, which is built without weights, by its timm name."""
    with torch.device("meta"):
        backbone: Any = timm.create_model(network.backbone, num_classes=num_classes)
    wanted = {}
    for ours, tensor in backbone.state_dict().items():
        theirs = ours
        for pattern, replacement in network.spelling:
            theirs = re.sub(pattern, replacement, theirs)
        wanted[theirs] = Slot(ours, tuple(tensor.shape))
    return wanted


def _wanted_fsr(prefix: str, channels: int, num_classes: int) -> dict[str, Slot]:
    """The same for FSR: two networks of three convolutions and two batch norms, and the auxiliary head."""
    shapes: dict[str, Shape] = {
        "0.weight": (HIDDEN, channels, 3, 3),
        "3.weight": (HIDDEN, HIDDEN, 3, 3),
        "6.weight": (channels, HIDDEN, 3, 3),
    }
    vectors = ("weight", "bias", "running_mean", "running_var")
    for norm in (1, 4):
        shapes |= {f"{norm}.{name}": (HIDDEN,) for name in vectors}
        shapes[f"{norm}.num_batches_tracked"] = ()
    wanted = {
        "aux.0.weight": Slot(f"{prefix}.head.weight", (num_classes, channels)),
        "aux.0.bias": Slot(f"{prefix}.head.bias", (num_classes,)),
    }
    for ours, theirs in (("separation", "separation.sep_net"), ("recalibration", "recalibration.rec_net")):
        for key, shape in shapes.items():
            wanted[f"{theirs}.{key}"] = Slot(f"{prefix}.{ours}.{key}", shape)
    return wanted


def _fitted(tensor: Tensor, slot: Slot, key: str) -> Tensor:
    """`tensor` as it is, or as a 1x1 convolution where timm has one in place of a linear layer."""
    if tuple(tensor.shape) == slot.shape:
        return tensor
    if (*tensor.shape, 1, 1) == slot.shape:
        return tensor.reshape(slot.shape)
    raise ValueError(
        f"{key!r} has the shape {tuple(tensor.shape)}, but {slot.key!r} needs {slot.shape}; only"
        " networks of the official widths, for RGB images of 32x32, can be converted"
    )


def _listed(keys: Iterable[str]) -> str:
    names = [str(key) for key in keys]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
        raise ValueError(unknown("architecture to convert to", architecture, list(defaults.CONVERTIBLE)))
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
