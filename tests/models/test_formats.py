"""Checkpoints of earlier versions, which keep loading, and damaged ones, which are refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.tiny import tiny_resnet
from support.variants import variant
from torch import nn

import timm_fsr
from timm_fsr.cli.demo import quickstart_recipe
from timm_fsr.layers import FSR
from timm_fsr.layers.base import layer_defaults
from timm_fsr.models.description import class_names, input_size
from timm_fsr.models.saving import load, save_pretrained
from timm_fsr.models.weights import FORMAT
from timm_fsr.reports.report import Report
from timm_fsr.training.options import ModelOptions
from timm_fsr.training.prepare import with_input_of_model
from timm_fsr.training.state import Progress, check_identity, identity

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
RUN = Path(__file__).parents[1] / "fixtures" / "run_before_descriptions"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_pretrained(variant(), tmp_path / "saved")


class Bomb:
    """Unpickling it runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def forget_checksum(folder: Path) -> None:
    """As configurations of format 1 have none."""
    config = json.loads((folder / "config.json").read_text())
    del config["timm_fsr"]
    (folder / "config.json").write_text(json.dumps(config))


# Of one grey image by the network of those configurations with `made_up` weights; computed when format 2 was made.
STORED_LOGITS = (-0.07416, 0.83568, 0.19773, 0.47568, 0.07619, 1.18003, -0.20004, 0.2031, 0.83077, 0.99754)


def made_up(model: nn.Module) -> nn.Module:
    """Weights by a formula, so that logits can be compared with those of another day and another torch."""
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                values = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) ** 2 + number)
                size = 1.5 / tensor[:1].numel() ** 0.5
                tensor.copy_(values.reshape(tensor.shape) * size if tensor.ndim > 1 else (1 + values / 10) / 2)
    return model.eval()


class TestFormats:
    """Every format that was ever released keeps loading; tests/fixtures/configs has one configuration of each."""

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
    def test_it_still_loads_as_the_model_it_was(self, tmp_path, path):
        config = json.loads(path.read_text())
        model = made_up(timm.create_model("resnet_tiny_cifar_fsr", num_classes=10, fsr_hidden=16))
        save_pretrained(model, tmp_path)
        record = {key: value for key, value in config.get("timm_fsr", {}).items() if key != "sha256"}
        (tmp_path / "config.json").write_text(json.dumps({**config, "timm_fsr": record}))
        stored = {key.removeprefix("fsr_"): v for key, v in config["model_args"].items() if key.startswith("fsr_")}
        given = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), timm_fsr.from_pretrained(tmp_path)):
            with torch.no_grad():
                logits = again.eval()(given).flatten()
            torch.testing.assert_close(logits, torch.tensor(STORED_LOGITS), rtol=1e-4, atol=1e-4)
            assert again.fsr["layer4"].resolved_args() == {**layer_defaults(FSR), **stored}, "new arguments: defaults"

    def test_there_is_one_of_the_present_format(self):
        formats = [json.loads(path.read_text()).get("timm_fsr", {}).get("format", 1) for path in CONFIGS.glob("*.json")]
        assert sorted(formats) == list(range(1, FORMAT + 1))

    def test_it_is_what_is_written_today(self, tmp_path):
        save_pretrained(timm.create_model("resnet_tiny_cifar_fsr", num_classes=10, fsr_hidden=16), tmp_path)
        found = json.loads((tmp_path / "config.json").read_text())
        stored = json.loads((CONFIGS / f"format{FORMAT}.json").read_text())
        assert set(found) == set(stored)
        assert set(found["timm_fsr"]) == set(stored["timm_fsr"])
        assert set(found["model_args"]) >= set(stored["model_args"]), "arguments may be added, with defaults"


