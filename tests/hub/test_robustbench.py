"""RobustBench export: its file format, and checkpoints loaded by the call that its load_model makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import images
from timm.models import _registry
from torch import Tensor, nn

import timm_fsr.hub.robustbench
from timm_fsr.hub.robustbench import model_info, register_alias, save_model_info
from timm_fsr.models.pixel import PixelModel, as_pixel_model, base_model
from timm_fsr.models.pretrained import list_pretrained
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report

ABOUT = {
    "link": "https://arxiv.org/abs/2303.13846",
    "name": "Feature Separation and Recalibration for Adversarial Robustness",
    "authors": "A, B",
    "dataset": "cifar10",
    "venue": "CVPR 2023",
    "architecture": "ResNet-18",
}


IMAGENET = {"data": "ILSVRC/imagenet-1k[validation] limited to 5000", "image_size": [3, 224, 224]}
AIRPLANE_TO_TRUCK = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def report() -> Report:
    """CIFAR-10's test images, 8,571 of them right and 5,714 under AutoAttack."""
    outcomes = {"clean": 8_571, "pgd20": 7_143, "autoattack": 5_714}
    return Report(
        correct={name: torch.arange(10_000) < right for name, right in outcomes.items()},
        conditions={"data": "uoft-cs/cifar10[test]", "image_size": [3, 32, 32]},
        attacks={"pgd20": "PGD(...)", "autoattack": "standard"},
        norm="linf",
        eps=8 / 255,
        seed=0,
    )


