"""A feature layer defined outside of the package: everything that works with FSR works with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.runs import metrics, tiny
from support.tiny import LabelScale, label_scale_registered
from support.variants import only
from torch import nn

import timm_fsr
from timm_fsr.layers import LAYERS
from timm_fsr.models.pixel import PixelModel
from timm_fsr.training.trainer import train

NAME = LabelScale.name


@pytest.fixture
def own_layer() -> Iterator[None]:
    with label_scale_registered(), only("resnet_tiny_cifar", "vit_tiny_patch4_32"):
        timm_fsr.register_variants((NAME,))
        yield


def pixels(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("own_layer")
def test_it_is_built_by_name_and_on_any_model() -> None:
    model = timm.create_model(f"resnet_tiny_cifar_{NAME}", num_classes=10, label_scale_start=2.0)
    assert model.get_submodule(NAME)["layer4"].start == 2.0
    vit = timm_fsr.attach(timm.create_model("vit_tiny_patch4_32", depth=2), NAME, at="stages")
    with timm_fsr.record(vit, torch.arange(6)) as tape:
        logits = vit(pixels())
    assert set(tape.losses(logits)) == {f"{NAME}.size"}


@pytest.mark.usefixtures("own_layer")
def test_it_is_trained_by_recipe_saved_and_reloaded(tmp_path: Path) -> None:
    flags = [f"--model.layer={NAME}", f"--model.layer_args.{NAME}.start=0.5", "--evaluation.attacks=[fgsm]"]
    trained: nn.Module = train(tiny(tmp_path, *flags))
    assert metrics(tmp_path)[-1][f"loss.{NAME}.size"] > 0
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(reloaded(images), trained.eval()(images))
    assert reloaded.get_submodule(NAME)["layer4"].start == 0.5


@pytest.mark.usefixtures("own_layer")
def test_it_is_attacked_adaptively() -> None:
    model = PixelModel(timm.create_model(f"resnet_tiny_cifar_{NAME}", num_classes=10)).eval()
    report = timm_fsr.evaluate(model, (pixels(), torch.arange(6)), eps=1e-3, attacks=["adaptive"])
    assert {"identity", "bypass", "joint 1", "eot"} <= report.stages["adaptive"].keys()


def test_the_example_of_the_docs_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    try:
        with only("resnet50"):
            exec(example, names)
            with timm_fsr.record(names["model"], torch.arange(2)) as tape:
                logits = names["model"](torch.rand(2, 3, 64, 64))
            assert set(tape.losses(logits)) == {"gate.size"}
    finally:
        LAYERS.remove("gate")


def test_the_docs_name_every_layer() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(timm_fsr.list_layers())
