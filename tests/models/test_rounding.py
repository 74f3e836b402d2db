"""Half of the bytes: what rounding changes, what it does not, and that a report is about the rounded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.hub_tools import RECIPE, report_on
from torch import nn

import timm_fsr
from timm_fsr.hub.publish import collect
from timm_fsr.models.saving import load, training_report, weights_digest

HALVES = [torch.float16, torch.bfloat16]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet_tiny_cifar_fsr", num_classes=10).train()
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))  # statistics that no half has
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
class TestRounding:
    def test_matrices_and_kernels_are_the_nearest_halves_and_all_else_stays(self, dtype):
        model, before = network(), network().state_dict()
        assert timm_fsr.round_weights(model, dtype) is model
        changed = 0
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == before[name].dtype
            expected = before[name].to(dtype).to(tensor.dtype) if before[name].ndim > 1 else before[name]
            assert torch.equal(tensor, expected), name
            changed += not torch.equal(tensor, before[name])
        assert changed > 10

    def test_what_is_loaded_is_the_rounded_model_bit_for_bit_in_half_the_bytes(self, dtype, tmp_path, images):
        model = timm_fsr.round_weights(network(), dtype)
        whole = timm_fsr.save_pretrained(model, tmp_path / "whole") / "model.safetensors"
        halved = timm_fsr.save_pretrained(model, tmp_path / "half", dtype=dtype) / "model.safetensors"
        assert halved.stat().st_size < 0.53 * whole.stat().st_size
        kinds = {name: tensor.dtype for name, tensor in load_file(halved).items()}
        assert kinds["conv1.weight"] == dtype
        assert kinds["bn1.running_var"] == torch.float32
        loaded = [timm.create_model(f"local-dir:{halved.parent}", pretrained=True), load(str(halved.parent))]
        with torch.no_grad():
            expected = model(images)
            for other in loaded:
                assert all(parameter.dtype == torch.float32 for parameter in other.parameters())
                assert torch.equal(other.eval()(images), expected)

    def test_other_weights_are_not_rounded_in_silence(self, dtype, tmp_path):
        with pytest.raises(ValueError, match=r"weight would be changed .*round_weights\(model, torch"):
            timm_fsr.save_pretrained(network(), tmp_path, dtype=dtype)
        assert list(tmp_path.iterdir()) == []

    def test_its_report_belongs_to_it_and_one_of_the_unrounded_does_not(self, dtype, tmp_path):
        model = network()
        reports = {"before": report_on(model), "after": report_on(timm_fsr.round_weights(model, dtype))}
        folder = tmp_path / "half"
        timm_fsr.save_pretrained(model, folder, report=reports["after"], recipe=RECIPE, dtype=dtype, license="mit")
        record = json.loads((folder / "config.json").read_text())["timm_fsr"]
        assert record["dtype"] == str(dtype).removeprefix("torch.")
        assert record["sha256"] != weights_digest(model) == weights_digest(load(str(folder)))
        assert training_report(str(folder), load(str(folder))) is not None
        card = collect(folder, "user/name")["README.md"].decode()
        assert f"half precision ({record['dtype']})" in card
        assert record["sha256"][:16] in card
        timm_fsr.save_pretrained(model, folder, report=reports["before"], recipe=RECIPE, dtype=dtype, license="mit")
        with pytest.raises(ValueError, match="about other weights"):
            collect(folder, "user/name")


class TestRefusals:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float32], ids=str)
    def test_what_is_no_half(self, dtype, tmp_path):
        with pytest.raises(ValueError, match=r"use one of torch\.float16, torch\.bfloat16"):
            timm_fsr.round_weights(network(), dtype)
        with pytest.raises(ValueError, match=r"use one of torch\.float16, torch\.bfloat16"):
            timm_fsr.save_pretrained(network(), tmp_path, dtype=dtype)

    def test_numbers_beyond_float16_are_told_and_change_nothing(self):
        model = network()
        with torch.no_grad():
            model.fc.weight[0, 0] = 1e6
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"fc.weight has numbers that torch.float16 cannot hold"):
            timm_fsr.round_weights(model, torch.float16)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        timm_fsr.round_weights(model, torch.bfloat16)

    def test_buffers_are_rounded_too(self, tmp_path):
        model = network()
        model.register_buffer("table", torch.rand(3, 3))
        timm_fsr.round_weights(model, torch.float16)
        assert torch.equal(model.table, model.table.half().float())
        timm_fsr.save_pretrained(model, tmp_path, dtype=torch.float16)

    def test_a_full_precision_save_notes_no_other(self, tmp_path: Path):
        folder = timm_fsr.save_pretrained(network(), tmp_path)
        assert "dtype" not in json.loads((folder / "config.json").read_text())["timm_fsr"]