class TestModelInfo:
    def test_keys_order_and_formats_are_robustbenchs(self, report):
        """As in its model_info/cifar10/Linf/Rice2020Overfitting.json."""
        info = model_info(report, **ABOUT, reported=0.58)
        assert list(info.items()) == [
            ("link", ABOUT["link"]),
            ("name", ABOUT["name"]),
            ("authors", "A, B"),
            ("additional_data", False),
            ("number_forward_passes", 1),
            ("dataset", "cifar10"),
            ("venue", "CVPR 2023"),
            ("architecture", "ResNet-18"),
            ("eps", "8/255"),
            ("clean_acc", "85.71"),
            ("reported", "58.00"),
            ("autoattack_acc", "57.14"),
        ]

    def test_what_is_optional_is_left_out_or_said(self, report):
        assert model_info(report, **ABOUT)["reported"] == ""
        info = model_info(
            report, **ABOUT, additional_data=True, number_forward_passes=2, footnote="Ünïcode.", unreliable=False
        )
        assert list(info)[-2:] == ["footnote", "unreliable"]
        assert (info["additional_data"], info["number_forward_passes"], info["unreliable"]) == (True, 2, False)

    @pytest.mark.parametrize(
        ("dataset", "norm", "eps", "text"),
        [("cifar10", "l2", 0.5, "0.5"), ("imagenet", "linf", 4 / 255, "4/255"), ("cifar100", "linf", 8 / 255, "8/255")],
    )
    def test_the_radius_is_written_as_there(self, report, dataset, norm, eps, text):
        images = {"cifar10": {}, "cifar100": {"data": "x/cifar100_folder[test]"}, "imagenet": IMAGENET}[dataset]
        count = 5_000 if dataset == "imagenet" else 10_000
        found = replace(
            report,
            norm=norm,
            eps=eps,
            correct={name: flags[:count] for name, flags in report.correct.items()},
            conditions={**report.conditions, **images},
        )
        assert model_info(found, **{**ABOUT, "dataset": dataset})["eps"] == text

    @pytest.mark.parametrize(
        ("changes", "arguments", "message"),
        [
            ({"correct": {"clean": torch.tensor([True])}}, {}, r"holds clean but not 'autoattack'.*attacks=\["),
            (
                {"conditions": {"autoattack_nonstandard": "apgd-t tries 3 targets"}},
                {},
                r"not the standard one \(apgd-t tries 3 targets\)",
            ),
            ({"norm": "l1"}, {}, "norm='l1'"),
            ({"eps": 4 / 255}, {}, r"about Linf 4/255, but RobustBench ranks cifar10 in linf by eps 8/255"),
            ({"norm": "l2", "eps": 1.0}, {}, r"ranks cifar10 in l2 by eps 0\.5; evaluate with that"),
            (
                {},
                {"dataset": "imagenet"},
                r"about uoft-cs/cifar10\[test\], which is CIFAR-10, but RobustBench ranks imagenet",
            ),
            ({}, {"dataset": "cifar-10"}, "did you mean 'cifar10'"),
            ({}, {"reported": 56.5}, "give it in .0, 1."),
            ({}, {"number_forward_passes": 0}, "number_forward_passes=0"),
        ],
    )
    def test_refusals(self, report, changes, arguments, message):
        with pytest.raises(ValueError, match=message):
            model_info(replace(report, **changes), **{**ABOUT, **arguments})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"data": "fashion_mnist[test]"},
                r"calls its images 'fashion_mnist\[test\]', which does not say that they are",
            ),
            (
                {"data": "fashion-mnist[test] limited to 2000"},
                "does not say that they are CIFAR-10.*--data uoft-cs/cifar10",
            ),
            ({"data": ""}, "calls its images 'nothing'"),
            ({"data": "uoft-cs/cifar100[test]"}, "which is CIFAR-100, but RobustBench ranks cifar10 by 10,000 images"),
            ({"data": "x/cifar10.1[test]"}, "does not say that they are CIFAR-10"),
            ({"data": "x/CIFAR-10-C[test]"}, "does not say that they are CIFAR-10"),
            ({"classes": ["T-shirt/top"] + ["Bag"] * 9}, "has the classes T-shirt/top, Bag, Bag, ..., but RobustBench"),
            ({"classes": ["0", "1"]}, "has 2 classes, not 10"),
            ({"data": "uoft-cs/cifar10[train]"}, "about the split 'train', but .* its test split"),
            ({"data": "uoft-cs/cifar10[test] held-out (5 of 10, seed 0)"}, "does not say that"),
            (
                {"image_size": [1, 28, 28]},
                "about images of 1 x 28 x 28, but RobustBench's of CIFAR-10 have 3 x 32 x 32",
            ),
            ({"image_size": [3, 64, 64]}, "images of 3 x 64 x 64"),
            ({"image_size": None}, "does not say how large its images are.*evaluate again"),
        ],
    )
    def test_reports_on_other_images(self, report, changes, message):
        with pytest.raises(ValueError, match=message):
            model_info(replace(report, conditions={**report.conditions, **changes}), **ABOUT)

    def test_a_model_that_does_not_work(self, report):
        labels = torch.arange(10_000) % 10
        found = replace(report, labels=labels, correct=dict.fromkeys(report.correct, labels == 3))
        with pytest.raises(
            ValueError, match=r"it answers the class 3 for nearly all images .* a ranking of it would mean"
        ):
            model_info(found, **ABOUT)

    def test_a_part_of_the_images(self, report):
        part = {name: flags[:1_000] for name, flags in report.correct.items()}
        with pytest.raises(ValueError, match="about 1,000 images, but RobustBench ranks cifar10 by 10,000"):
            model_info(replace(report, correct=part), **ABOUT)

    def test_the_embedded_checkpoints_report_is_no_row_of_cifar10(self):
        entry = next(entry for entry in list_pretrained() if entry.name.endswith(".at_fashion_mnist"))
        found = replace(Report.load(entry.folder), eps=8 / 255)
        with pytest.raises(
            ValueError, match=r"the classes T-shirt/top, Trouser, Pullover, \.\.\., but RobustBench ranks cifar10"
        ):
            model_info(found, **ABOUT)

    @pytest.mark.parametrize("dataset", ["cifar100", "imagenet"])
    def test_a_norm_that_is_not_ranked(self, report, dataset):
        images = {"cifar100": {"data": "cifar100[test]"}, "imagenet": IMAGENET}[dataset]
        count = 5_000 if dataset == "imagenet" else 10_000
        part = {name: flags[:count] for name, flags in report.correct.items()}
        found = replace(report, norm="l2", eps=0.5, correct=part, conditions={**report.conditions, **images})
        with pytest.raises(ValueError, match=f"RobustBench has no l2 ranking of {dataset}"):
            model_info(found, **{**ABOUT, "dataset": dataset})

    @pytest.mark.parametrize(
        "changes",
        [
            {"data": "/home/x/cifar10_folder[test]"},
            {"data": "data/CIFAR-10/test.parquet[test]"},
            {"data": "pictures[test]", "classes": AIRPLANE_TO_TRUCK},
            {"data": "pictures[test]", "classes": ["plane", "car", *AIRPLANE_TO_TRUCK[2:]]},
            {"classes": [str(index) for index in range(10)]},
        ],
    )
    def test_ways_to_name_the_images(self, report, changes):
        assert model_info(replace(report, conditions={**report.conditions, **changes}), **ABOUT)

    def test_an_evaluation_notes_the_size_of_its_images(self):
        pictures, labels = images(), torch.zeros(4, dtype=torch.int64)
        found = timm_fsr.evaluate(tiny(), (pictures, labels), attacks=["fgsm"])
        assert found.conditions["image_size"] == [3, 32, 32]

    def test_a_standard_autoattack_may_say_so(self, report):
        assert model_info(replace(report, conditions={**report.conditions, "autoattack_nonstandard": ""}), **ABOUT)

    def test_the_file_is_written_as_robustbench_does(self, report, tmp_path):
        info = model_info(report, **ABOUT, footnote="Ünïcode.")
        path = tmp_path / "model_info" / "cifar10" / "Linf" / "Kim2023Feature.json"
        for _ in range(2):  # the second time there is a file
            assert save_model_info(info, path) == path
        assert path.read_text() == json.dumps(info, indent=2) + "\n"
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def robustbench_load(name: str, num_classes: int = 10, checkpoint_path: str = "") -> nn.Module:
    """The call that robustbench.load_model makes once it has found a timm model of that name."""
    assert timm.is_model(name)
    return timm.create_model(name, num_classes=num_classes, pretrained=True, checkpoint_path=checkpoint_path).eval()


