"""Weights of the official FSR implementation, renamed for the FSR variants of this package.

The official code (github.com/wkim97/FSR, Kim et al., CVPR 2023) has three networks for 32x32 images. Each
entry of `NETWORKS` says how the keys of our network are spelt there; the conversion walks over *our* keys, so
what it returns is complete, and what it cannot place is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

Shape = tuple[int, ...]

WRAPPERS = ("state_dict", "net", "model")  # names under which checkpoints keep the state dict
PARALLEL = "module."  # what DataParallel puts before each key
VGG_BLOCKS = ((0, 6), (7, 13), (14, 23), (24, 33), (34, 43))  # in timm's `features`; a pool follows each

HIDDEN = 64  # width of the official separation and recalibration networks
SHOWN = 8  # keys that an error message lists before it only counts


class Target(NamedTuple):
    """Where an official weight goes: our key, and the shape it must have there."""

    key: str
    shape: Shape


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
    official = _unwrap(state_dict)
    network = _recognise(official)
    head = official.get("aux.0.weight")
    wanted = _wanted(network, num_classes=10 if head is None else len(head))
    missing = [key for key in wanted if key not in official]
    unknown = [key for key in official if key not in wanted and not key.startswith(network.unused)]
    if missing or unknown:
        found = {"missing": missing, "unknown": unknown}
        problems = "; ".join(f"{what}: {_listed(keys)}" for what, keys in found.items() if keys)
        raise ValueError(
            f"the state dict looks like the official {network.title}, but its keys differ ({problems});"
            " give the state dict of the official network, whole and unchanged"
        )
    return {target.key: _fitted(official[key], target, key) for key, target in wanted.items()}


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in `checkpoint`, without wrapper and without DataParallel's prefix."""
    for name in WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            return _unwrap(checkpoint[name])
    if checkpoint and all(key.startswith(PARALLEL) for key in checkpoint):
        return {key.removeprefix(PARALLEL): value for key, value in checkpoint.items()}
    return dict(checkpoint)


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


def _wanted(network: OfficialNetwork, num_classes: int) -> dict[str, Target]:
    """Each official key that must be there, and where it goes.

    The backbone is built without weights, by its timm name: importing the package has registered it.
    """
    with torch.device("meta"):
        backbone: Any = timm.create_model(network.backbone, num_classes=num_classes)
    wanted = {}
    for ours, tensor in backbone.state_dict().items():
        theirs = ours
        for pattern, replacement in network.spelling:
            theirs = re.sub(pattern, replacement, theirs)
        wanted[theirs] = Target(ours, tuple(tensor.shape))
    info = backbone.feature_info[network.place]
    site = info["module"].replace(".", "_")
    return wanted | _wanted_fsr(f"fsr.{site}", info["num_chs"], num_classes)


def _wanted_fsr(prefix: str, channels: int, num_classes: int) -> dict[str, Target]:
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
        "aux.0.weight": Target(f"{prefix}.head.weight", (num_classes, channels)),
        "aux.0.bias": Target(f"{prefix}.head.bias", (num_classes,)),
    }
    for ours, theirs in (("separation", "separation.sep_net"), ("recalibration", "recalibration.rec_net")):
        for key, shape in shapes.items():
            wanted[f"{theirs}.{key}"] = Target(f"{prefix}.{ours}.{key}", shape)
    return wanted


def _fitted(tensor: Tensor, target: Target, key: str) -> Tensor:
    """`tensor` as it is, or as a 1x1 convolution where timm has one in place of a linear layer."""
    if tuple(tensor.shape) == target.shape:
        return tensor
    if (*tensor.shape, 1, 1) == target.shape:
        return tensor.reshape(target.shape)
    raise ValueError(
        f"{key!r} has the shape {tuple(tensor.shape)}, but {target.key!r} needs {target.shape}; only"
        " networks of the official widths, for RGB images of 32x32, can be converted"
    )


def _listed(keys: Iterable[str]) -> str:
    names = [str(key) for key in keys]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
