from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry as registry

import timm_fsr
from timm_fsr.models import variants as models
from timm_fsr.models.pretrained import TAGS, embedded_pretrained, read_pretrained
from timm_fsr.models.saving import load, resolve, weights_digest
from timm_fsr.reports.report import Report
from timm_fsr.training.options import ModelOptions

TAG = "resnet_tiny_cifar_fsr.on_toys"


def trained() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model("resnet_tiny_cifar_fsr", num_classes=4, in_chans=1, fsr_hidden=4, fsr_tau=0.3).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    overlay = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,), "label_names": list("abcd"), "num_classes": 4}
    model = trained()
    model.pretrained_cfg |= overlay
    return timm_fsr.save_pretrained(model, tmp_path / TAG)


@pytest.fixture
def tag(folder: Path) -> Iterator[str]:
    name = timm_fsr.register_pretrained(folder)
    yield name
    architecture, _, short = name.partition(".")
    del TAGS[name]
    models.default_cfgs[architecture].tags.remove(short)
    del models.default_cfgs[architecture].cfgs[short], registry._model_pretrained_cfgs[name]
    registry._model_has_pretrained.discard(name)
    registry._model_with_tags[architecture].remove(name)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


class TestTag:
    def test_timm_builds_it_with_every_argument_it_was_trained_with(self, tag):
        model = timm.create_model(tag, pretrained=True)
        assert same_weights(model, trained())
        assert (model.num_classes, model.in_chans) == (4, 1)
        assert model.fsr["layer4"].resolved_args() == trained().fsr["layer4"].resolved_args()
        assert model.pretrained_cfg["label_names"] == tuple("abcd")

    def test_without_weights_it_is_the_same_network(self, tag):
        model = timm.create_model(tag)
        assert model.fsr["layer4"].tau == 0.3
        assert not same_weights(model, trained())

    def test_other_arguments_win(self, tag):
        model = timm.create_model(tag, pretrained=True, num_classes=7, in_chans=3, fsr_tau=0.7)
        assert model.fc.out_features == model.fsr["layer4"].head.out_features == 7
        assert model.fsr["layer4"].tau == 0.7
        assert torch.equal(model.layer4[0].conv2.weight, trained().layer4[0].conv2.weight)

    def test_the_architecture_alone_stays_what_it_was(self, tag):
        model = timm.create_model("resnet_tiny_cifar_fsr")
        assert (model.num_classes, model.in_chans) == (10, 3)
        with pytest.raises(RuntimeError, match=r"a tag \(.*resnet_tiny_cifar_fsr\.on_toys.*\), a hub id"):
            timm.create_model("resnet_tiny_cifar_fsr", pretrained=True)

    def test_timm_lists_it(self, tag):
        assert tag in timm.list_models("resnet_tiny_cifar*", pretrained=True)
        assert tag in timm.list_pretrained("resnet_tiny*")
        assert tag in [entry.name for entry in timm_fsr.list_pretrained()]

    def test_what_is_saved_of_it_rebuilds_it(self, tag, tmp_path):
        """Also after fine-tuning, when neither its checksum nor its arguments are the tag's any more."""
        model = timm.create_model(tag, pretrained=True)
        with torch.no_grad():
            model.fc.bias.add_(1)
        timm_fsr.save_pretrained(model, tmp_path / "tuned")
        for again in (timm.create_model(f"local-dir:{tmp_path}/tuned", pretrained=True), load(str(tmp_path / "tuned"))):
            assert same_weights(again, model)
            assert again.fsr["layer4"].tau == 0.3

    def test_by_this_packages_own_functions(self, tag):
        assert same_weights(timm_fsr.from_pretrained(tag), trained())
        assert same_weights(load(resolve(tag)), trained()), "a tag of ours stands for its weights"

    def test_in_a_recipe(self, tag):
        model = ModelOptions(name=tag).build(num_classes=3, image_size=(3, 32, 32))
        assert torch.equal(model.layer4[0].conv2.weight, trained().layer4[0].conv2.weight)
        assert (model.num_classes, model.in_chans) == (3, 3)
        ModelOptions(name=tag).check()

    def test_exchanged_weights(self, tag, folder, tmp_path):
        timm_fsr.save_pretrained(timm.create_model("resnet_tiny_cifar_fsr", num_classes=4, in_chans=1), tmp_path / "o")
        shutil.copy(tmp_path / "o" / "model.safetensors", folder)
        with pytest.raises(ValueError, match="damaged or were exchanged"):
            timm.create_model(tag, pretrained=True)

    def test_another_namespace_after_the_import_changes_nothing(self, tag, folder, monkeypatch):
        monkeypatch.setenv("TIMM_FSR_HUB", "elsewhere")
        assert same_weights(timm.create_model(tag, pretrained=True), trained())
        timm.create_model("resnet_tiny_cifar_fsr.at_fashion_mnist", pretrained=True)
        self.test_exchanged_weights(tag, folder, folder.parent)

    def test_other_weights_by_the_users_will(self, tag, tmp_path):
        """A file named by the user is no checkpoint of the tag's: its checksum does not count."""
        other = timm.create_model(tag)
        timm_fsr.save_pretrained(other, tmp_path / "o")
        overlay = {"file": str(tmp_path / "o" / "model.safetensors")}
        model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **trained()._model_args)
        assert same_weights(model, other)


