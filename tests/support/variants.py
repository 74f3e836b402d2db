"""A small registered variant."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def variant(**kwargs: Any) -> nn.Module:
    """A registered variant; every tensor, also running statistics, differs from a fresh model's."""
    torch.manual_seed(1)
    model = timm.create_model("resnet_tiny_cifar_fsr", **{"fsr_hidden": 4, **kwargs})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) / 10 if tensor.is_floating_point() else 3)
    return model.eval()
