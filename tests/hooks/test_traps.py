"""Traps that hooks fall into silently: copies, wrappers, precision (others: test_gradient_checkpointing.py)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from support.backbones import TinyBackbone
from support.tiny import CLASSES, assert_same_gradients, images, labels, tiny_resnet, tiny_vit, total_loss, with_fsr
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm_fsr
from timm_fsr.hooks.site import layer_groups

NETWORKS = [tiny_resnet, tiny_vit]


def shake(model: nn.Module) -> None:
    """Change the feature layers' weights a great deal."""
    with torch.no_grad():
        for parameter in model.fsr.parameters():
            parameter.add_(torch.randn_like(parameter))


# Copies.


@pytest.mark.parametrize("network", NETWORKS)
def test_a_deepcopy_calls_its_own_layers(network: Any) -> None:
    model = with_fsr(network()).eval()
    total_loss(model)  # a graph has been there
    expected = model(images())
    clone = copy.deepcopy(model)
    shake(model)
    assert not torch.allclose(model(images()), expected)
    assert torch.equal(clone(images()), expected)
    with timm_fsr.record(clone) as tape:
        model(images())
        assert dict(tape) == {}
        clone(images())
        assert len(tape) == 1
    timm_fsr.detach(model)
    assert torch.equal(clone(images()), expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pickle_calls_its_own_layers(network: Any) -> None:
    model = with_fsr(network()).eval()
    expected = model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        shake(model)
        assert torch.equal(clone(images()), expected)
        clone.reset_classifier(3)
        assert agreed_classes(clone) == 3
        timm_fsr.detach(clone)
    assert model(images()).shape == (4, CLASSES)


@pytest.mark.parametrize("ema_class", [ModelEmaV2, ModelEmaV3])
def test_an_ema_follows_with_its_own_layers(ema_class: Any) -> None:
    model = with_fsr(tiny_resnet()).train()
    total_loss(model).backward()
    ema = ema_class(model, decay=0.5)
    before = {key: value.clone() for key, value in ema.module.state_dict().items()}
    expected = ema.module(images())
    shake(model)
    assert torch.equal(ema.module(images()), expected)
    ema.update(model)
    key = "fsr.layer4.separation.0.weight"
    torch.testing.assert_close(ema.module.state_dict()[key], (before[key] + model.state_dict()[key]) / 2)
    assert not torch.equal(ema.module(images()), expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_graph_outlives_its_tape(network: Any) -> None:
    model = with_fsr(network()).train()
    gc.collect()
    gc.disable()  # what only the cycle collector frees would pile up on an accelerator
    try:
        with timm_fsr.record(model, labels()) as tape:
            logits = model(images())
        losses = tape.losses(logits)
        graph = [
            weakref.ref(tensor) for tensor in (logits, *losses.values(), *vars(next(iter(tape.values()))).values())
        ]
        assert len(graph) == 7
        del logits, losses, tape
        assert [tensor() for tensor in graph] == [None] * 7
    finally:
        gc.enable()
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert all(tensor.is_leaf for tensor in kept)
    copy.deepcopy(model)


# Heads.


def agreed_classes(model: nn.Module) -> int:
    """Number of classes for which the main and the auxiliary heads agree."""
    with timm_fsr.record(model, labels() % 2) as tape:
        logits = model(images())
    tape.losses(logits)
    return logits.shape[1]


@pytest.mark.parametrize("network", NETWORKS)
def test_reset_classifier_reaches_the_auxiliary_heads(network: Any) -> None:
    model = with_fsr(network()).train()
    model.reset_classifier(7)
    assert agreed_classes(model) == 7
    assert model.num_classes == 7
    model.reset_classifier(0)
    with timm_fsr.record(model, labels()) as tape:
        features = model(images())
    (aux,) = tape.values()
    assert set(vars(aux)) == {"mask"}
    with pytest.raises(ValueError, match="reset_classifier"):
        tape.losses(features)
    model.reset_classifier(3)
    assert agreed_classes(model) == 3


def test_reset_classifier_of_a_copy_acts_on_the_copy() -> None:
    model = with_fsr(tiny_resnet())
    clone = copy.deepcopy(model)
    clone.reset_classifier(3)
    assert agreed_classes(clone) == 3
    assert agreed_classes(model) == CLASSES
    model.reset_classifier(5)
    assert agreed_classes(clone) == 3


def test_reset_classifier_is_timm_s_own_again_after_detach() -> None:
    model = timm_fsr.detach(with_fsr(tiny_resnet()))
    assert model.reset_classifier.__func__ is type(model).reset_classifier


# Optimizers.


@pytest.mark.parametrize("network", NETWORKS)
def test_the_model_s_own_head_stays_last(network: Any) -> None:
    plain, model = network(), with_fsr(network())
    head = [key for key, _ in plain.named_parameters()][-2:]
    assert [key for key, _ in model.named_parameters()][-2:] == head
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    kept = {names[id(p)] for p in timm.models.model_parameters(model, exclude_head=True)}
    assert set(names.values()) - kept == set(head)
    model(images()).sum().backward()
    dispatch_clip_grad(timm.models.model_parameters(model, exclude_head=True), 0.1, mode="agc")


@pytest.mark.parametrize("network", NETWORKS)
def test_layer_decay_trains_the_layers_at_full_rate(network: Any) -> None:
    model = with_fsr(network())
    own = {id(parameter) for parameter in model.fsr.parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scales) == len(list(model.parameters()))
    assert {scales[key] for key in own} == {1.0}
    assert len(set(scales.values())) > 1


def test_weight_decay_groups_hold_each_parameter_once() -> None:
    model = with_fsr(tiny_resnet())
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=5e-4)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


# Distributed training: one process is enough for DDP's bookkeeping.


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_trains_every_parameter(checkpointing: bool) -> None:
    model = with_fsr(tiny_resnet(), noise=False).train()
    model.set_grad_checkpointing(checkpointing)
    expected = copy.deepcopy(model)
    total_loss(expected).backward()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for step in range(3):
        wrapped.zero_grad()
        total_loss(wrapped).backward()
        if step == 0:
            assert_same_gradients(model, expected)
    assert unwrap_model(wrapped) is model


@pytest.mark.usefixtures("process_group")
def test_ddp_notices_heads_left_out_of_the_loss() -> None:
    wrapped = DistributedDataParallel(with_fsr(tiny_resnet()).train())
    wrapped(images()).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        wrapped(images())


@pytest.mark.usefixtures("process_group")
def test_ddp_that_looks_for_unused_parameters_fails_at_once() -> None:
    """It takes what only the tape holds for unused; `record` says so."""
    wrapped = DistributedDataParallel(with_fsr(tiny_resnet()).train(), find_unused_parameters=True)
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        total_loss(wrapped).backward()


# Features.


def test_features_carry_the_layer(backbone: TinyBackbone) -> None:
    options = {key: value for key, value in backbone.kwargs.items() if key != "num_classes"}
    x = backbone.images()
    features = timm.create_model(f"{backbone.name}_fsr", features_only=True, fsr_hidden=4, **options).eval()
    assert isinstance(features, FeatureGetterNet)
    assert len(layer_groups(features)) == 1
    layered = features(x)
    plain = timm_fsr.detach(features)(x)
    assert [tuple(f.shape) for f in layered] == [tuple(f.shape) for f in plain]
    assert not torch.allclose(layered[-1], plain[-1])
    assert features.feature_info.channels() == [f.shape[1] for f in plain]


def test_intermediates_carry_the_layer(backbone: TinyBackbone) -> None:
    model = with_fsr(backbone.create()).eval()
    x = backbone.images()
    layered, intermediates = model.forward_intermediates(x)
    expected = model.forward_features(x)
    timm_fsr.detach(model)
    plain, plain_intermediates = model.forward_intermediates(x)
    assert torch.equal(layered, expected)
    assert not torch.allclose(layered, plain)
    assert not torch.allclose(intermediates[-1], plain_intermediates[-1])


# Memory formats and precision.


@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training: bool) -> None:
    model = with_fsr(tiny_resnet(), noise=False).train(training)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    other.layer4[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    with timm_fsr.record(other, labels()) as tape:
        logits = other(images().contiguous(memory_format=torch.channels_last))
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert tape["layer4"].mask.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_autocast(network: Any) -> None:
    model = with_fsr(network()).train()
    with timm_fsr.record(model, labels()) as tape, torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
        losses = tape.losses(logits)
    outside = tape.losses(logits)
    assert logits.dtype == torch.bfloat16
    (aux,) = tape.values()
    for tensor in (*vars(aux).values(), *losses.values(), *outside.values()):
        assert tensor.dtype == torch.float32
    assert losses == outside
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.fsr.parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_weight_types(network: Any, dtype: torch.dtype) -> None:
    model = with_fsr(network()).to(dtype).train()
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images().to(dtype))
    assert logits.dtype == dtype
    sum(tape.losses(logits).values()).backward()
    assert all(parameter.grad is not None for parameter in model.fsr.parameters())


def test_nobody_pays_for_auxiliary_outputs_of_a_plain_pass() -> None:
    model = with_fsr(tiny_resnet()).eval()
    calls: list[str] = []
    model.fsr["layer4"].head.register_forward_hook(lambda *args: calls.append("head"))
    model(images())
    assert calls == []
    with timm_fsr.record(model):
        model(images())
    assert len(calls) == 3
    model(images())
    assert len(calls) == 3
