"""Gradient checkpointing: a recomputed pass does what the first one did, and nobody hears it twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backbones import TinyBackbone
from support.tiny import (
    assert_same_gradients,
    images,
    label_scale_registered,
    labels,
    tiny_resnet,
    tiny_vit,
    total_loss,
    with_fsr,
)
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import timm_fsr
from timm_fsr.hooks.tape import Tape

NETWORKS = [tiny_resnet, tiny_vit]


def losses_and_gradients(model: nn.Module, checkpointing: bool, x: Tensor) -> dict[str, Tensor]:
    """Of a training step with noise, the tape gone before the backward pass; batch statistics stay."""
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(3)
    with timm_fsr.record(model, labels(len(x))) as tape:
        logits = model(x)
    losses = tape.losses(logits)
    total = F.cross_entropy(logits, labels(len(x))) + sum(losses.values())
    del tape
    total.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **{key: value.detach() for key, value in losses.items()}, **found}


def test_checkpointing_changes_nothing(backbone: TinyBackbone) -> None:
    model = with_fsr(backbone.create())
    eager, checkpointed = (losses_and_gradients(model, flag, backbone.images()) for flag in (False, True))
    assert {key for key in eager if key.startswith("fsr.")} >= {f"fsr.{key}" for key, _ in model.fsr.named_parameters()}
    assert eager.keys() == checkpointed.keys()
    for key, value in eager.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sites that wrote to a tape, in order."""
    names: list[str] = []
    write = Tape.write
    monkeypatch.setattr(Tape, "write", lambda tape, site, aux: (names.append(site.name), write(tape, site, aux)))
    return names


@pytest.mark.parametrize("network", NETWORKS)
def test_a_recomputation_records_nothing(network: Any, written: list[str]) -> None:
    model = with_fsr(network()).train()
    model.set_grad_checkpointing(True)
    # Torch stops a recomputation once it has what it needs, here or there before the site would write.
    with timm_fsr.record(model, labels()) as tape, set_checkpoint_early_stop(False):
        logits = model(images())
        (heard,) = tape.values()
        sum(tape.losses(logits).values()).backward()
        (afterwards,) = tape.values()
    assert len(written) == 1
    assert afterwards.mask is heard.mask


def test_a_pass_in_between_does_not_confuse_the_recomputation() -> None:
    model = with_fsr(tiny_resnet(), noise=False)
    clones = []
    for checkpointing in (True, False):
        clone = copy.deepcopy(model).train()
        clone.set_grad_checkpointing(checkpointing)
        total = total_loss(clone)
        with torch.no_grad():
            clone.eval()(images())
        clone.train()
        total.backward()
        clones.append(clone)
    assert_same_gradients(*clones)


def test_a_recomputation_has_the_labels_of_its_pass() -> None:
    with label_scale_registered():
        model = timm_fsr.attach(tiny_resnet(), "label_scale").train()
    clones = []
    for checkpointing in (True, False):
        clone = copy.deepcopy(model)
        clone.set_grad_checkpointing(checkpointing)
        total_loss(clone).backward()
        clones.append(clone)
    assert clones[0].label_scale["layer4"].rows.grad[1:5].abs().min() > 0
    assert_same_gradients(*clones)


@pytest.fixture
def reentrant() -> Iterator[None]:
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(before)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_would_train_nothing_and_is_refused() -> None:
    model = with_fsr(tiny_resnet()).train()
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match=r"without gradients, .*set_reentrant_ckpt\(False\)"):
        total_loss(model)
    with torch.no_grad():  # nobody wants gradients here
        total_loss(model)
    model.fsr.requires_grad_(False)  # a frozen layer has nothing to learn
    total_loss(model)
