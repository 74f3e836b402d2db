"""One torch thread per worker, no network, tiny timm models for contract tests, and a Hub on the loopback interface."""

from __future__ import annotations

import os

# Before the imports that read them; subprocesses of tests inherit both.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from hub_tools import Client, save
from torch import Tensor, nn

torch.set_num_threads(1)


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


@pytest.fixture(params=TINY_BACKBONES, ids=lambda backbone: backbone.id)
def backbone(request: pytest.FixtureRequest) -> TinyBackbone:
    """Each tiny backbone in turn."""
    return request.param


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: HubServer, home: Path) -> Iterator[Client]:
    process = Client(hub, home)
    yield process
    process.close()


@pytest.fixture
def repo(hub: HubServer, request: pytest.FixtureRequest) -> str:
    """A name that no other test uses; what was planned for another test is forgotten."""
    hub._plans.clear()
    hub.requests.clear()
    return f"owner/test-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]}"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "saved")
