from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support.backbones import TinyBackbone
from support.tiny import (
    CLASSES,
    images,
    labels,
    layers_registered,
    same_state,
    state,
    tiny_resnet,
    tiny_vit,
    total_loss,
    traces,
    with_fsr,
)
from torch import Tensor, nn

import timm_fsr
from timm_fsr.layers import FeatureLayer

HEADS = {"robust_logits", "nonrobust_logits", "recalibrated_logits"}


# On every layout.


def test_attach_changes_the_logits_and_detach_restores_the_model(backbone: TinyBackbone) -> None:
    model = backbone.create().eval()
    before, arguments, config = state(model), copy.deepcopy(model._model_args), copy.deepcopy(model.pretrained_cfg)
    attributes, expected = set(model.__dict__), model(backbone.images())

    assert timm_fsr.attach(model, layer_args={"hidden": 4}) is model
    with_layer = model(backbone.images())
    assert with_layer.shape == expected.shape
    assert not torch.allclose(with_layer, expected, rtol=0, atol=1e-6)
    added = model.state_dict().keys() - before.keys()
    assert added
    assert all(key.startswith("fsr.") for key in added)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    assert timm_fsr.detach(model) is model
    assert same_state(model, before)
    assert torch.equal(model(backbone.images()), expected)
    assert (model._model_args, model.pretrained_cfg) == (arguments, config)
    assert set(model.__dict__) == attributes
    assert traces(model) == []


def test_the_main_loss_reaches_every_new_parameter_but_the_heads(backbone: TinyBackbone) -> None:
    model = with_fsr(backbone.create()).train()
    model(backbone.images()).square().sum().backward()
    for key, parameter in model.fsr.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == (".head." not in key), key


@pytest.mark.parametrize("training", [True, False])
def test_recording(backbone: TinyBackbone, training: bool) -> None:
    model = with_fsr(backbone.create()).train(training)
    (site,) = model.fsr.sites
    assert (site.layout.kind, site.layout.prefix_tokens) == (backbone.layout, backbone.prefix_tokens)
    with timm_fsr.record(model, labels(2)) as tape:
        logits = model(backbone.images())
    aux = tape[site.name]
    assert list(tape) == [site.name]
    assert set(vars(aux)) == {"mask", *HEADS}
    height, width = backbone.input_size[1:]
    batch, channels, rows, columns = aux.mask.shape
    assert (batch, channels) == (2, site.layout.channels)
    assert rows * width == columns * height  # the image's aspect ratio
    assert all(getattr(aux, head).shape == logits.shape for head in HEADS)
    losses = tape.losses(logits)
    assert set(losses) == {"fsr.separation", "fsr.recalibration"}
    (sum(losses.values()) + logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.fsr.parameters())


def test_eval_mode_is_deterministic_and_recording_changes_nothing(backbone: TinyBackbone) -> None:
    model = with_fsr(backbone.create()).eval()
    expected = model(backbone.images())
    with timm_fsr.record(model, labels(2)):
        assert torch.equal(model(backbone.images()), expected)
    assert torch.equal(model(backbone.images()), expected)


def test_plain_weights_load_under_a_fresh_layer(backbone: TinyBackbone) -> None:
    model = with_fsr(backbone.create())
    missing, unexpected = model.load_state_dict(backbone.create().state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(key.startswith("fsr.") for key in missing)


# Places.


@pytest.mark.parametrize(
    ("at", "names"),
    [
        (None, ["layer4"]),
        (-1, ["layer4"]),
        ((-2, -1), ["layer3", "layer4"]),
        ([1], ["layer1"]),
        ("stages", ["layer1", "layer2", "layer3", "layer4"]),
        ("blocks:-1", ["layer4.0"]),
        ("layer2", ["layer2"]),
        (("conv1", -1), ["conv1", "layer4"]),
    ],
)
def test_places_by_index_group_and_name(at: Any, names: list[str]) -> None:
    model = with_fsr(tiny_resnet(), at=at)
    assert [site.name for site in model.fsr.sites] == names
    assert list(model.fsr) == [name.replace(".", "_") for name in names]
    with timm_fsr.record(model, labels()) as tape:
        model(images())
    assert list(tape) == names
    assert len(tape) == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "fsrr"}, "unknown feature layer 'fsrr'; did you mean 'fsr'"),
        ({"layer_args": {"taau": 1.0}}, "'taau'; did you mean 'tau'"),
        ({"layer_args": {"tau": "0.1"}}, "takes tau as float"),
        ({"layer_args": {"tau": -1.0}}, r"tau=-1\.0 must be positive"),
        ({"at": "layer5"}, "'layer5'; did you mean .*'layer4'"),
        ({"at": 9}, "index 9 is not in the feature_info of ResNet .*4: layer4"),
        ({"at": ()}, "names no place"),
        ({"at": "fc"}, "not one spatial feature map"),
    ],
)
def test_a_refused_attach_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny_resnet()
    before, attributes = state(model), copy.deepcopy(dict(model.pretrained_cfg, **model._model_args))
    with pytest.raises(ValueError, match=message):
        timm_fsr.attach(model, **options)
    assert same_state(model, before)
    assert traces(model) == []
    assert dict(model.pretrained_cfg, **model._model_args) == attributes


