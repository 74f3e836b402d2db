"""Checkpoints: what is written, and what a new process makes of it."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.tiny import CLASSES, images, label_scale_registered, tiny_resnet, with_fsr
from support.variants import variant
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_fsr
from timm_fsr.layers import FSR
from timm_fsr.layers.base import layer_defaults
from timm_fsr.models.pixel import PixelModel, base_model
from timm_fsr.models.saving import load, save_pretrained, weights_digest
from timm_fsr.reports.report import Report

FILES = {"config.json", "model.safetensors", "modeling_timm_fsr.py"}


def grey_images(channels: int = 1) -> torch.Tensor:
    return images()[:, :channels]


def attached() -> nn.Module:
    """A plain timm model with layers attached by hand, at two places and with arguments that are no defaults."""
    torch.manual_seed(2)
    model = timm.create_model("test_resnet", num_classes=7)
    return timm_fsr.attach(model, at=(-2, -1), layer_args={"hidden": 4, "tau": 0.3, "noise": False}).eval()


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "variant": variant,
    "other arguments": lambda: variant(num_classes=3, in_chans=1, fsr_tau=0.5, fsr_feature_norm=True, at=["layer3"]),
    "attached": attached,
    "plain": lambda: timm.create_model("resnet_tiny_cifar", num_classes=4).eval(),
    "channels last": lambda: variant().to(memory_format=torch.channels_last),
}

IN_A_NEW_PROCESS = """
import sys, torch
torch.set_num_threads(1)
import timm, timm_fsr
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = model.state_dict()
    assert list(state) == list(expected["state"]), "keys"
    assert all(torch.equal(state[key], value) for key, value in expected["state"].items()), "weights"
    with torch.no_grad():
        assert torch.equal(model(expected["images"]), expected["logits"]), "logits"
    print("equal")
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_pretrained(variant(), tmp_path / "saved")


