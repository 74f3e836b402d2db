from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.official import NETWORKS, official_keys, official_weight
from torch import Tensor, nn

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.models.conversion import PLAIN, convert_checkpoint, convert_plain
from timm_fsr.models.weight_files import read_foreign

SPELLING = {  # ours -> as RobustBench's checkpoints have it, written by hand for a few keys of each network
    "resnet18_cifar": {
        "conv1.weight": "conv1.weight",
        "layer2.0.downsample.0.weight": "layer2.0.shortcut.0.weight",
        "layer2.0.downsample.1.running_mean": "layer2.0.shortcut.1.running_mean",
        "fc.bias": "linear.bias",
    },
    "preact_resnet18_cifar": {
        "stem.conv.weight": "conv1.weight",
        "stages.1.blocks.0.norm1.weight": "layer2.0.bn1.weight",
        "stages.1.blocks.0.downsample.conv.weight": "layer2.0.shortcut.0.weight",
        "norm.running_var": "bn.running_var",
        "head.fc.weight": "linear.weight",
    },
    "wrn28_10_cifar": {
        "stem.conv.weight": "conv1.weight",
        "stages.0.blocks.3.norm2.bias": "block1.layer.3.bn2.bias",
        "stages.2.blocks.0.downsample.conv.weight": "block3.layer.0.convShortcut.weight",
        "norm.weight": "bn1.weight",
        "head.fc.bias": "fc.bias",
    },
}


class PreActBlock(nn.Module):
    """As kuangliu wrote it, whose spelling RobustBench keeps."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or width != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x).relu()
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(self.bn2(self.conv1(out)).relu()) + shortcut


class PreActResNet18(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        widths = (64, 64, 128, 256, 512)
        for stage in range(4):
            blocks = [PreActBlock(widths[stage], widths[stage + 1], 1 if stage == 0 else 2)]
            blocks.append(PreActBlock(widths[stage + 1], widths[stage + 1], 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.bn(out).relu().mean((2, 3)))


def spelt(architecture: str, classes: int = 10) -> dict[str, Tensor]:
    """Weights of a plain network of ours in the foreign spelling, by the conversion's own table backwards."""
    from timm_fsr.models.conversion import _wanted_backbone

    state = timm.create_model(architecture, num_classes=classes).state_dict()
    wanted = _wanted_backbone(PLAIN[architecture], classes)
    return {
        theirs: state[target.key].reshape(state[target.key].shape[:2])
        if theirs.endswith(("fc.weight", "linear.weight"))
        else state[target.key]
        for theirs, target in wanted.items()
    }


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