def test_a_layer_is_attached_once() -> None:
    model = with_fsr(tiny_resnet())
    with pytest.raises(ValueError, match=r"'fsr' already; call timm_fsr\.detach"):
        timm_fsr.attach(model)
    assert len(model.fsr) == 1


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_refused(wrap: Any) -> None:
    with pytest.raises(ValueError, match="attach feature layers to the model, then wrap it"):
        timm_fsr.attach(wrap(tiny_resnet()))


def test_a_copy_by_data_parallel_says_what_to_do_instead() -> None:
    """It would run the original's layer: on another device an error without a remedy, on the same one unnoticed."""
    model = with_fsr(tiny_resnet())
    module = model.get_submodule(model.fsr.sites[0].path)
    copy = module._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"do not work in torch\.nn\.DataParallel .* use DistributedDataParallel"):
        next(iter(copy._forward_hooks.values()))(copy, (), torch.zeros(1, 1, 1, 1))


def test_a_module_outside_timm_needs_a_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.num_classes = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES), CLASSES

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3)))

    model = Net()
    with pytest.raises(ValueError, match="name modules instead"):
        timm_fsr.attach(model)
    total_loss(with_fsr(model, at="conv")).backward()
    timm_fsr.detach(model)
    assert traces(model) == []
    assert {key.split(".")[0] for key in model.state_dict()} == {"conv", "fc"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_takes_over_mode_dtype_and_device(training: bool, dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        model = with_fsr(tiny_resnet().to(device, dtype).train(training))
        assert all(module.training == training for module in model.fsr.modules())
        assert {(p.device.type, p.dtype) for p in model.fsr.parameters()} == {(device, dtype)}


def test_resolved_arguments_and_names_stay_with_the_model() -> None:
    model = with_fsr(tiny_resnet(), at=(-2, -1), tau=0.5)
    assert model.pretrained_cfg["architecture"] == "resnet_tiny_cifar_fsr"
    arguments = json.loads(json.dumps(model._model_args))
    assert arguments.pop("at") == ["layer3", "layer4"]
    assert arguments == {f"fsr_{key}": value for key, value in model.fsr["layer4"].resolved_args().items()}
    assert arguments["fsr_tau"] == 0.5
    assert arguments["fsr_hidden"] == 4


# Image sizes.


# 32x48 and 48x32 give equally many tokens, so that the grid cannot come from their number.
@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "global_pool": "token", "reg_tokens": 2}])
def test_the_grid_follows_the_image(prefix: dict[str, Any]) -> None:
    model = with_fsr(tiny_vit(dynamic_img_size=True, **prefix)).train()
    for height, width in ((32, 32), (32, 48), (48, 32), (64, 64), (16, 64), (32, 32)):
        with timm_fsr.record(model, labels()) as tape:
            logits = model(images(4, height, width))
        (aux,) = tape.values()
        assert aux.mask.shape == (4, 16, height // 8, width // 8)
        sum(tape.losses(logits).values()).backward()


def test_an_image_that_patches_do_not_fill() -> None:
    model = with_fsr(tiny_vit(dynamic_img_size=True, dynamic_img_pad=True)).eval()
    with timm_fsr.record(model) as tape:
        model(images(2, 33, 47))
    assert tape["blocks.1"].mask.shape == (2, 16, 5, 6)


def test_set_input_size() -> None:
    model = with_fsr(tiny_vit()).eval()
    model.set_input_size((32, 64))
    with timm_fsr.record(model) as tape:
        model(images(2, 32, 64))
    assert tape["blocks.1"].mask.shape == (2, 16, 4, 8)


# Class tokens.

TOKEN = {"class_token": True, "global_pool": "token"}


def test_a_site_whose_output_only_the_class_token_would_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pools its class token, .* use at=\(-2,\) or global_pool='avg'"):
        with_fsr(tiny_vit(**TOKEN), at=-1)
    assert with_fsr(tiny_vit(**TOKEN), at=-2).fsr.sites[0].name == "blocks.0"
    assert with_fsr(tiny_vit(class_token=True, global_pool="avg"), at=-1).fsr.sites[0].name == "blocks.1"


def test_the_default_of_a_class_token_model_reaches_the_logits() -> None:
    model = tiny_vit(**TOKEN).eval()
    plain = model(images())
    assert with_fsr(model).fsr.sites[0].name == "blocks.0"
    assert not torch.allclose(model(images()), plain, rtol=0, atol=1e-6)


def test_prefix_tokens_leave_the_site_as_they_came() -> None:
    model = tiny_vit(reg_tokens=3, **TOKEN).eval()
    outputs: list[Tensor] = []
    for attached in (False, True):
        if attached:
            with_fsr(model)
        hook = model.blocks[0].register_forward_hook(lambda *args: outputs.append(args[2]))
        model(images())
        hook.remove()
    plain, layered = outputs
    assert torch.equal(plain[:, :4], layered[:, :4])
    assert not torch.allclose(plain[:, 4:], layered[:, 4:])


# Every layer, at its own place.


@pytest.mark.parametrize("layer", timm_fsr.list_layers())
def test_every_layer_runs_trains_and_leaves_on_every_backbone(backbone: TinyBackbone, layer: str) -> None:
    model = backbone.create().eval()
    before, expected = state(model), model(backbone.images())
    timm_fsr.attach(model, layer)
    with torch.no_grad():
        out = model(backbone.images())
        assert torch.equal(out, model(backbone.images()))
    assert out.shape == expected.shape
    assert out.isfinite().all()
    with timm_fsr.record(model.train(), labels(2)) as tape:
        logits = model(backbone.images())
    (logits.square().mean() + sum(tape.losses(logits).values())).backward()
    assert all(parameter.grad is not None for parameter in getattr(model, layer).parameters())
    clone = copy.deepcopy(timm_fsr.attach(backbone.create(), layer))
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone.eval()(backbone.images()), model.eval()(backbone.images()))
    timm_fsr.detach(model).load_state_dict(before)
    assert torch.equal(model(backbone.images()), expected)


