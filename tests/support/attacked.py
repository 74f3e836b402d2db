"""What attack tests share: pixels, labels and losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def robust(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) == labels


EPS = 0.1


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images that also touch both ends of [0, 1]."""
    return (torch.rand(batch, 3, 5, 6, generator=rng(1), dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1).to(dtype)


def labels(batch: int = 4) -> Tensor:
    return torch.arange(batch) % 3


def loss_of(model: nn.Module, reduction: str = "none") -> Callable[[Tensor], Tensor]:
    return lambda images: F.cross_entropy(model(images), labels(len(images)), reduction=reduction)
