"""Attacks called on a model, as libraries do whose attacks know the model."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from support.tiny import images, labels, tiny_resnet

import timm_fsr
from timm_fsr.attacks.base import ATTACKS, OnModels, judged_loss
from timm_fsr.attacks.losses import cross_entropy

EVERY = [*(ATTACKS[name] for name in ATTACKS.names()), timm_fsr.FMN, timm_fsr.DDN]


def pixel_model() -> timm_fsr.PixelModel:
    return timm_fsr.PixelModel(tiny_resnet())


@pytest.mark.parametrize("attack_class", EVERY, ids=lambda cls: cls.name)
def test_every_attack_can_be_called_on_a_model(attack_class):
    known = {field.name for field in dataclasses.fields(attack_class)}
    attack = attack_class(**({"steps": 2} if "steps" in known else {}))
    model = pixel_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attacked = attack.attack(model, images(), labels())
    assert attacked.shape == images().shape
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    assert not attacked.requires_grad
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_is_the_attack_on_the_cross_entropy():
    model, attack = pixel_model().eval(), timm_fsr.PGD(steps=3)
    direct = attack(judged_loss(model, cross_entropy, labels()), images(), generator=torch.Generator().manual_seed(0))
    called = attack.attack(model, images(), labels(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(called, direct)


def test_an_attack_of_ones_own_gets_it_too():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Brighter:
        name = "brighter"
        eps: float = 0.1

        def __call__(self, loss_fn, images, *, generator=None):
            return (images + self.eps).clamp(0, 1)

        def with_eps(self, eps):
            return dataclasses.replace(self, eps=eps)

    try:
        timm_fsr.register_attack(Brighter)
        attacked = Brighter().attack(pixel_model(), images(), labels())
        assert torch.equal(attacked, (images() + 0.1).clamp(0, 1))
    finally:
        ATTACKS.remove("brighter")
    assert not issubclass(Brighter, OnModels)


def test_a_timm_model_that_wants_normalised_images_is_refused():
    model = timm.create_model("test_vit", num_classes=10)
    with pytest.raises(ValueError, match=r"timm_fsr\.PixelModel\(model\)"):
        timm_fsr.PGD().attack(model, images(), labels())


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one int64 class per image"):
        timm_fsr.PGD().attack(pixel_model(), images(), labels(3))
