from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_fsr
from timm_fsr.hub.bundle import read_bundle
from timm_fsr.reports.report import Report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/me/cifar10[test]", "cifar10[test]"),
        ("best PGD-10 accuracy on /data/me/cifar10[train] limited", "best PGD-10 accuracy on cifar10[train] limited"),
        ("~/me/x.npz", "x.npz"),
        (r"C:\me\data\x.npz", "x.npz"),
        ("/my data/sets/x and /my data/sets/x", "x and x"),
        ("https://a.org/b/c", "https://a.org/b/c"),
        ("eps 8/255", "eps 8/255"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("runs/a/b", "runs/a/b"),
        ("file:///home/joe/secret/best", "best"),
        ("on file:/home/joe/x.npz.", "on x.npz."),
        (3, 3),
    ],
)
def test_where_things_lay_is_nobodys_business(text, expected):
    assert without_traces({"a": [text]}, {"/my data/sets/x": "x"}) == {"a": [expected]}
    assert without_traces({text: 1}, {"/my data/sets/x": "x"}) == {expected: 1}, "names of stages have paths too"


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

    @pytest.mark.parametrize("change", ['"pretrained_cfg": 3', '"model_args": []', '"pretrained_cfg": {"mean": [0.0]}'])
    def test_a_configuration_of_another_form(self, tmp_path, change):
        (save(tmp_path) / "config.json").write_text(f'{{"architecture": "resnet18", {change}}}')
        with pytest.raises(ValueError, match=r"config\.json is damaged: it lacks .*save the model again"):
            read_bundle(tmp_path)
