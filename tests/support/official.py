"""State dicts of the official FSR networks."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_fsr"


SALT = "fsr-0:"


NETWORKS = {  # official name -> our backbone, site of its FSR layer
    "resnet18": ("resnet18_cifar", "layer4"),
    "vgg16": ("vgg16_bn_cifar", "features_32"),
    "wrn34_10": ("wrn34_10_cifar", "norm"),
}


def official_keys(network: str) -> dict[str, list[int]]:
    return dict(json.loads((OFFICIAL / f"{network}.keys.json").read_text()))


def official_weight(key: str, shape: list[int]) -> Tensor:
    """The weight that the fixtures' README prescribes."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    values = np.random.RandomState(zlib.crc32((SALT + key).encode())).standard_normal(shape)
    if key.endswith("running_var"):
        values = 1 + 0.2 * np.abs(values)
    elif len(shape) == 1:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    else:
        values *= np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(values).float()


def official_weights(network: str) -> dict[str, Tensor]:
    """The state dict of an official network; the WRN's unused block is left uninitialised."""
    return {
        key: torch.empty(shape) if key.startswith("sub_block1.") else official_weight(key, shape)
        for key, shape in official_keys(network).items()
    }
