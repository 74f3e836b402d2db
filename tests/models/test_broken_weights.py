"""Weights that are no numbers, wherever weights are read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_resnet, with_fsr

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.hub.publish import collect
from timm_fsr.models.saving import load, save_pretrained


class TestWeightsThatAreNoNumbers:
    """NaN and infinities are refused wherever weights are read, before anything is judged or sent."""

    @pytest.fixture(params=["fc.weight", "bn1.running_var", "fsr.layer4.separation.0.weight"])
    def broken(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        model = with_fsr(tiny_resnet(in_chans=1))
        with torch.no_grad():
            model.state_dict()[request.param].view(-1)[0] = math.nan if "fc" in request.param else math.inf
        save_pretrained(model, tmp_path / "broken")
        return tmp_path / "broken"

    def test_a_saved_model(self, broken):
        for read in (load, timm_fsr.from_pretrained):
            with pytest.raises(ValueError, match=r"the weights of .*broken hold NaN or infinite numbers \(in .*; 1 of"):
                read(str(broken))

    def test_a_file_of_weights(self, broken):
        weights = str(broken / "model.safetensors")
        with pytest.raises(ValueError, match=r"the weights of .*model\.safetensors hold NaN or infinite"):
            load("resnet_tiny_cifar_fsr", checkpoint_path=weights, in_chans=1, fsr_hidden=4)

    def test_commands(self, broken, capsys):
        commands = [
            ["evaluate", str(broken), "--limit=4", "--attacks", "fgsm"],
            ["train", f"--model.name={broken}", f"--output={broken.parent / 'run'}"],
        ]
        for command in commands:
            assert main(command) == 2
            assert "hold NaN or infinite numbers (in" in capsys.readouterr().err
        assert not (broken.parent / "run" / "recipe.yaml").exists()

    def test_what_is_to_be_published(self, broken):
        model = with_fsr(tiny_resnet(in_chans=1)).eval()
        data = timm_fsr.load_data("fashion_mnist", "test", limit=4, progress=False)
        timm_fsr.evaluate(model, data, attacks=[]).save(broken / "report.json")
        with pytest.raises(ValueError, match=r"hold NaN or infinite"):
            collect(broken, "user/name")