class TestARunFromBefore:
    """A run of when configurations did not yet say what a model was trained on; its report is shortened."""

    @pytest.mark.parametrize("named", [True, False])
    def test_its_model(self, tmp_path, named):
        config = json.loads((RUN / "config.json").read_text())
        model = made_up(timm.create_model("resnet_tiny_cifar_fsr", **config["model_args"]))
        save_pretrained(model, tmp_path)
        del config["timm_fsr"]["sha256"], config["timm_fsr"]["bytes"]
        if not named:
            del config["pretrained_cfg"]["label_names"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), timm_fsr.from_pretrained(tmp_path)):
            given = torch.rand(1, 1, 28, 28)
            assert torch.equal(again.eval()(given), model(given))
            assert input_size(again) == (1, 28, 28)
            names = class_names(again)
            assert names is None if not named else (names[0], names[9]) == ("T-shirt/top", "Ankle boot")
        save_pretrained(again, tmp_path / "again")
        assert class_names(load(str(tmp_path / "again"))) == class_names(again)

    def test_its_report(self):
        stored = json.loads((RUN / "report.json").read_text())
        report = Report.load(RUN / "report.json")
        assert report.accuracy == {key: value for key, value in stored["accuracy"].items() if key != "worst_case"}
        assert {key: report.to_dict()[key] for key in stored if key != "interval_95"} == {
            key: value for key, value in stored.items() if key != "interval_95"
        }
        assert len(report.per_class()) == 10

    def test_its_checkpoint(self, tmp_path):
        values = json.loads((RUN / "values.json").read_text())
        progress = Progress.load(values["progress"])
        assert (progress.step, progress.epoch, progress.selection.epoch) == (74, 1, 0)
        recipe = quickstart_recipe()
        recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, epochs=2))
        mine = identity(recipe, processes=1, fingerprints=["64394018a37fdf1e"], teacher=None)
        check_identity(values["identity"], mine, recipe, Console(quiet=True))
        assert with_input_of_model(recipe, values["identity"]["recipe"], Console(quiet=True)) == recipe

    def test_its_data_has_the_same_fingerprint(self):
        data, _ = quickstart_recipe().data.build(seed=0, progress=False)
        assert [data.fingerprint] == json.loads((RUN / "values.json").read_text())["identity"]["data"]

    def test_a_fine_tuning_that_was_begun_without_the_size_of_its_model(self, tmp_path):
        """It goes on with the images that it began with; a new one takes the model's."""
        save_pretrained(tiny_resnet(), tmp_path)
        model = ModelOptions(name=str(tmp_path), layer=None)
        recipe = dataclasses.replace(quickstart_recipe(), model=model)
        begun = {"data.size": None, "data.channels": None}
        assert with_input_of_model(recipe, begun, Console(quiet=True)) == recipe
        new = with_input_of_model(recipe, None, Console(quiet=True)).data
        assert (new.size, new.channels) == (32, 3)
        later = with_input_of_model(recipe, {"data.size": 20, "data.channels": 1}, Console(quiet=True)).data
        assert (later.size, later.channels) == (20, 1)
        asked = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, size=24, channels=1))
        assert with_input_of_model(asked, None, Console(quiet=True)) == asked


