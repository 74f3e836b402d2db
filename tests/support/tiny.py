"""Two networks so small that a test may train, compile or export them, and a feature layer that reads labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_fsr
from timm_fsr.layers import FeatureLayer
from timm_fsr.layers.base import LAYERS, Aux

CLASSES = 10


def tiny_resnet(**kwargs: Any) -> nn.Module:
    """A ResNet with BatchNorm, for images of any size; its last site is "layer4"."""
    torch.manual_seed(0)
    return timm.create_model("resnet_tiny_cifar", **kwargs)


def tiny_vit(**kwargs: Any) -> nn.Module:
    """A ViT of two blocks and a 4x4 grid for 32x32 images; its last site is "blocks.1"."""
    torch.manual_seed(0)
    widths = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    return timm.create_model("vit_tiny_patch4_32", **{**widths, **kwargs})


def with_fsr(model: nn.Module, at: Any = None, **layer_args: Any) -> nn.Module:
    """`model` with narrow FSR layers."""
    torch.manual_seed(1)
    return timm_fsr.attach(model, at=at, layer_args={"hidden": 4, **layer_args})


def images(batch: int = 4, height: int = 32, width: int = 32) -> Tensor:
    """The same images in each call."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


def labels(batch: int = 4) -> Tensor:
    return torch.arange(batch) % CLASSES


def total_loss(model: nn.Module) -> Tensor:
    """Cross-entropy plus the auxiliary losses of one pass; the tape is gone when it returns."""
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images())
    return F.cross_entropy(logits, labels()) + sum(tape.losses(logits).values())


class LabelScale(FeatureLayer):
    """Scales the channels by a row of weights that the label selects; without a label by the first row."""

    name = "label_scale"

    def __init__(self, channels: int, num_classes: int, *, start: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.rows = nn.Parameter(torch.full((num_classes + 1, channels), start))

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        rows = self.rows[:1] if labels is None else self.rows[labels + 1]
        return feature * rows[:, :, None, None], {"rows": rows} if self.wants_aux else {}

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"size": aux["rows"].square().mean()}


@contextmanager
def layers_registered(*layers: type[FeatureLayer]) -> Iterator[None]:
    """Within it these are layers like any other, but without variants in timm; outside they are not listed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LAYERS, "_observers", [])
        for layer in layers:
            assert timm_fsr.register_layer(layer) is layer
    try:
        yield
    finally:
        for layer in layers:
            LAYERS.remove(layer.name)


def label_scale_registered() -> AbstractContextManager[None]:
    """Within it `LabelScale` is a layer like any other; outside it is not listed."""
    return layers_registered(LabelScale)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def traces(model: nn.Module) -> list[str]:
    """What plug-ins leave on modules: hooks and attributes of ours."""
    return [
        f"{path}: {name}"
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name.startswith("_timm_fsr") or ("hooks" in name and value) or name == "reset_classifier"
    ]


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    found, expected = (
        {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        for model in (one, other)
    )
    assert expected
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


BRIEF_TRAINING = [
    "--data.limit_train=120",
    "--data.held_out=20",
    "--attack.steps=1",
    "--optim.epochs=1",
    "--optim.batch_size=50",
    "--evaluation.validation_steps=1",
]
"""Flags that leave two steps of a recipe, on embedded images."""