class TestRegistering:
    def test_twice_is_once(self, tag, folder):
        assert timm_fsr.register_pretrained(folder) == tag
        assert timm.list_pretrained("resnet_tiny*").count(tag) == 1

    def test_another_one_of_that_name(self, tag, folder, tmp_path):
        other = shutil.copytree(folder, tmp_path / "elsewhere" / TAG)
        with pytest.raises(ValueError, match=r"is known already, from .*; use another tag"):
            timm_fsr.register_pretrained(other)

    @pytest.mark.parametrize("name", ["resnet18_cifar_fsr.x", "resnet_tiny_cifar_fsr", "x"])
    def test_a_folder_of_another_name(self, folder, tmp_path, name):
        other = folder.rename(tmp_path / name)
        with pytest.raises(ValueError, match=r"call it resnet_tiny_cifar_fsr\.<tag>, as it will be known"):
            timm_fsr.register_pretrained(other)

    def test_a_plain_network(self, tmp_path):
        model = timm.create_model("resnet_tiny_cifar")
        timm_fsr.save_pretrained(model, tmp_path / "resnet_tiny_cifar.x")
        with pytest.raises(ValueError, match="no network with a feature layer"):
            timm_fsr.register_pretrained(tmp_path / "resnet_tiny_cifar.x")

    def test_no_model_and_a_damaged_one(self, folder):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            timm_fsr.register_pretrained(folder.parent)
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            timm_fsr.register_pretrained(folder)

    def test_the_namespace_is_the_environments(self, folder, monkeypatch):
        monkeypatch.delenv("TIMM_FSR_HUB", raising=False)
        assert read_pretrained(folder).hub_id == f"timm-fsr/{TAG}"
        monkeypatch.setenv("TIMM_FSR_HUB", "us")
        entry = read_pretrained(folder)
        monkeypatch.setenv("TIMM_FSR_HUB", "them")
        assert entry.hub_id == f"us/{TAG}", "what was registered stays"
        (folder / "model.safetensors").unlink()
        config = entry.pretrained_cfg()
        assert (config.file, config.hf_hub_id) == (None, f"us/{TAG}")
        assert "HF_HUB_OFFLINE" in os.environ


EMBEDDED = list(embedded_pretrained())


@pytest.mark.parametrize("entry", EMBEDDED, ids=lambda entry: entry.name)
class TestEmbedded:
    def test_it_loads_without_a_network_and_is_the_one_its_report_is_about(self, entry):
        assert entry.weights is not None
        assert entry.size is not None
        assert entry.size < 2_000_000
        report = Report.load(entry.folder / "report.json")
        model = timm.create_model(entry.name, pretrained=True)
        assert report.conditions["weights_sha256"] == weights_digest(model), "of the weights as loaded, in float32"
        assert model.num_classes == len(report.conditions["classes"])

    def test_its_report_is_that_of_strong_and_adaptive_attacks_and_gives_away_no_path(self, entry):
        report = Report.load(entry.folder / "report.json")
        assert {"autoattack", "adaptive"} <= set(report.correct)
        assert report.evidence["findings"]
        for name in ("report.json", "recipe.yaml", "config.json"):
            assert "/work" not in (entry.folder / name).read_text()
        assert "recipe" not in json.loads((entry.folder / "report.json").read_text())["conditions"]

    def test_its_figures_are_its_own(self, entry):
        """Clean accuracy and PGD-20 on the first images of the report, from the shipped weights and images."""
        report = Report.load(entry.folder / "report.json")
        data = timm_fsr.load_data("fashion_mnist", "test", limit=report.count)
        assert data.fingerprint == report.conditions["data_fingerprint"], "its images are those in the package"
        batch = next(data.batches(report.conditions["batch_size"]))  # outcomes depend on the batch
        found = timm_fsr.evaluate(
            timm_fsr.from_pretrained(entry.name), batch, eps=report.eps, attacks=["pgd20"], seed=report.seed
        )
        count = len(batch[1])
        assert torch.equal(found.labels, report.labels[:count])
        for name in ("clean", "pgd20"):
            differing = int((found.correct[name] != report.correct[name][:count]).sum())
            assert differing <= 2, "another processor may round an image to the other side, not more"
