from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_fsr
from timm_fsr.hub.bundle import read_bundle
from timm_fsr.reports.report import Report

RECIPE = {"seed": 5, "model": {"name": "resnet_tiny_cifar", "layer": "fsr"}, "data": {"source": "uoft-cs/cifar10"}}


def flags(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def save(folder: Path, recipe: object = None, transfer: str = "other", **conditions: str) -> Path:
    stage = f"transfer from {transfer}"
    report = Report(
        correct={"clean": flags("11"), "adaptive": flags("10")},
        stages={"adaptive": {stage: flags("10")}},
        attacks={"adaptive": f"{stage}: PGD(...) by the gradient of {transfer}; square: ..."},
        norm="linf",
        eps=0.1,
        seed=0,
        conditions=conditions,
    )
    timm_fsr.save_pretrained(
        timm.create_model("resnet_tiny_cifar_fsr"), folder, report=report, recipe=RECIPE, license="mit"
    )
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return folder


class TestPaths:
    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            ("runs/joes_plain/best", "joes_plain"),
            ("/home/joe/plain/last", "plain"),
            ("local-dir:joe/plain", "plain"),
            ("../joe/best", "joe"),
            ("hf-hub:owner/name", "hf-hub:owner/name"),
            ("hf-hub:/home/joe/plain", "hf-hub:plain"),
            ("//nas/joe/plain", "plain"),
            ("resnet18", "resnet18"),
        ],
    )
    def test_other_models_are_shown_by_the_name_that_says_something(self, tmp_path, given, shown):
        found = read_bundle(save(tmp_path, transfer=given, model=given)).report
        name = found.conditions["model"]
        assert name.removeprefix("local-dir:") == shown
        assert [stage.replace("local-dir:", "") for stage in found.stages["adaptive"]] == [f"transfer from {shown}"]
        assert f"by the gradient of {shown};" in found.attacks["adaptive"].replace("local-dir:", "")

    @pytest.mark.parametrize(
        "source",
        ["/home/jane doe/secret/ext.py", "~/jane doe/ext.py", "../jane/secret/ext.py", "my/own/ext.py", "/ext.py"],
    )
    def test_files_that_a_recipe_imports_are_shown_by_name(self, tmp_path, source):
        found = read_bundle(save(tmp_path, {**RECIPE, "imports": [source, "a_package.layers"]}))
        assert found.recipe["imports"] == ["ext.py", "a_package.layers"]

    def test_any_path_of_a_recipe_is_cut_in_the_report_too(self, tmp_path):
        place = "/home/jane doe/my weights/start.pt"
        recipe = {**RECIPE, "model": {**RECIPE["model"], "args": {"file": place, "up": "../jane doe/x y"}}}
        found = read_bundle(save(tmp_path, recipe, training=f"AT() from {place}, 5 epochs, token=hf_{'a' * 30}"))
        assert found.recipe["model"]["args"] == {"file": "start.pt", "up": "x y"}
        assert found.report.conditions["training"] == "AT() from start.pt, 5 epochs, token=***"

    def test_data_with_spaces_in_its_path_that_only_the_report_names(self, tmp_path):
        place = "/mnt/My Drive/joe"
        conditions = {"data": f"{place}/x[test]", "checkpoint_rule": f"best accuracy on {place}/x[train] held-out"}
        found = read_bundle(save(tmp_path, training_data=f"{place}/x[train]", **conditions)).report.conditions
        assert found["data"] == "x[test]"
        assert found["training_data"] == "x[train]"
        assert found["checkpoint_rule"] == "best accuracy on x[train] held-out"


class TestDamage:
    @pytest.mark.parametrize(
        ("recipe", "what"),
        [
            ("model: x", "model is 'x'"),
            ("model: null", "model is None"),
            ("{data: null, model: {name: x}}", "data is None"),
            ("objective: [at]", r"objective is \['at'\]"),
            ("data: {source: [1]}", r"data\.source is \[1\]"),
            ("model: {name: 3}", r"model\.name is 3"),
        ],
    )
    def test_a_recipe_of_another_form(self, tmp_path, recipe, what):
        with pytest.raises(ValueError, match=rf"recipe\.yaml: {what}, not .*give the recipe that `timm-fsr"):
            read_bundle(save(tmp_path, recipe))

    @pytest.mark.parametrize(
        "given", [["<b>", 32, 32], "3", 3, [None], {"a": 1}, [[3, 32, 32]]], ids=lambda given: str(given)
    )
    def test_a_shape_that_is_no_numbers(self, tmp_path, given):
        config = json.loads((save(tmp_path) / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = given
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"damaged .*pretrained_cfg\.input_size.*save the model again"):
            read_bundle(tmp_path)

    @pytest.mark.parametrize("change", ['"pretrained_cfg": 3', '"model_args": []', '"pretrained_cfg": {"mean": [0.0]}'])
    def test_a_configuration_of_another_form(self, tmp_path, change):
        (save(tmp_path) / "config.json").write_text(f'{{"architecture": "resnet18", {change}}}')
        with pytest.raises(ValueError, match=r"config\.json is damaged.*save the model again"):
            read_bundle(tmp_path)