def test_a_new_process_rebuilds_the_model_bit_for_bit(tmp_path):
    folders = []
    for name, make in MAKERS.items():
        model = make()
        folders.append(save_pretrained(model, tmp_path / name.replace(" ", "_")))
        given = grey_images(model.in_chans)
        with torch.no_grad():
            # Contiguous memory there: another order of the same numbers may round differently.
            logits = model.to(memory_format=torch.contiguous_format)(given)
        torch.save({"state": model.state_dict(), "images": given, "logits": logits}, folders[-1] / "expected.pt")
    command = [sys.executable, "-W", "error", "-c", IN_A_NEW_PROCESS, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["equal"] * len(MAKERS)


class TestSaving:
    @pytest.mark.parametrize("make", [variant, attached], ids=["variant", "attached"])
    def test_every_argument_of_the_layer_is_written_out(self, tmp_path, make):
        model = make()
        config = json.loads((save_pretrained(model, tmp_path) / "config.json").read_text())
        layer = next(module for module in model.modules() if isinstance(module, FSR))
        assert set(layer_defaults(FSR)) == set(layer.resolved_args())
        for key, value in layer.resolved_args().items():
            assert config["model_args"][f"fsr_{key}"] == value
        assert config["model_args"]["at"] == [site.name for site in model.fsr.sites]
        assert config["architecture"].endswith("_fsr")

    def test_the_folder_holds_weights_and_configuration_and_the_report_if_given(self, tmp_path):
        report = Report(correct={"clean": torch.tensor([True])}, attacks={}, norm="linf", eps=0.1, seed=0)
        assert save_pretrained(variant(), str(tmp_path)) == tmp_path
        assert {path.name for path in tmp_path.iterdir()} == FILES
        save_pretrained(variant(), tmp_path, report=report)
        assert {path.name for path in tmp_path.iterdir()} == {*FILES, "report.json"}
        assert Report.load(tmp_path / "report.json").to_dict() == report.to_dict()
        save_pretrained(variant(), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == FILES, "a report about other weights stayed"

    def test_weights_are_contiguous_and_the_model_stays_as_it_is(self, tmp_path):
        model = variant().to(memory_format=torch.channels_last)
        arguments, config = dict(model._model_args), dict(model.pretrained_cfg)
        save_pretrained(model, tmp_path)
        written = load_file(tmp_path / "model.safetensors")
        assert all(tensor.is_contiguous() for tensor in written.values())
        assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert model._model_args == arguments
        assert model.pretrained_cfg == config

    def test_where_the_backbone_came_from_is_not_written(self, tmp_path):
        """The saved weights replace it: a reader must neither need nor download it."""
        save_file(timm.create_model("resnet_tiny_cifar").state_dict(), tmp_path / "backbone.safetensors")
        overlay = {"file": str(tmp_path / "backbone.safetensors")}
        model = timm.create_model("resnet_tiny_cifar_fsr", pretrained_backbone=True, pretrained_cfg_overlay=overlay)
        assert "pretrained_backbone" in model._model_args
        folder = save_pretrained(model, tmp_path / "saved")
        assert "backbone" not in (folder / "config.json").read_text()
        assert model._model_args["pretrained_backbone"] is True
        (tmp_path / "backbone.safetensors").unlink()
        assert torch.equal(load(str(folder)).conv1.weight, model.conv1.weight)

    def test_wrappers_are_taken_off(self, tmp_path):
        model = variant()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = {
                "pixels": PixelModel(model),
                "compiled": torch.compile(model),
                "ddp": DistributedDataParallel(PixelModel(model)),
                "all": torch.compile(DistributedDataParallel(torch.compile(PixelModel(model)))),
            }
            for name, wrapper in wrapped.items():
                assert base_model(wrapper) is model
                save_pretrained(wrapper, tmp_path / name)
        finally:
            dist.destroy_process_group()
        plain = save_pretrained(model, tmp_path / "plain")
        for name in wrapped:
            for file in FILES:
                assert (tmp_path / name / file).read_bytes() == (plain / file).read_bytes()

    @pytest.mark.parametrize(
        "model",
        [nn.Linear(2, 2), PixelModel(nn.Flatten()), nn.Sequential(tiny_resnet())],
        ids=["no timm model", "in pixels", "inside a container"],
    )
    def test_what_timm_could_not_rebuild_is_refused(self, tmp_path, model):
        with pytest.raises(ValueError, match=r"cannot be rebuilt from a checkpoint.*timm\.create_model"):
            save_pretrained(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_two_kinds_of_layers_are_refused(self, tmp_path):
        with label_scale_registered():
            model = timm_fsr.attach(with_fsr(tiny_resnet()), "label_scale")
            with pytest.raises(ValueError, match="one kind of feature layer; detach"):
                save_pretrained(model, tmp_path)

    def test_a_layer_without_registered_variants_is_refused(self, tmp_path):
        with label_scale_registered():
            model = timm_fsr.attach(tiny_resnet(), "label_scale")
            with pytest.raises(ValueError, match="'resnet_tiny_cifar_label_scale' is no registered timm model"):
                save_pretrained(model, tmp_path)

    def test_the_recipe_is_the_given_one_or_the_reports(self, tmp_path):
        conditions = {"recipe": {"seed": 1}}
        report = Report(
            correct={"clean": torch.tensor([True])}, attacks={}, norm="linf", eps=0.1, seed=0, conditions=conditions
        )
        save_pretrained(variant(), tmp_path, report=report)
        assert (tmp_path / "recipe.yaml").read_text() == "seed: 1\n"
        save_pretrained(variant(), tmp_path, report=report, recipe={"seed": 2})
        assert (tmp_path / "recipe.yaml").read_text() == "seed: 2\n"
        save_pretrained(variant(), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == FILES, "a recipe of other weights stayed"

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            (3, "recipe is int; give a timm_fsr.Recipe, keys and values, a text, or None"),
            ("runs/x/recipe.yaml", r"is the name of a file; give what it holds, by timm_fsr\.Recipe\.load"),
            ({"lr": torch.tensor(1.0)}, "holds a value that is not plain"),
        ],
    )
    def test_what_is_no_recipe(self, tmp_path, recipe, message):
        with pytest.raises(ValueError, match=message):
            save_pretrained(variant(), tmp_path / "new", recipe=recipe)
        assert not (tmp_path / "new").exists()

    def test_a_card_of_other_weights_goes_and_other_texts_stay(self, saved):
        for text, stays in (("---\nlibrary_name: timm\n---\n# A card\n", False), ("# What this folder is\n", True)):
            (saved / "README.md").write_text(text)
            save_pretrained(variant(num_classes=3), saved)
            assert (saved / "README.md").exists() == stays

    def test_the_checksum_is_the_files(self, saved):
        record = json.loads((saved / "config.json").read_text())["timm_fsr"]
        content = (saved / "model.safetensors").read_bytes()
        assert record["sha256"] == hashlib.sha256(content).hexdigest() == weights_digest(variant())
        assert record["bytes"] == len(content)

    def test_a_full_disk_leaves_the_old_checkpoint(self, saved):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"could not write to .* untouched: free space") as caught:
                save_pretrained(variant(num_classes=3), saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        assert load(str(saved)).num_classes == CLASSES


class TestLoading:
    def test_a_folder_goes_by_path_or_by_timms_name(self, saved):
        for name in (str(saved), f"local-dir:{saved}"):
            model = load(name)
            assert torch.equal(model.fc.weight, variant().fc.weight)
            assert model.fsr["layer4"].hidden == 4

    def test_arguments_are_timms(self, saved):
        assert load(str(saved), num_classes=3).fsr["layer4"].head.out_features == 3
        assert load("resnet_tiny_cifar_fsr", fsr_hidden=2).fsr["layer4"].hidden == 2

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("resnet_tiny_cifar_frs", ValueError, r"unknown model .* did you mean 'resnet_tiny_cifar_fsr'"),
            ("my_model", ValueError, r"unknown model 'my_model'.*no folder is called so"),
            ("local-dir:nowhere", FileNotFoundError, r"nowhere has no config\.json.*save_pretrained wrote"),
            ("runs/nowhere/best", FileNotFoundError, "there is no folder runs/nowhere/best"),
            ("./model.pth", FileNotFoundError, r"there is no folder \./model\.pth"),
        ],
    )
    def test_what_does_not_exist(self, tmp_path, monkeypatch, name, error, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            load(name)

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "model.pth").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model\.pth is a file; .* checkpoint_path"):
            load(str(tmp_path / "model.pth"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth_of_thought": 3}, "depth_of_thought"),
            ({"fsr_hiden": 3}, "did you mean 'hidden'"),
            ({"fsr_hidden": "wide"}, "fsr"),
            ({"fsr_tau": -1.0}, "tau=-1.0 must be positive"),
            ({"at": (99,)}, "99"),
            ({"pretrained": True}, "pretrained_backbone=True"),
        ],
    )
    def test_arguments_that_cannot_work(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            load("resnet_tiny_cifar_fsr", **arguments)

    def test_no_network(self):
        """Offline, as all tests are: an error that the command line prints as one sentence."""
        with pytest.raises(OSError, match="check your connection"):
            load("hf-hub:somebody/nothing")


class TestFromPretrained:
    def test_other_classes_and_channels_start_a_head_and_adapt_the_first_layer(self, saved):
        model = timm_fsr.from_pretrained(saved, num_classes=3, in_chans=1)
        assert model.fc.out_features == model.fsr["layer4"].head.out_features == 3
        expected = variant().conv1.weight.sum(dim=1, keepdim=True)  # timm's rule for grey images
        torch.testing.assert_close(model.conv1.weight, expected)

    def test_weights_are_loaded_without_asking(self, saved):
        assert torch.equal(timm_fsr.from_pretrained(str(saved)).fc.weight, variant().fc.weight)

    def test_an_architecture_alone_is_no_trained_model(self):
        with pytest.raises(ValueError, match=r"no weights of the whole model 'resnet_tiny_cifar_fsr' exist"):
            timm_fsr.from_pretrained("resnet_tiny_cifar_fsr")

    def test_a_folder_goes_before_a_repository_of_the_same_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_pretrained(variant(), "owner/name")
        assert timm_fsr.from_pretrained("owner/name").num_classes == CLASSES
        message = r"there is no folder nobody/nothing here, and as a repository: .*nobody/nothing is not in the cache"
        with pytest.raises(FileNotFoundError, match=message):
            timm_fsr.from_pretrained("nobody/nothing")


@pytest.fixture(autouse=True)
def _no_default_process_group() -> Iterator[None]:
    yield
    assert not dist.is_initialized()
