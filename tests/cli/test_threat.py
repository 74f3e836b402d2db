"""What an evaluation starts from: flags, then the model's own report, then the defaults."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny import tiny_resnet, with_fsr
from torchvision.transforms.functional import to_pil_image

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.cli.threat import fill_data, fill_threat
from timm_fsr.models.saving import save_pretrained, training_recipe
from timm_fsr.reports.report import Report

TAG = "resnet_tiny_cifar_fsr.at_fashion_mnist"
CLASSES = timm_fsr.load_data("fashion_mnist", "test", limit=10).classes


def own(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "correct": {"clean": torch.tensor([True])},
        "attacks": {},
        "norm": "l2",
        "eps": 0.5,
        "seed": 0,
        "conditions": {"data": "fashion_mnist[test]"},
    }
    return Report(**{**values, **changes})


def options(**given: Any) -> Namespace:
    names = ("norm", "eps", "data", "split", "limit", "config", "image_column", "label_column", "size", "channels")
    return Namespace(**{**dict.fromkeys(names), **given})


class TestThreat:
    @pytest.mark.parametrize(
        ("given", "report", "found", "line"),
        [
            ({}, own(), ("l2", 0.5), "threat model: L2 0.5, the model's own"),
            ({"eps": 1.0}, own(), ("l2", 1.0), "L2 1 as asked for; the model's own is L2 0.5"),
            (
                {"norm": "linf", "eps": 8 / 255},
                own(),
                ("linf", 8 / 255),
                "Linf 8/255 as asked for; the model's own is L2",
            ),
            ({"norm": "l2", "eps": 0.5}, own(), ("l2", 0.5), None),
            ({"eps": 25.5 / 255}, own(norm="linf", eps=0.1), ("linf", 0.1), "threat model: Linf 0.1, the model's own"),
            ({}, None, ("linf", 8 / 255), "says nothing of its threat model; default norm linf, eps 8/255"),
            ({"eps": 0.1}, None, ("linf", 0.1), "default norm linf"),
            ({"norm": "l2"}, None, ("l2", 8 / 255), "default eps 0.03137"),
            ({"norm": "l2", "eps": 0.5}, None, ("l2", 0.5), None),
        ],
    )
    def test_flags_then_the_report_then_defaults(self, given, report, found, line):
        asked = options(**given)
        lines = fill_threat(asked, report)
        assert (asked.norm, asked.eps) == found
        assert len(lines) == (line is not None)
        assert line is None or line in lines[0]

    def test_an_eps_of_another_norm_is_not_taken_over(self):
        with pytest.raises(ValueError, match=r"L2 0\.5, whose eps means nothing for --norm=linf; add --eps"):
            fill_threat(options(norm="linf"), own())


class TestData:
    @pytest.mark.parametrize(
        ("given", "data", "found", "line"),
        [
            (
                {},
                "fashion_mnist[train] limited to 50",
                ("fashion_mnist", "train", 50),
                "limited to 50, from the model's",
            ),
            (
                {"limit": 7},
                "fashion_mnist[train] limited to 50",
                ("fashion_mnist", "train", 7),
                "from the model's report",
            ),
            (
                {"split": "test"},
                "fashion_mnist[train] limited to 50",
                ("fashion_mnist", "test", None),
                "fashion_mnist[test]",
            ),
            ({"data": "x"}, "fashion_mnist[train]", ("x", "test", None), None),
            ({"data": "x", "split": "val"}, "fashion_mnist[train]", ("x", "val", None), None),
            ({}, "", ("fashion_mnist", "test", None), "says nothing of its test images; default fashion_mnist[test]"),
            ({}, "two tensors", ("fashion_mnist", "test", None), "default fashion_mnist[test]"),
        ],
    )
    def test_flags_then_the_report_then_defaults(self, given, data, found, line):
        asked = options(**given)
        lines = fill_data(asked, own(conditions={"data": data}))
        assert (asked.data, asked.split, asked.limit) == found
        assert len(lines) == (line is not None)
        assert line is None or line in lines[0]

    def test_a_model_without_a_report(self):
        asked = options()
        assert fill_data(asked, None) == ["the model says nothing of its test images; default fashion_mnist[test]"]

    def test_data_elsewhere_that_is_the_embedded_data(self):
        fingerprint = timm_fsr.load_data("fashion_mnist", "test").fingerprint
        asked = options()
        (line,) = fill_data(asked, own(conditions={"data": "elsewhere[test]", "data_fingerprint": fingerprint}))
        assert (asked.data, asked.split, asked.limit) == ("fashion_mnist", "test", None)
        assert "elsewhere[test] of the model's report is not here; in its place fashion_mnist[test]" in line
        assert "the very same images" in line

    def test_data_elsewhere_of_the_same_classes(self):
        conditions = {"data": "elsewhere[test]", "data_fingerprint": "0", "classes": list(CLASSES)}
        (line,) = fill_data(options(), own(conditions=conditions))
        assert "the same classes, but not the same images; give --data" in line

    @pytest.mark.parametrize("source", ["elsewhere", "some/folder/of/mine", "nobody/nothing"])
    def test_data_elsewhere_of_other_classes_is_asked_for(self, source):
        """Images of something else would give a figure that means nothing."""
        conditions = {"data": f"{source}[test]", "classes": ["cat", "dog"]}
        with pytest.raises(ValueError, match=rf"is about {source}\[test\], which is not here .*give --data"):
            fill_data(options(), own(conditions=conditions))

    def test_the_recipe_says_how_the_data_is_read(self, tmp_path):
        recipe = {"data": {"source": str(tmp_path), "config": None, "image_column": "picture", "label_column": "kind"}}
        asked = options(label_column="mine")
        fill_data(asked, own(conditions={"data": f"{tmp_path}[test]"}), recipe)
        assert (asked.data, asked.config, asked.image_column, asked.label_column) == (
            str(tmp_path),
            None,
            "picture",
            "mine",
        )
        other = options()
        fill_data(other, own(conditions={"data": "fashion_mnist[test]"}), recipe)
        assert other.image_column is None, "the recipe is about other data"


def test_the_recipe_of_a_published_model_is_a_file_of_its_own(tmp_path):
    folder = save_pretrained(tiny_resnet(), tmp_path / "saved")
    assert training_recipe(str(folder), own()) is None
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": {"source": "x"}}))
    assert training_recipe(str(folder), own()) == {"data": {"source": "x"}}
    assert training_recipe(str(folder), own(conditions={"recipe": {"seed": 1}})) == {"seed": 1}
    for unreadable in ("just a text", "a: [", ""):
        (folder / "recipe.yaml").write_text(unreadable)
        assert training_recipe(str(folder), own()) is None


class TestCommand:
    def test_the_embedded_checkpoint_repeats_its_report(self, tmp_path, capsys):
        """Its report is about a folder that is nowhere here, in a ball that is not the default."""
        assert main(["evaluate", TAG, "--attacks", "fgsm", "--output", str(tmp_path)]) == 0
        found, known = Report.load(tmp_path / "report.json"), Report.load(_folder(TAG) / "report.json")
        assert (found.norm, found.eps, found.count) == (known.norm, known.eps, known.count)
        assert (found.accuracy["clean"], found.accuracy["fgsm"]) == (known.accuracy["clean"], known.accuracy["fgsm"])
        out = capsys.readouterr().out
        assert "threat model: Linf 0.1, the model's own" in out
        assert "upper bound: FGSM only; AutoAttack and adaptive attacks usually lower it" in out

    def test_a_model_in_a_folder_is_evaluated_as_it_was(self, tmp_path, capsys):
        model = with_fsr(tiny_resnet(num_classes=2))
        pictures = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for index, picture in enumerate(pictures):
            path = tmp_path / "data" / "val" / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(picture).save(path)
        data = timm_fsr.load_data(tmp_path / "data", "val", limit=8)
        first = timm_fsr.evaluate(
            model,
            data.batches(250),
            norm="l2",
            eps=0.25,
            attacks=["fgsm"],
            data_name=data.name,
            conditions={"data_fingerprint": data.fingerprint, "classes": list(data.classes)},
        )
        folder = save_pretrained(model, tmp_path / "saved", report=first)
        arguments = ["evaluate", str(folder), "--attacks", "fgsm", "--output"]
        assert main([*arguments, str(tmp_path / "out")]) == 0
        again = Report.load(tmp_path / "out" / "report.json")
        assert again.threat == "L2 0.25"
        assert again.conditions["data_fingerprint"] == data.fingerprint
        assert again.to_dict()["correct"] == first.to_dict()["correct"]
        to_pil_image(1 - pictures[0]).save(tmp_path / "data" / "val" / "a" / "00.png")
        capsys.readouterr()
        assert main([*arguments, str(tmp_path / "other")]) == 0
        assert "is not what it was for the model's report" in capsys.readouterr().out

    def test_a_report_of_other_weights_says_nothing(self, tmp_path, capsys):
        model = with_fsr(tiny_resnet(in_chans=1))
        images, labels = next(timm_fsr.load_data("fashion_mnist", "test", limit=10).batches(10))
        report = timm_fsr.evaluate(tiny_resnet(in_chans=1), (images, labels), norm="l2", eps=0.25, attacks=["fgsm"])
        folder = save_pretrained(model, tmp_path / "saved", report=dataclasses.replace(report))
        assert main(["evaluate", str(folder), "--limit", "10", "--attacks", "fgsm"]) == 0
        out = capsys.readouterr().out
        assert "says nothing of its threat model; default norm linf, eps 8/255" in out
        assert "(Linf 8/255, 10 images)" in out

    def test_what_the_models_own_norm_does_not_have_is_refused(self, tmp_path, capsys):
        model = with_fsr(tiny_resnet(in_chans=1))
        data = timm_fsr.load_data("fashion_mnist", "test", limit=10)
        report = timm_fsr.evaluate(model, data.batches(10), attacks=["fgsm"], data_name=data.name)
        folder = save_pretrained(model, tmp_path / "saved", report=dataclasses.replace(report, norm="l1", eps=12.0))
        assert main(["evaluate", str(folder), "--attacks", "fgsm"]) == 2
        assert "'fgsm' has no L1 ball" in capsys.readouterr().err


def _folder(tag: str) -> Path:
    return next(entry.folder for entry in timm_fsr.list_pretrained() if entry.name == tag)