class TestPlain:
    @pytest.mark.parametrize("architecture", list(SPELLING))
    def test_the_spelling_is_that_of_the_field(self, architecture):
        from timm_fsr.models.conversion import _wanted_backbone

        with torch.device("meta"):
            wanted = {target.key: theirs for theirs, target in _wanted_backbone(PLAIN[architecture], 10).items()}
        assert {ours: wanted[ours] for ours in SPELLING[architecture]} == SPELLING[architecture]

    def test_an_independent_network_gives_the_same_logits(self):
        torch.manual_seed(0)
        theirs = PreActResNet18(7).eval()
        with torch.no_grad():
            for tensor in theirs.state_dict().values():
                tensor.add_(torch.rand(tensor.shape) / 20 if tensor.is_floating_point() else 1)
        ours = convert_checkpoint({"state_dict": theirs.state_dict()}, "preact_resnet18_cifar")
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("wrap", ["none", "module.", "model.", "module.model.", "state_dict"])
    def test_wrappers_are_taken_off(self, wrap):
        state: Any = spelt("resnet18_cifar", classes=3)
        expected = state["linear.bias"]
        if wrap == "state_dict":
            state = {"epoch": 3, "state_dict": state}
        elif wrap != "none":
            state = {f"{wrap}{key}": value for key, value in state.items()}
        model = convert_checkpoint(state, "resnet18_cifar")
        assert torch.equal(model.fc.bias, expected)
        assert model.num_classes == 3

    def test_timms_own_spelling(self):
        state = timm.create_model("resnet18_cifar", num_classes=5).state_dict()
        model = convert_checkpoint(state, "resnet18_cifar")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_what_normalises_the_images_is_kept(self):
        state = spelt("resnet18_cifar")
        statistics = {"mu": torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), "sigma": torch.full((3, 1, 1), 0.25)}
        model = convert_checkpoint({**state, **statistics}, "resnet18_cifar")
        assert model.pretrained_cfg["mean"] == pytest.approx((0.5, 0.4, 0.3))
        assert model.pretrained_cfg["std"] == pytest.approx((0.25,) * 3)
        model = convert_checkpoint(state, "resnet18_cifar", mean=(0.1,) * 3, std=(0.2,) * 3)
        assert model.pretrained_cfg["mean"] == (0.1,) * 3

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state, stats: {"state_dict": {**prefixed(state, "model."), **stats}},
            lambda state, stats: prefixed({**state, **stats}, "module.model."),
            lambda state, stats: {**prefixed(state, "module.model."), **prefixed(stats, "module.")},
            lambda state, stats: {"net": {"model": prefixed({**prefixed(state, "net."), **stats}, "module.")}},
            lambda state, stats: {"state_dict": state, "epoch": 3, **stats},
        ],
        ids=["wrapped", "both inside", "beside", "deep", "beside the state dict"],
    )
    def test_what_normalises_is_found_in_any_wrapper(self, wrap):
        statistics = {"mu": torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), "sigma": torch.full((1, 3, 1, 1), 0.25)}
        model = convert_checkpoint(wrap(spelt("resnet18_cifar"), statistics), "resnet18_cifar")
        assert model.pretrained_cfg["mean"] == pytest.approx((0.5, 0.4, 0.3))
        assert model.pretrained_cfg["std"] == pytest.approx((0.25,) * 3)

    def test_a_state_dict_alone_does_not_lose_it(self):
        given = {**spelt("resnet18_cifar"), "mu": torch.tensor([0.5]), "sigma": torch.tensor([0.25])}
        with pytest.raises(ValueError, match=r"mean \(0\.5,\) and std \(0\.25,\).*cannot keep; use `timm-fsr convert`"):
            convert_plain(given, "resnet18_cifar")
        model = convert_checkpoint(given, "resnet18_cifar")
        assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == ((0.5,) * 3, (0.25,) * 3)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"mean": (0.5, 0.5)}, "mean .*is not one finite number for all or each of 3 channels"),
            ({"mean": (math.nan, 0, 0)}, "mean .*is not one finite number"),
            ({"std": (0.2, math.inf, 0.2)}, "std .*is not one finite number"),
            ({"std": (0.2, 0.0, 0.2)}, "must be positive.*give another --std"),
            ({"std": (-1.0, 1.0, 1.0)}, "must be positive"),
        ],
    )
    def test_statistics_that_cannot_be(self, given, message):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(spelt("resnet18_cifar"), "resnet18_cifar", **given)
        stored = {"mu": torch.tensor(given.get("mean", [0.5])), "sigma": torch.tensor(given.get("std", [0.2]))}
        with pytest.raises(ValueError, match=message):
            convert_checkpoint({**spelt("resnet18_cifar"), **stored}, "resnet18_cifar")

    def test_weights_of_a_run_that_diverged(self):
        state = spelt("resnet18_cifar")
        state["linear.weight"] = state["linear.weight"] * math.nan
        with pytest.raises(ValueError, match=r"'fc\.weight' holds numbers that are not finite"):
            convert_checkpoint(state, "resnet18_cifar")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({1: 2}, "1 in the checkpoint is no named tensor but int; give a state dict"),
            ({"linear.bias": "x"}, "'linear.bias' in the checkpoint is no named tensor but str"),
            ({"conv1.weight": 3.0}, "'conv1.weight' in the checkpoint is no named tensor but float"),
            ({"mean": [0.4] * 3, "std": [0.2] * 3}, "'mean' in the checkpoint is no named tensor but list"),
            ({"linear.weight": torch.tensor(1.0)}, "has the shape"),
        ],
    )
    def test_what_is_no_state_dict(self, change, message):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint({**spelt("resnet18_cifar"), **change}, "resnet18_cifar")

    def test_a_checkpoint_that_holds_itself(self):
        given: dict[str, Any] = {}
        given["net"] = given
        with pytest.raises(ValueError, match="wrapped more than 10 times, or holds itself; give a state dict"):
            convert_checkpoint(given, "resnet18_cifar")

    @pytest.mark.parametrize(
        ("change", "architecture", "message"),
        [
            (lambda s: s.pop("bn1.weight"), "resnet18_cifar", "missing: bn1.weight"),
            (lambda s: s.update(extra=torch.ones(1)), "resnet18_cifar", "unknown: extra"),
            (lambda s: s.update({"conv1.weight": torch.ones(8, 3, 3, 3)}), "resnet18_cifar", "has the shape"),
            (lambda s: None, "wrn28_10_cifar", "looks like WideResNet-28-10, but its keys differ"),
            (lambda s: None, "resnet18_cifar_fsr", r"no FSR layer: .*--model\.layer=fsr"),
            (lambda s: None, "resnet19_cifar", "did you mean 'resnet18_cifar'"),
        ],
    )
    def test_what_does_not_fit(self, change, architecture, message):
        state = spelt("resnet18_cifar")
        change(state)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(state, architecture)

    def test_under_fsr(self, tmp_path):
        """A plain robust network as the backbone of an FSR model, in each of the ways that the README shows."""
        folder = tmp_path / "plain"
        timm_fsr.save_pretrained(convert_checkpoint(spelt("resnet18_cifar"), "resnet18_cifar"), folder)
        plain = timm_fsr.from_pretrained(folder)
        by_attach = timm_fsr.attach(timm_fsr.from_pretrained(folder), "fsr")
        overlay = {"file": str(folder / "model.safetensors")}
        by_name = timm.create_model("resnet18_cifar_fsr", pretrained_backbone=True, pretrained_cfg_overlay=overlay)
        for model in (by_attach, by_name):
            assert torch.equal(model.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
            assert model.fsr["layer4"] is not None


class TestOfficial:
    @pytest.mark.parametrize("network", ["resnet18", "vgg16"])
    def test_the_official_networks(self, network):
        backbone, _ = NETWORKS[network]
        state = {key: official_weight(key, shape) for key, shape in official_keys(network).items()}
        model = convert_checkpoint({"net": state}, f"{backbone}_fsr")
        expected = timm_fsr.convert_official(state)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

    def test_another_network_than_it_is(self):
        state = {key: official_weight(key, shape) for key, shape in official_keys("vgg16").items()}
        for wrong in ("resnet18_cifar_fsr", "vgg16_bn_cifar", "resnet18_cifar"):
            with pytest.raises(ValueError, match="these are weights of vgg16_bn_cifar_fsr, not of"):
                convert_checkpoint(state, wrong)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class TestReading:
    @pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
    def test_files(self, tmp_path, suffix):
        path = tmp_path / f"a.{suffix}"
        tensors = {"weight": torch.rand(3)}
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
        assert torch.equal(read_foreign(path)["weight"], tensors["weight"])

    def test_the_format_of_old_torch(self, tmp_path):
        torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        assert read_foreign(tmp_path / "a.pth")["weight"].sum() == 2

    @pytest.mark.parametrize("by", ["pickle", "torch", "whole model", "numpy"])
    def test_more_than_tensors_is_refused_and_not_run(self, tmp_path, by):
        marker, path = tmp_path / "executed", tmp_path / "a.pth"
        if by == "pickle":
            path.write_bytes(pickle.dumps({"weight": Bomb(marker)}, protocol=2))
        else:
            torch.save({"torch": {"a": Bomb(marker)}, "whole model": nn.Linear(1, 1), "numpy": np.ones(2)}[by], path)
        with pytest.raises(ValueError, match=r"could run any code .* ask its author for a state dict"):
            read_foreign(path)
        assert not marker.exists()

    @pytest.mark.parametrize(("content", "message"), [(b"", "damaged"), (b"<html>not found</html>", "damaged")])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_damaged(self, tmp_path, suffix, content, message):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_foreign(tmp_path / f"a.{suffix}")

    def test_a_list_and_nothing(self, tmp_path):
        torch.save([torch.ones(1)], tmp_path / "a.pth")
        with pytest.raises(ValueError, match="holds a list, not a dictionary"):
            read_foreign(tmp_path / "a.pth")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_foreign(tmp_path / "b.pth")


class TestCommand:
    def test_convert(self, tmp_path, capsys):
        torch.save(spelt("resnet18_cifar", classes=4), tmp_path / "a.pt")
        given = ["convert", str(tmp_path / "a.pt"), "--arch", "resnet18_cifar", "--output", str(tmp_path / "out")]
        assert main([*given, "--mean", "0.4,0.4,0.4", "--std", "0.2,0.2,0.2"]) == 0
        assert "resnet18_cifar of 4 classes (11.17 M parameters)" in capsys.readouterr().out
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["pretrained_cfg"]["mean"] == [0.4, 0.4, 0.4]
        assert timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).num_classes == 4
        assert main(given) == 2
        assert "holds a model already; choose another folder or add --overwrite" in capsys.readouterr().err
        assert main([*given, "--overwrite"]) == 0

    def test_what_is_refused_writes_nothing(self, tmp_path, capsys):
        torch.save(nn.Linear(1, 1), tmp_path / "a.pt")
        given = ["convert", str(tmp_path / "a.pt"), "--arch", "resnet18_cifar", "--output", str(tmp_path / "out")]
        assert main(given) == 2
        assert "timm-fsr convert: error:" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
