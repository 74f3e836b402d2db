"""Every registered layer on every tiny backbone, at the place its paper gives it and at one that all can share."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.backbones import TinyBackbone
from torch import nn

import timm_fsr
from timm_fsr.hooks.surrogates import list_surrogates, surrogate


@pytest.fixture(params=timm_fsr.list_layers())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def with_layer(backbone: TinyBackbone, name: str, at: object = None) -> nn.Module:
    torch.manual_seed(0)
    base = backbone.create()
    torch.manual_seed(1)
    return timm_fsr.attach(base, name, at=at)


@pytest.mark.parametrize("at", [None, (-2,)], ids=["own place", "shared place"])
def test_a_model_trains_and_answers(backbone: TinyBackbone, name: str, at: object) -> None:
    model, labels = with_layer(backbone, name, at).train(), torch.arange(2)
    with timm_fsr.record(model, labels) as tape:
        logits = model(backbone.images())
    terms = tape.losses(logits)
    assert logits.shape == (2, 10)
    (F.cross_entropy(logits, labels) + sum(terms.values())).backward()
    for key, parameter in getattr(model, name).named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.eval()
    with torch.no_grad():
        answer = model(backbone.images())
        assert torch.equal(answer, model(backbone.images()))
        assert torch.equal(answer, copy.deepcopy(model)(backbone.images()))
    assert answer.isfinite().all()


def test_attacks_have_a_gradient_through_each_surrogate(backbone: TinyBackbone, name: str) -> None:
    model = with_layer(backbone, name).eval()
    images = backbone.images().requires_grad_()
    for stand_in in list_surrogates(model):
        with surrogate(model, stand_in):
            (gradient,) = torch.autograd.grad(model(images).logsumexp(dim=1).sum(), images)
        assert gradient.isfinite().all(), stand_in
        assert gradient.abs().max() > 0, stand_in


def test_detached_it_is_the_base_model_again(backbone: TinyBackbone, name: str) -> None:
    torch.manual_seed(0)
    base = backbone.create().eval()
    model = timm_fsr.detach(with_layer(backbone, name)).eval()
    assert list(model.state_dict()) == list(base.state_dict())
    with torch.no_grad():
        assert torch.equal(model(backbone.images()), base(backbone.images()))
