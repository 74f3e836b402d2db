"""What chose the checkpoint is found for folders, tags and repositories, and only if it is about these weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from support.tiny import tiny_resnet, with_fsr

from timm_fsr.models import saving as provenance
from timm_fsr.models.pretrained import list_pretrained
from timm_fsr.models.saving import load, save_pretrained, training_report, weights_digest
from timm_fsr.reports.report import Report

RULE = "best PGD-10 accuracy on held-out"


@pytest.fixture
def model() -> torch.nn.Module:
    return with_fsr(tiny_resnet(in_chans=1))


def saved(model: torch.nn.Module, folder: Path, **conditions: str) -> Path:
    flags = {"clean": torch.tensor([True])}
    known = {"checkpoint_rule": RULE, **conditions}
    report = Report(correct=flags, attacks={}, norm="linf", eps=0.1, seed=0, conditions=known)
    return save_pretrained(model, folder, report=report)


def test_a_folder(model, tmp_path):
    folder = saved(model, tmp_path / "one", weights_sha256=weights_digest(model))
    for name in (str(folder), f"local-dir:{folder}"):
        assert training_report(name, model).conditions["checkpoint_rule"] == RULE
    (folder / "report.json").unlink()
    assert training_report(str(folder), model) is None


def test_a_report_of_other_weights_says_nothing(model, tmp_path):
    folder = saved(model, tmp_path / "one", weights_sha256=weights_digest(with_fsr(tiny_resnet(in_chans=1), tau=0.2)))
    assert training_report(str(folder), model) is not None, "tau is no weight"
    with torch.no_grad():
        model.fc.bias += 1
    assert training_report(str(folder), model) is None


def test_a_tag_of_the_package():
    entry = next(entry for entry in list_pretrained() if entry.weights is not None)
    model = timm.create_model(entry.name, pretrained=True)
    found = training_report(entry.name, model)
    assert "held-out" in found.conditions["checkpoint_rule"]
    assert training_report(entry.name, timm.create_model(entry.name)) is None


def test_an_architecture_has_none(model):
    assert training_report("resnet_tiny_cifar_fsr", model) is None


def test_a_repository(model, tmp_path, monkeypatch):
    folder = saved(model, tmp_path / "one", weights_sha256=weights_digest(model))
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(provenance, "download_from_hf", download)
    assert training_report("hf-hub:user/name@v1", model).conditions["checkpoint_rule"] == RULE
    assert asked == [("user/name@v1", "report.json")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no such file"), ConnectionError("no network")])
def test_a_repository_without_a_report_or_out_of_reach(model, monkeypatch, error):
    def download(repository: str, file: str) -> str:
        raise error

    monkeypatch.setattr(provenance, "download_from_hf", download)
    assert training_report("hf-hub:user/name", model) is None


def test_a_damaged_report(model, tmp_path):
    folder = saved(model, tmp_path / "one")
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        training_report(str(folder), model)


def record(folder: Path) -> tuple[str | None, dict[str, str] | None, str | None]:
    """The licence and origin that a saved model notes, and the licence that timm reads."""
    config = json.loads((folder / "config.json").read_text())
    return config["timm_fsr"].get("license"), config["timm_fsr"].get("origin"), config["pretrained_cfg"].get("license")


class TestOrigin:
    """A licence is that of weights; an architecture has none to give."""

    TAG = "resnet_tiny_cifar_fsr.at_fashion_mnist"

    @pytest.mark.parametrize("name", ["resnet_tiny_cifar_fsr", "resnet_tiny_cifar"])
    def test_fresh_weights_have_no_licence_and_no_origin(self, tmp_path, name):
        assert timm.get_pretrained_cfg("resnet_tiny_cifar").license == "apache-2.0"
        assert record(save_pretrained(timm.create_model(name), tmp_path / "timms")) == (None, None, None)
        assert record(save_pretrained(load(name), tmp_path / "ours")) == (None, None, None)

    def test_a_licence_that_was_given_stays(self, tmp_path):
        folder = save_pretrained(tiny_resnet(), tmp_path / "one", license="cc-by-4.0")
        assert record(folder) == ("cc-by-4.0", None, "cc-by-4.0")
        assert record(save_pretrained(load(str(folder)), tmp_path / "two")) == ("cc-by-4.0", None, "cc-by-4.0")
        assert record(save_pretrained(load(str(folder)), tmp_path / "three", license="mit"))[0] == "mit"

    def test_a_fine_tuned_model_has_those_of_what_was_loaded(self, tmp_path):
        expected = ("apache-2.0", {"name": self.TAG}, "apache-2.0")
        tuned = load(self.TAG, num_classes=3)
        folder = save_pretrained(copy.deepcopy(tuned), tmp_path / "one")
        assert record(folder) == expected
        again = save_pretrained(load(str(folder)), tmp_path / "two")
        assert record(again) == expected, "the same model in a folder"

    def test_weights_that_were_not_loaded_give_none(self, tmp_path):
        source = save_pretrained(tiny_resnet(), tmp_path / "source", license="mit")
        without = load(str(source), pretrained=False)
        assert record(save_pretrained(without, tmp_path / "one")) == (None, None, None)
        architecture = load(self.TAG, pretrained=False)
        assert record(save_pretrained(architecture, tmp_path / "two")) == (None, None, None)
        file = load("resnet_tiny_cifar", checkpoint_path=str(source / "model.safetensors"))
        assert record(save_pretrained(file, tmp_path / "three")) == (None, None, None)

    @pytest.mark.parametrize(
        ("arguments", "loaded"),
        [
            ({"pretrained": True}, True),
            ({"pretrained_backbone": True}, True),
            ({"pretrained": False}, False),
            ({}, False),
        ],
    )
    def test_weights_of_timm(self, tmp_path, monkeypatch, arguments, loaded):
        model = tiny_resnet()
        model.pretrained_cfg |= {"hf_hub_id": "timm/toy.a1_in1k", "license": "cc-by-nc-4.0"}
        monkeypatch.setattr(provenance, "_create", lambda *_: model)
        expected = ("cc-by-nc-4.0", {"name": "timm/toy.a1_in1k", "hub_id": "timm/toy.a1_in1k"}, "cc-by-nc-4.0")
        found = record(save_pretrained(load("resnet_tiny_cifar", **arguments), tmp_path))
        assert found == (expected if loaded else (None, None, None))
