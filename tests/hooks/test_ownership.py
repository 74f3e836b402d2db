"""Whatever stands at the model's root is the layer: it acts, trains, is saved and is loaded again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import CLASSES, images, labels, tiny_resnet, tiny_vit, total_loss, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.hooks.surrogates import surrogate

NETWORKS = [tiny_resnet, tiny_vit]


class Wrapper(nn.Module):
    """What PEFT's `modules_to_save` puts in the place of a module: a copy that is trained, and the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original).requires_grad_(True)})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("modules_to_save")["default"], name)

    def forward(self, *args: Any) -> Any:
        return self.modules_to_save["default"](*args)


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


def key_of(model: nn.Module) -> str:
    return next(iter(model.fsr))


def fresh_layer(model: nn.Module, **args: Any) -> nn.Module:
    torch.manual_seed(5)
    return timm_fsr.FSR(model.fsr.sites[0].layout.channels, CLASSES, **{"hidden": 4, **args}).train(model.training)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_assigned_layer_acts_trains_is_saved_and_loaded(network: Any, tmp_path: Path) -> None:
    model = with_fsr(network()).eval()
    before, key = model(images()), key_of(model)
    old = model.fsr[key]
    model.fsr[key] = new = fresh_layer(model, hidden=6, tau=0.3)
    logits = model(images())
    assert not torch.allclose(logits, before)
    assert torch.equal(copy.deepcopy(model)(images()), logits)
    total_loss(model).backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    assert all(parameter.grad is None for parameter in old.parameters())
    if network is tiny_resnet:
        folder = timm_fsr.save_pretrained(model, tmp_path / "saved")
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert (again.fsr[key].hidden, again.fsr[key].tau) == (6, 0.3)
        assert torch.equal(again(images()), logits)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_wrapper_around_the_layer_acts_and_trains(network: Any, tmp_path: Path) -> None:
    model = with_fsr(network()).eval()
    expected, key = model(images()), key_of(model)
    model.fsr[key] = wrapper = Wrapper(model.fsr[key])
    assert torch.equal(model(images()), expected)
    total_loss(model).backward()
    assert all(parameter.grad is not None for parameter in wrapper.modules_to_save.parameters())
    assert all(parameter.grad is None for parameter in wrapper.original_module.parameters())
    with torch.no_grad():
        for parameter in wrapper.modules_to_save.parameters():
            parameter.mul_(1.5)
    changed = model(images())
    assert not torch.allclose(changed, expected)
    with surrogate(model, "robust_part"):
        assert not torch.allclose(model(images()), changed)
    with pytest.raises(ValueError, match=r"Wrapper at model\.fsr\['.*'\] cannot be saved"):
        timm_fsr.save_pretrained(model, tmp_path)
    model.fsr[key] = wrapper.modules_to_save["default"]  # unwrapped, as PEFT does when it merges
    assert torch.equal(model(images()), changed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_layer_acts_records_trains_is_saved_and_loaded(tmp_path: Path) -> None:
    model = with_fsr(tiny_resnet(), noise=False).eval()
    expected, key = model(images()), key_of(model)
    model.fsr[key] = torch.compile(model.fsr[key], backend="eager")
    torch.testing.assert_close(model(images()), expected)
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images())
    sum(tape.losses(logits).values()).backward()
    with surrogate(model, "robust_part"):
        assert not torch.allclose(model(images()), expected)
    torch.testing.assert_close(model(images()), expected)
    folder = timm_fsr.save_pretrained(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(again(images()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_quantised_model_runs_and_is_not_saved(tmp_path: Path) -> None:
    model = with_fsr(tiny_resnet()).eval()
    expected = model(images())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.fsr["layer4"].head) is not nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(quantised(images()), expected, rtol=0.1, atol=0.1)
        with timm_fsr.record(quantised, labels()) as tape:
            tape.losses(quantised(images()))
    with pytest.raises(ValueError, match="cannot be saved"):
        timm_fsr.save_pretrained(quantised, tmp_path)


def test_what_is_no_layer_is_refused_by_name() -> None:
    model = with_fsr(tiny_resnet())
    with pytest.raises(ValueError, match="Identity cannot be the feature layer 'layer4'"):
        model.fsr["layer4"] = nn.Identity()


def test_sites_that_differ_cannot_be_saved(tmp_path: Path) -> None:
    model = with_fsr(tiny_resnet(), at=(-2, -1))
    model.fsr["layer4"] = fresh_layer(model, hidden=6)
    model(images())
    with pytest.raises(ValueError, match="with the same arguments at each site"):
        timm_fsr.save_pretrained(model, tmp_path)


def test_attach_inside_an_open_recording_is_refused() -> None:
    model = tiny_resnet()
    with timm_fsr.record(nn.Sequential(model)), pytest.raises(ValueError, match="would not hear the new layers"):
        timm_fsr.attach(model)
    timm_fsr.attach(model)


class Ensemble(nn.Module):
    """The mean of two models."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


def test_two_models_inside_one_recorded_module_are_both_heard() -> None:
    first, second = with_fsr(tiny_resnet()).eval(), with_fsr(tiny_resnet(), tau=1.0).eval()
    with timm_fsr.record(Ensemble(first, second), labels()) as tape:
        logits = Ensemble(first, second)(images())
    assert list(tape) == ["first.fsr.layer4", "second.fsr.layer4"]
    assert not torch.equal(tape["first.fsr.layer4"].mask, tape["second.fsr.layer4"].mask)
    with pytest.raises(KeyError, match="ambiguous"):
        tape["layer4"]
    alone = []
    for model in (first, second):
        with timm_fsr.record(model, labels()) as single:
            model(images())
        alone.append(single.losses(logits))
    for name, value in tape.losses(logits).items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_model_built_in_inference_mode_is_the_same_model(network: Any) -> None:
    expected = with_fsr(network()).eval()
    with torch.inference_mode():
        model = with_fsr(network()).eval()
        assert torch.equal(model(images()), expected(images()))
        with timm_fsr.record(model, labels()) as tape:
            tape.losses(model(images()))
    assert [site.path for site in model.fsr.sites] == [site.path for site in expected.fsr.sites]
    assert not any(parameter.is_inference() for parameter in model.fsr.parameters())


# torch.fx.

CONTROL_FLOW = {"cifs", "kwta"}  # their shapes or their classes decide what is computed


@pytest.mark.parametrize("layer", timm_fsr.list_layers())
@pytest.mark.parametrize("network", NETWORKS)
def test_fx_traces_a_layer_or_names_it(network: Any, layer: str) -> None:
    model = timm_fsr.attach(network(), layer).eval()
    if network is tiny_vit or layer in CONTROL_FLOW:
        with pytest.raises(ValueError, match=f"torch.fx cannot trace the {layer} layer at .*; use torch.export"):
            torch.fx.symbolic_trace(model)
        model(images())
        return
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad(), warnings.catch_warnings():
        assert torch.equal(traced(images()), model(images()))
