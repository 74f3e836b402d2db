"""Registered variants, as timm's users create, load and save them."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.tiny import CLASSES, images, tiny_resnet, total_loss, with_fsr
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from timm.models import _registry as timm_registry
from timm.models._hub import save_for_hf
from torch import nn

import timm_fsr
from timm_fsr.models import variants as models

CIFAR = (
    "resnet18_cifar",
    "resnet18_half_cifar",
    "preact_resnet18_cifar",
    "wrn28_10_cifar",
    "wrn34_10_cifar",
    "vgg16_bn_cifar",
    "mobilenetv2_cifar",
    "vit_tiny_patch4_32",
    "resnet_tiny_cifar",
)
HEAVY = ("accelerate", "datasets", "pandas", "jsonargparse", "matplotlib", "pyautoattack")


def variant(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet_tiny_cifar_fsr", **{"fsr_hidden": 4, **kwargs}).eval()


def hub_folder(model: nn.Module, folder: Path) -> str:
    """Save as timm does, and return timm's name for the folder."""
    save_for_hf(model, str(folder), safe_serialization=True)
    assert not list(folder.glob("*.bin"))
    return f"local-dir:{folder}"


def trained(model: nn.Module) -> nn.Module:
    """`model` after a step, so that running statistics and heads differ from fresh ones."""
    total_loss(model.train()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
    return model.eval()


# The registry.


@pytest.mark.parametrize("layer", timm_fsr.list_layers())
def test_every_architecture_has_a_variant(layer: str) -> None:
    bases = [name for name in timm.list_models() if name not in models.default_cfgs]
    variants = set(timm.list_models(f"*_{layer}")) - set(bases)
    assert variants == {f"{name}_{layer}" for name in bases if name not in models.UNSUPPORTED}
    assert {f"{name}_{layer}" for name in CIFAR} <= variants
    assert len(variants) > 1300
    assert not any(f"{name}_{layer}" in models.default_cfgs for name in variants)


def test_registering_again_changes_nothing() -> None:
    before = {name: timm.model_entrypoint(name) for name in timm.list_models("resnet*_fsr")}
    models.register_variants()
    assert {name: timm.model_entrypoint(name) for name in timm.list_models("resnet*_fsr")} == before


def test_a_variant_has_its_base_s_configuration_and_no_weights() -> None:
    assert [name for name in timm.list_pretrained("*_fsr*") if "." not in name] == []
    base, config = (timm.get_pretrained_cfg(name) for name in ("resnet18", "resnet18_fsr"))
    assert base.has_weights
    assert not config.has_weights
    assert config.architecture == "resnet18_fsr"
    assert (config.mean, config.std, config.input_size) == (base.mean, base.std, base.input_size)


@pytest.fixture
def further_layer() -> Iterator[str]:
    """A made-up layer that has variants of three architectures; afterwards timm knows nothing of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", lambda: ["resnet18", "resnet18_fsr", "resnet_tiny_cifar", "vgg11"])
        models.register_variants(("further",))
    yield "further"
    for name in (f"{base}_further" for base in ("resnet18", "resnet_tiny_cifar", "vgg11")):
        timm_registry._clear_model_entries(name)
        del timm_registry._model_entrypoints[name], models.default_cfgs[name], vars(models)[name]
        models.__all__.remove(name)


def test_variants_of_a_further_layer_are_registered_as_timm_would(further_layer: str) -> None:
    """And are not variants of variants."""
    assert timm.list_models("*_further") == ["resnet18_further", "resnet_tiny_cifar_further", "vgg11_further"]
    assert timm.list_models("*_further", module="variants") == timm.list_models("*_further")
    assert timm.list_models("*_further", pretrained=True) == []
    assert not timm.is_model_pretrained("resnet18_further")
    assert set(models.__all__) >= {"resnet18_fsr", "resnet18_further"}
    bare = dict.fromkeys(("url", "hf_hub_id", "source", "tag")) | {"custom_load": False}
    for name in ("resnet18", "vgg11"):
        config = timm.get_pretrained_cfg(f"{name}_further")
        assert type(config) is PretrainedCfg
        base = timm.get_pretrained_cfg(name)
        assert config == dataclasses.replace(base, architecture=f"{name}_further", **bare)
        assert models.default_cfgs[f"{name}_further"].default == config
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.get_pretrained_cfg("resnet18_further.a1_in1k")
    with pytest.raises(ValueError, match="unknown feature layer 'further'"):
        timm.create_model("resnet18_further")


def test_the_garbage_collector_works_again_after_registering() -> None:
    for switch, state in ((gc.disable, False), (gc.enable, True)):
        switch()
        models.register_variants()
        assert gc.isenabled() is state


# Creating.


def test_a_variant_is_the_base_with_the_layer_attached() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet_tiny_cifar_fsr").eval()
    torch.manual_seed(0)
    attached = timm_fsr.attach(timm.create_model("resnet_tiny_cifar")).eval()
    assert list(model.state_dict()) == list(attached.state_dict())
    assert torch.equal(model(images()), attached(images()))
    assert model._model_args == attached._model_args
    assert model.pretrained_cfg["architecture"] == attached.pretrained_cfg["architecture"] == "resnet_tiny_cifar_fsr"
    assert model.default_cfg is model.pretrained_cfg


@pytest.mark.parametrize(
    ("base", "place"), [("resnet18_cifar", "layer4"), ("wrn34_10_cifar", "norm"), ("vgg16_bn_cifar", "features.32")]
)
def test_the_official_places_are_the_defaults(base: str, place: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"{base}_fsr")
    assert [site.name for site in model.fsr.sites] == [place]


def test_arguments_of_model_and_layer() -> None:
    model = timm.create_model(
        "resnet_tiny_cifar_fsr", num_classes=7, in_chans=1, at=(-2, -1), fsr_hidden=3, fsr_tau=1, fsr_noise=False
    )
    assert model(images()[:, :1]).shape == (4, 7)
    assert list(model.fsr) == ["layer3", "layer4"]
    for layer in model.fsr.values():
        assert (layer.hidden, layer.tau, layer.noise, layer.head.out_features) == (3, 1, False, 7)
    assert model._model_args["fsr_recalibration_weight"] == 1.0
    assert json.loads(json.dumps(model._model_args))["at"] == [-2, -1]
    assert resolve_data_config(model=model)["mean"] == (0.0, 0.0, 0.0)


def test_no_classes() -> None:
    model = variant(num_classes=0)
    assert model(images()).shape == (4, 64)
    assert model.fsr["layer4"].head is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fsr_taau": 0.1}, ValueError, "unknown argument of the feature layer 'fsr' 'taau'; did you mean 'tau'"),
        ({"fsr_tau": "0.1"}, ValueError, "'fsr' takes tau as float"),
        ({"fsr_hidden": 0}, ValueError, "hidden=0 must be at least 1"),
        ({"at": "layer9"}, ValueError, "'layer9'; did you mean 'layer4'"),
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timm.create_model("resnet_tiny_cifar_fsr", **arguments)


# Weights of the whole model.


def test_pretrained_without_weights_does_not_take_the_backbone_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    with pytest.raises(RuntimeError, match=r"no weights of the whole model 'resnet18_fsr' .* pretrained_backbone=True"):
        timm.create_model("resnet18_fsr", pretrained=True)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("resnet18_fsr.a1_in1k", pretrained=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    model, file = trained(variant()), tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(model.state_dict(), file)
    overlay = variant(pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    checkpoint = variant(checkpoint_path=str(file))
    for loaded in (overlay, checkpoint):
        assert torch.equal(loaded(images()), model(images()))
    assert overlay.pretrained_cfg["architecture"] == "resnet_tiny_cifar_fsr"


def test_a_state_dict_in_the_configuration() -> None:
    model = trained(variant())
    loaded = variant(pretrained=True, pretrained_cfg_overlay={"state_dict": model.state_dict()})
    assert torch.equal(loaded(images()), model(images()))
    assert "state_dict" not in loaded.pretrained_cfg


def test_another_number_of_classes_or_channels_is_adapted(tmp_path: Path) -> None:
    model = trained(variant())
    name = hub_folder(model, tmp_path / "hub")
    fewer = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert fewer(images()).shape == (4, 3)
    assert fewer.fsr["layer4"].head.out_features == 3
    changed = {key for key, value in fewer.state_dict().items() if not value.equal(model.state_dict()[key])}
    assert changed == {"fc.weight", "fc.bias", "fsr.layer4.head.weight", "fsr.layer4.head.bias"}
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    torch.testing.assert_close(grey.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    assert grey(images()[:, :1]).shape == (4, CLASSES)


def test_a_reset_number_of_classes_is_saved(tmp_path: Path) -> None:
    model = variant(num_classes=5)
    model.reset_classifier(7)
    loaded = timm.create_model(hub_folder(model, tmp_path / "hub"), pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.fsr["layer4"].head.out_features == 7


def test_weights_without_the_layer_are_refused(tmp_path: Path) -> None:
    plain = tiny_resnet()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"hold no 'fsr' layer; .* use pretrained_backbone=True"):
        variant(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "plain.safetensors")})
    name = hub_folder(variant(), tmp_path / "hub")
    save_file(plain.state_dict(), tmp_path / "hub" / "model.safetensors")
    with pytest.raises(ValueError, match="hold no 'fsr' layer"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("other", [{"fsr_hidden": 5}, {"at": "layer3"}, {"fsr_feature_norm": True}])
def test_weights_of_another_layer_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    save_file(variant().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="do not fit the feature layer"):
        variant(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")}, **other)


class Payload:
    """Unpickling it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("option", ["pretrained", "pretrained_backbone", "checkpoint_path"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, option: str) -> None:
    file, harm = tmp_path / "weights.pth", tmp_path / "harm"
    torch.save({"state_dict": variant().state_dict(), "payload": Payload(harm)}, file)
    arguments = {option: str(file)}
    if option != "checkpoint_path":
        arguments = {option: True, "pretrained_cfg_overlay": {"file": str(file)}}
    with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
        variant(**arguments)
    assert not harm.exists()


@pytest.mark.parametrize("option", ["pretrained", "pretrained_backbone"])
def test_a_missing_file_is_named(tmp_path: Path, option: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no weights at '.*nowhere\.pth'"):
        variant(**{option: True}, pretrained_cfg_overlay={"file": str(tmp_path / "nowhere.pth")})


# The backbone's weights.


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_backbone_weights_under_a_fresh_layer(tmp_path: Path, suffix: str) -> None:
    plain, file = tiny_resnet(), tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(plain.state_dict(), file)
    options = {"pretrained_backbone": True, "pretrained_cfg_overlay": {"file": str(file)}}
    torch.manual_seed(5)
    model = timm.create_model("resnet_tiny_cifar_fsr", **options)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert model.pretrained_cfg["architecture"] == "resnet_tiny_cifar_fsr"

    adapted = variant(num_classes=3, in_chans=1, **options)
    torch.testing.assert_close(adapted.conv1.weight, plain.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(adapted.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    assert adapted(images()[:, :1]).shape == (4, 3)
    assert adapted.fsr["layer4"].hidden == 4


def test_a_saved_model_does_not_ask_for_its_backbone_again(tmp_path: Path) -> None:
    file = tmp_path / "plain.pth"
    torch.save(tiny_resnet().state_dict(), file)
    model = trained(variant(pretrained_backbone=True, pretrained_cfg_overlay={"file": str(file)}))
    name = hub_folder(model, tmp_path / "hub")
    file.unlink()
    for pretrained in (True, False):
        loaded = timm.create_model(name, pretrained=pretrained).eval()
        assert torch.equal(loaded(images()), model(images())) == pretrained


def test_backbone_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for resnet_tiny_cifar"):
        variant(pretrained_backbone=True)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(no_such_tag\) for resnet18"):
        timm.create_model("resnet18_fsr", pretrained_backbone="no_such_tag")


# Features.


def test_features_only() -> None:
    model = timm.create_model("resnet_tiny_cifar_fsr", features_only=True, out_indices=(2, 4), fsr_hidden=4)
    plain = timm.create_model("resnet_tiny_cifar", features_only=True, out_indices=(2, 4))
    assert model.feature_info.channels() == plain.feature_info.channels()
    assert [f.shape for f in model(images())] == [f.shape for f in plain(images())]


def test_features_without_intermediates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.ResNet, "forward_intermediates")
    with pytest.raises(ValueError, match="resnet_tiny_cifar has no forward_intermediates"):
        timm.create_model("resnet_tiny_cifar_fsr", features_only=True)


# A new process.

CHILD = """
import sys, torch, timm
before = set(sys.modules)
import timm_fsr
heavy = [name for name in sys.argv[2].split(",") if name in sys.modules and name not in before]
assert not heavy, f"import timm_fsr loads {heavy}"
from safetensors.torch import load_file, save_file
images = load_file(sys.argv[1])["images"]
for folder in sys.argv[3:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.no_grad():
        save_file({"logits": model(images), **model.state_dict()}, folder + "/seen.safetensors")
"""


def test_saved_models_are_the_same_in_a_new_process(tmp_path: Path) -> None:
    """And there importing timm_fsr loads nothing that only training or the command line needs."""
    saved = {
        "variant": trained(variant()),
        "arguments": trained(variant(at="stages", fsr_tau=0.5, fsr_feature_norm=True)),
        "attached": trained(with_fsr(tiny_resnet(), at=(-2,), noise=False)),
        "vit": trained(
            timm.create_model("test_vit_fsr", num_classes=CLASSES, img_size=32, depth=2, reg_tokens=2, fsr_hidden=4)
        ),
    }
    for name, model in saved.items():
        hub_folder(model, tmp_path / name)
    save_file({"images": images()}, tmp_path / "images.safetensors")
    folders = [str(tmp_path / name) for name in saved]
    arguments = [str(tmp_path / "images.safetensors"), ",".join(HEAVY), *folders]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, model in saved.items():
        seen = load_file(tmp_path / name / "seen.safetensors")
        assert torch.equal(seen.pop("logits"), model(images())), name
        assert seen.keys() == model.state_dict().keys()
        assert all(torch.equal(seen[key], value) for key, value in model.state_dict().items()), name
