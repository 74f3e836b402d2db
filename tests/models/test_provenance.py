"""What chose the checkpoint is found for folders, tags and repositories, and only if it is about these weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from support.tiny import tiny_resnet, with_fsr

from timm_fsr.models import saving as provenance
from timm_fsr.models.pretrained import list_pretrained
from timm_fsr.models.saving import save_pretrained, training_report, weights_digest
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
