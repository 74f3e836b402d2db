"""Tiny timm models of every feature layout, for contract tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyBackbone:
    """A timm model that builds and runs forward in milliseconds, for tests over feature layouts.

    `layout` and `prefix_tokens` describe the output of the last module in its `feature_info`.
    """

    id: str
    name: str
    input_size: tuple[int, int, int]
    layout: str
    prefix_tokens: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def create(self, num_classes: int = 10, **kwargs: Any) -> nn.Module:
        """Build the model with fresh weights, `kwargs` added to its own."""
        return timm.create_model(self.name, num_classes=num_classes, **{**self.kwargs, **kwargs})

    def images(self, batch: int = 2) -> Tensor:
        """Random images (batch, 3, H, W) in [0, 1], the same ones in each call."""
        return torch.rand(batch, *self.input_size, generator=torch.Generator().manual_seed(0))


_VIT = {"img_size": 64}
_DEIT = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}
_SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
_PREACT = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
TINY_BACKBONES = (
    TinyBackbone("resnet", "test_resnet", (3, 64, 64), "NCHW"),
    TinyBackbone("preact", "resnetv2_18", (3, 64, 64), "NCHW", kwargs=_PREACT),
    TinyBackbone("convnext-oblong", "test_convnext", (3, 64, 96), "NCHW"),
    TinyBackbone("efficientnet", "test_efficientnet", (3, 64, 64), "NCHW"),
    TinyBackbone("mambaout-oblong", "test_mambaout", (3, 64, 96), "NHWC"),
    TinyBackbone("swin", "swin_tiny_patch4_window7_224", (3, 32, 32), "NHWC", kwargs=_SWIN),
    TinyBackbone("vit-relpos", "test_vit_relpos", (3, 64, 64), "NLC", kwargs=_VIT),
    TinyBackbone("vit-cls", "test_vit", (3, 64, 64), "NLC", 1, _VIT),
    TinyBackbone("vit-cls-reg4", "test_vit", (3, 64, 64), "NLC", 5, {**_VIT, "reg_tokens": 4}),
    TinyBackbone("vit-reg1-oblong", "test_vit2", (3, 64, 96), "NLC", 1, {"dynamic_img_size": True}),
    TinyBackbone("vit-reg1-map", "test_vit3", (3, 64, 64), "NLC", 1, _VIT),
    TinyBackbone("deit-distilled", "deit_tiny_distilled_patch16_224", (3, 64, 64), "NLC", 2, _DEIT),
)