@pytest.mark.parametrize("layer", [None, 5])
def test_what_names_no_layer_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match=rf"layer={layer} names no feature layer; give one of afd, "):
        timm_fsr.attach(tiny_resnet(), layer)


def test_a_layer_that_needs_numbers_to_be_built_is_attached():
    """Its size is not known beforehand, as on the meta device there are none."""

    class Measured(FeatureLayer):
        name = "measured"

        def __init__(self, channels: int, num_classes: int, *, start: float = 1.0) -> None:
            super().__init__()
            self.start = start
            self.scale = nn.Parameter(torch.full((1,), float(torch.ones(channels).sum()) * start))

        def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Any]:
            return feature * self.scale, {}

    with layers_registered(Measured):
        model = timm_fsr.attach(tiny_resnet(), "measured")
        assert model.measured["layer4"].scale.item() == 64


def test_layers_that_no_memory_holds_are_refused_and_the_model_is_left_alone():
    model = tiny_resnet()
    before, traced = state(model), traces(model)
    for hidden, message in ((10**6, r"need [\d,.]+ GiB of memory or more"), (10**11, "of this size cannot be built")):
        with pytest.raises(ValueError, match=rf"feature layers 'fsr' .*{message}.*\(hidden={hidden}\)"):
            timm_fsr.attach(model, layer_args={"hidden": hidden})
    assert same_state(model, before)
    assert traces(model) == traced
