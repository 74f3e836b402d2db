"""PEFT on models with feature layers: LoRA, modules that are trained whole, merging, saving, loading again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.tiny import images, tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

import timm_fsr

peft = pytest.importorskip("peft")

LABELS = torch.tensor([0, 1, 2, 3])
CASES = {
    "backbone": (tiny_resnet, ["layer4.0.conv1"], ["fc"]),
    "fsr": (tiny_resnet, ["separation.0", "separation.6", "recalibration.3"], ["fc"]),
    "whole layer": (tiny_resnet, ["layer3.0.conv1", "layer4.0.conv1"], ["fsr.layer4", "fc"]),
    "vit": (tiny_vit, ["qkv", "fsr.blocks_1.separation.0"], ["model.head"]),
    "vit, whole layer": (tiny_vit, ["qkv"], ["fsr.blocks_1", "model.head"]),
}


def network_with_fsr(network: Any) -> nn.Module:
    """With blocks that pass gradients on: timm starts residual branches at zero."""
    model = with_fsr(network())
    for weight in model.parameters():
        if not weight.any():
            nn.init.constant_(weight, 0.5)
    return model


def adapted(model: nn.Module, targets: list[str], whole: list[str]) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=whole))


def train(model: nn.Module) -> nn.Module:
    """Two steps, in which BatchNorm keeps its statistics: an adapter has no place for them."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(2):
        with timm_fsr.record(model, LABELS) as tape:
            logits = model(images())
        loss = F.cross_entropy(logits, LABELS) + sum(tape.losses(logits).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(images())


@pytest.mark.parametrize(("network", "targets", "whole"), CASES.values(), ids=CASES)
def test_trained_merged_saved_and_loaded_it_is_the_same(tmp_path, network, targets, whole):
    base = network_with_fsr(network)
    model = train(adapted(copy.deepcopy(base), targets, whole))
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-4)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    timm_fsr.save_pretrained(merged, tmp_path / "merged")
    for loaded in (
        merged,
        timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True),
        timm_fsr.from_pretrained(tmp_path / "merged"),
    ):
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_trained_whole_takes_effect_and_the_rest_stays():
    model = network_with_fsr(tiny_resnet)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    merged = train(adapted(model, ["layer4.0.conv1"], ["fsr.layer4", "fc"])).merge_and_unload()
    changed = {name for name, weight in merged.named_parameters() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"fsr", "fc", "layer4"}
    assert {name for name in changed if name.startswith("layer4")} == {"layer4.0.conv1.weight"}
    assert {name for name in changed if name.startswith("fsr")} >= {"fsr.layer4.separation.0.weight"}


def test_attacks_see_through_the_adapters():
    model = train(adapted(network_with_fsr(tiny_resnet), ["layer4.0.conv1"], ["fsr.layer4", "fc"]))
    pixels = timm_fsr.PixelModel(model)
    found = timm_fsr.PGD(eps=0.1, steps=2).attack(pixels, images(), LABELS)
    assert F.cross_entropy(model(found), LABELS) > F.cross_entropy(model(images()), LABELS)


@pytest.mark.parametrize("which", ["wrapper", "inside"])
def test_what_is_not_merged_is_not_saved(tmp_path, which):
    inner = network_with_fsr(tiny_resnet)
    outer = adapted(inner, ["layer4.0.conv1"], ["fc"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        timm_fsr.save_pretrained(outer if which == "wrapper" else inner, tmp_path / "model")
    assert not (tmp_path / "model").exists()