class TestDamage:
    @pytest.mark.parametrize("text", ["", '{"architecture": ', "[]", "{}", "null", '{"architecture": 3}', "\x00\xff"])
    def test_a_configuration_that_is_none(self, saved, text):
        (saved / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json is damaged .*save the model again"):
            load(str(saved))

    def test_a_configuration_of_another_architecture(self, saved):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**config, "architecture": "resnet_from_elsewhere_fsr"}))
        with pytest.raises(ValueError, match="resnet_from_elsewhere_fsr"):
            load(str(saved))

    @pytest.mark.parametrize("change", [{"fsr_hidden": 8}, {"at": ["layer3"]}, {"block_args": 3}, {"num_classes": -1}])
    def test_a_configuration_that_does_not_fit_the_weights(self, saved, change):
        config = json.loads((saved / "config.json").read_text())
        config["model_args"] |= change
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"weights|arguments"):
            load(str(saved))

    @pytest.mark.parametrize("keep", [0, 5, 1000, -1])
    @pytest.mark.parametrize("noted", [True, False])
    def test_truncated_weights(self, saved, keep, noted):
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        if not noted:
            forget_checksum(saved)
        with pytest.raises(
            ValueError, match=r"weights of local-dir:.* are (damaged or were exchanged|missing, damaged)"
        ):
            load(str(saved))

    def test_weights_of_something_else(self, saved):
        save_file({"weight": torch.zeros(3)}, saved / "model.safetensors")
        for forget in (lambda: None, lambda: forget_checksum(saved)):
            forget()
            with pytest.raises(ValueError, match="weights"):
                load(str(saved))

    def test_exchanged_weights_of_the_same_shapes(self, saved, tmp_path):
        """Nothing but the checksum tells them apart, for plain networks too; timm itself does not look."""
        plain = save_pretrained(tiny_resnet(), tmp_path / "plain")
        for folder in (saved, plain):
            state = load_file(folder / "model.safetensors")
            save_file({**state, "fc.bias": state["fc.bias"] + 1}, folder / "model.safetensors")
            with pytest.raises(ValueError, match=r"exchanged: the SHA-256 of model\.safetensors is [0-9a-f]{16}"):
                load(str(folder))
        with pytest.raises(ValueError, match="exchanged"):
            timm.create_model(f"local-dir:{saved}", pretrained=True)

    @pytest.mark.parametrize("key", ["conv1.weight", "fsr.layer4.head.bias"])
    def test_weights_with_a_tensor_missing(self, saved, key):
        state = load_file(saved / "model.safetensors")
        del state[key]
        save_file(state, saved / "model.safetensors")
        forget_checksum(saved)
        with pytest.raises(ValueError, match=key.removeprefix("fsr.")):
            load(str(saved))

    @pytest.mark.parametrize("record", [{"format": 3, "version": "7.0"}, {"format": "x"}, "x"])
    def test_a_record_that_is_newer_or_none(self, saved, record):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**config, "timm_fsr": record}))
        with pytest.raises(ValueError, match=r"saved by timm_fsr 7\.0 in format 3, .* update timm_fsr|is damaged"):
            load(str(saved))
        with pytest.raises(ValueError, match=r"saved by timm_fsr 7\.0 in format 3, .* update timm_fsr|is damaged"):
            timm.create_model(f"local-dir:{saved}", pretrained=True)

    @pytest.mark.parametrize(
        ("section", "key"), [("model_args", "fsr_of_tomorrow"), ("model_args", "x"), ("pretrained_cfg", "x")]
    )
    @pytest.mark.parametrize("newer", [{"version": "9.0.0"}, {"timm": "9.1.0"}, {}])
    def test_what_only_a_newer_version_knows(self, saved, section, key, newer):
        config = json.loads((saved / "config.json").read_text())
        config[section][key] = 1
        config["timm_fsr"] |= newer
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"unknown argument|cannot be built") as caught:
            load(str(saved))
        told = (
            "; it was saved by timm_fsr 9.0.0 (this is 0"
            if "version" in newer
            else "; it was saved by timm 9.1.0 (this is 1"
        )
        assert str(caught.value).count(told) == bool(newer)
        assert ("update timm" in str(caught.value)) == bool(newer)
        if key == "fsr_of_tomorrow" and newer:
            with pytest.raises(ValueError, match=r"it was saved by timm.*: update timm"):
                timm.create_model(f"local-dir:{saved}", pretrained=True)

    def test_no_weights_at_all(self, saved):
        (saved / "model.safetensors").unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=str(saved)):
            load(str(saved))

    @pytest.mark.parametrize("architecture", ["resnet_tiny_cifar_fsr", "resnet_tiny_cifar"])
    @pytest.mark.parametrize("by", ["pickle", "torch"])
    def test_code_in_a_pickle_is_not_run(self, tmp_path, architecture, by):
        """Whoever opens a stranger's checkpoint must not run the stranger's code."""
        marker = tmp_path / "executed"
        folder = save_pretrained(timm.create_model(architecture), tmp_path / "saved")
        (folder / "model.safetensors").unlink()
        with (folder / "pytorch_model.bin").open("wb") as file:
            save = partial(pickle.dump, protocol=2) if by == "pickle" else torch.save
            save({"conv1.weight": Bomb(marker)}, file)
        with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
            load(str(folder))
        forget_checksum(folder)
        with pytest.raises(ValueError, match="or no plain tensors"):
            load(str(folder))
        with pytest.raises(ValueError, match="holds more than tensors, or is damaged, and is not read"):
            load(architecture, checkpoint_path=str(folder / "pytorch_model.bin"))
        assert not marker.exists()