def tiny(mean: float = 0.0, std: float = 1.0, seed: int = 0, **kwargs: Any) -> nn.Module:
    """An FSR network with a mean and a std of its own."""
    torch.manual_seed(seed)
    overlay = {"mean": (mean,) * 3, "std": (std,) * 3}
    arguments: dict[str, Any] = {"num_classes": 10, "fsr_hidden": 4, **kwargs}
    return timm.create_model("resnet_tiny_cifar_fsr", pretrained_cfg_overlay=overlay, **arguments).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(images())


@pytest.fixture(autouse=True)
def timm_restored() -> Iterator[None]:
    """What a test registers in timm is gone after it."""
    module = timm_fsr.hub.robustbench
    before, public = set(_registry._model_entrypoints), list(module.__all__)
    yield
    for name in set(_registry._model_entrypoints) - before:
        del _registry._model_entrypoints[name]
        _registry._clear_model_entries(name)
        delattr(module, name)
    module.__all__[:] = public


class TestRegisterAlias:
    NAME = "kim2023feature_tiny_net_cifar10_linf"

    def register(self, source: object, **changes: Any) -> str:
        return register_alias(
            str(source), **{"name": "Kim2023Feature_Tiny-Net", "dataset": "cifar10", "threat": "Linf", **changes}
        )

    @pytest.mark.parametrize("statistics", [(0.0, 1.0), (0.45, 0.2)], ids=["plain", "normalised"])
    def test_robustbenchs_call_gives_the_pixel_space_model(self, tmp_path, statistics):
        model = tiny(*statistics)
        save_pretrained(model, tmp_path / "saved")
        assert self.register(tmp_path / "saved") == self.NAME
        loaded = robustbench_load(self.NAME)
        assert torch.equal(logits(loaded), logits(PixelModel(model)))
        assert torch.equal(logits(copy.deepcopy(loaded)), logits(loaded))
        assert isinstance(loaded, PixelModel) == (statistics != (0.0, 1.0))
        assert torch.equal(logits(model), logits(PixelModel(model))) == (statistics == (0.0, 1.0))
        assert as_pixel_model(loaded) is loaded or not isinstance(loaded, PixelModel)

    def test_timms_scripts_find_what_they_read(self, tmp_path):
        save_pretrained(tiny(0.45, 0.2), tmp_path)
        loaded: Any = robustbench_load(self.register(tmp_path))
        assert loaded.num_classes == 10
        config = timm.data.resolve_model_data_config(loaded)
        assert (config["mean"], config["std"]) == ((0.0,) * 3, (1.0,) * 3)
        assert config["input_size"] == (3, 32, 32)

    @pytest.mark.parametrize("statistics", [(0.0, 1.0), (0.45, 0.2)], ids=["plain", "normalised"])
    def test_a_custom_checkpoint_replaces_the_weights(self, tmp_path, statistics):
        save_pretrained(tiny(*statistics), tmp_path / "saved")
        other = tiny(*statistics, seed=1)
        save_pretrained(other, tmp_path / "other")
        torch.save(as_pixel_model(other).state_dict(), tmp_path / "pixel.pt")
        alias = self.register(tmp_path / "saved")
        files = [tmp_path / "other" / "model.safetensors"]
        files += [tmp_path / "pixel.pt"] if statistics != (0.0, 1.0) else []
        for file in files:
            assert torch.equal(logits(robustbench_load(alias, checkpoint_path=str(file))), logits(PixelModel(other)))

    def test_without_pretrained_the_weights_are_fresh(self, tmp_path):
        model = tiny(0.45, 0.2)
        save_pretrained(model, tmp_path)
        fresh = timm.create_model(self.register(tmp_path), drop_rate=0.25)
        assert base_model(fresh).drop_rate == 0.25
        assert not torch.equal(base_model(fresh).conv1.weight, model.conv1.weight)

    def test_the_folder_is_found_from_another_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = tiny()
        save_pretrained(model, "saved")
        alias = self.register("saved")
        monkeypatch.chdir(Path("/"))
        assert torch.equal(logits(robustbench_load(alias)), logits(model))

    @pytest.mark.parametrize(
        ("dataset", "threat", "end"),
        [("cifar100", "L2", "_cifar100_l2"), ("imagenet", "corruptions", "_imagenet_corruptions")],
    )
    def test_names_are_those_that_robustbench_looks_for(self, tmp_path, dataset, threat, end):
        save_pretrained(tiny(num_classes={"cifar100": 100, "imagenet": 1000}[dataset]), tmp_path)
        assert self.register(tmp_path, dataset=dataset, threat=threat) == "kim2023feature_tiny_net" + end

    def test_twice_is_once(self, tmp_path):
        save_pretrained(tiny(), tmp_path / "saved")
        save_pretrained(tiny(), tmp_path / "other")
        assert self.register(tmp_path / "saved") == self.register(f"local-dir:{tmp_path / 'saved'}")
        with pytest.raises(ValueError, match=f"has a model '{self.NAME}' already"):
            self.register(tmp_path / "other")

    def test_an_alias_of_an_alias_normalises_once(self, tmp_path):
        model = tiny(0.45, 0.2)
        save_pretrained(model, tmp_path)
        second = self.register(self.register(tmp_path), name="second")
        assert torch.equal(logits(robustbench_load(second)), logits(PixelModel(model)))

    def test_it_is_registered_like_any_timm_model(self, tmp_path):
        save_pretrained(tiny(), tmp_path)
        alias = self.register(tmp_path)
        assert timm.list_models(module="robustbench") == [alias]
        assert timm.model_entrypoint(alias).__name__ == alias
        assert getattr(timm_fsr.hub.robustbench, alias) is timm.model_entrypoint(alias)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": "cifar11"}, "unknown dataset 'cifar11'; did you mean 'cifar10'"),
            ({"threat": "linf"}, "unknown threat 'linf'; did you mean 'Linf'"),
            ({"name": "Kim2023.Feature"}, "name='Kim2023.Feature' does not make a name"),
            ({"name": "kim/feature"}, "does not make a name"),
            ({"source": "resnet_tiny_cifar_frs"}, "did you mean 'resnet_tiny_cifar_fsr'"),
        ],
    )
    def test_refusals_of_a_registration(self, tmp_path, changes, message):
        save_pretrained(tiny(), tmp_path)
        with pytest.raises(ValueError, match=message):
            self.register(**{"source": tmp_path, **changes})

    @pytest.mark.parametrize(
        ("model", "conditions", "changes", "message"),
        [
            ({"num_classes": 4}, None, {}, "the checkpoint has 4 classes, CIFAR-10 has 10"),
            ({}, None, {"dataset": "cifar100"}, "the checkpoint has 10 classes, CIFAR-100 has 100"),
            ({"in_chans": 1}, None, {}, "takes images of 1 x 32 x 32, but RobustBench's of CIFAR-10 have 3 x 32 x 32"),
            ({}, {"data": "fashion_mnist[test]", "classes": ["Bag"] * 10}, {}, "has the classes Bag, Bag, Bag"),
            (
                {"num_classes": 100},
                {"data": "cifar10[test]"},
                {"dataset": "cifar100"},
                "which is CIFAR-10, so it is no",
            ),
            (
                {},
                {"data": "cifar10[test]"},
                {"threat": "L2"},
                "own report is about Linf 8/255, not L2, so it is no L2 model",
            ),
            ({}, {"data": "cifar10[test] limited to 10"}, {}, None),
            ({}, {"data": "cifar10[test]"}, {"threat": "corruptions"}, None),
        ],
    )
    def test_a_checkpoint_for_something_else(self, tmp_path, report, model, conditions, changes, message):
        own = None if conditions is None else replace(report, conditions=conditions)
        network = tiny(**model)
        network.pretrained_cfg["input_size"] = (model.get("in_chans", 3), 32, 32)
        save_pretrained(network, tmp_path, report=own)
        if message is None:
            assert self.register(tmp_path, **changes)
            return
        with pytest.raises(ValueError, match=message):
            self.register(tmp_path, **changes)

    def test_the_embedded_checkpoint_is_no_model_of_cifar10(self):
        with pytest.raises(ValueError, match="takes images of 1 x 28 x 28"):
            self.register("resnet_tiny_cifar_fsr.at_fashion_mnist")

    def test_an_architecture_for_something_else_is_found_when_it_is_built(self):
        alias = self.register("resnet_tiny_cifar", dataset="cifar100")
        with pytest.raises(ValueError, match="the checkpoint has 10 classes, CIFAR-100 has 100"):
            timm.create_model(alias)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            self.register(tmp_path / "missing")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_classes": 100}, r"asked for 100 classes, but its checkpoint .* has 10"),
            ({"num_classes": 100, "pretrained": True}, "asked for 100 classes"),
            ({"pretrained_cfg_overlay": {"mean": (0.5,) * 3}}, "takes no other"),
            ({"fsr_tua": 0.2}, "tua"),
            ({"no_such_argument": 1}, "cannot be built with these arguments.*no_such_argument"),
        ],
    )
    def test_refusals_of_a_call(self, tmp_path, arguments, message):
        save_pretrained(tiny(), tmp_path)
        with pytest.raises(ValueError, match=message):
            timm.create_model(self.register(tmp_path), **arguments)

    def test_it_takes_no_tag(self, tmp_path):
        save_pretrained(tiny(), tmp_path)
        with pytest.raises(ValueError, match="leave out the tag"):
            timm.create_model(f"{self.register(tmp_path)}.in1k")
