"""What every registered attack keeps to, in the package or outside."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.attacks.base import ATTACKS, Attack, attack_fields

EPS = 0.05
NORMS = {"linf": lambda delta: delta.flatten(1).abs().amax(dim=1), "l2": lambda delta: delta.flatten(1).norm(dim=1)}


@pytest.fixture(params=ATTACKS.names())
def attack_class(request: pytest.FixtureRequest) -> type[Attack]:
    return ATTACKS[request.param]


def build(attack_class: type[Attack], norm: str = "linf", eps: float = EPS, steps: int = 3) -> Attack:
    known = attack_fields(attack_class)
    given: dict[str, Any] = {"norm": norm, "eps": eps, "steps": steps}
    return attack_class(**{key: value for key, value in given.items() if key in known})


def norms(attack_class: type[Attack]) -> list[str]:
    return list(NORMS) if "norm" in attack_fields(attack_class) else ["linf"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Any:
    return lambda given: F.cross_entropy(model(given), torch.arange(6) % 5, reduction="none")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_it_stays_in_the_ball_and_among_pixels(attack_class, model):
    for norm in norms(attack_class):
        attack = build(attack_class, norm)
        attacked = attack(loss_of(model), images(), generator=rng())
        assert attacked.shape == images().shape
        assert attacked.dtype == torch.float32
        assert not attacked.requires_grad
        assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
        if not getattr(attack_class, "only_trains", False):
            assert float(NORMS[norm](attacked - images()).max()) <= attack.eps + 1e-6


def test_it_raises_the_loss(attack_class, model):
    attacked = build(attack_class)(loss_of(model), images(), generator=rng())
    with torch.no_grad():
        assert float(loss_of(model)(attacked).mean()) > float(loss_of(model)(images()).mean())


def test_its_generator_decides_alone(attack_class, model):
    attack = build(attack_class)
    one = attack(loss_of(model), images(), generator=rng())
    torch.manual_seed(99)
    assert torch.equal(attack(loss_of(model), images(), generator=rng()), one)


def test_a_ball_of_radius_0_is_the_image(attack_class, model):
    attack = build(attack_class, eps=0.0)
    attacked = attack(loss_of(model), images())
    assert torch.equal(attacked, images())


def test_another_radius_is_another_attack_of_the_same_kind(attack_class):
    attack = build(attack_class)
    other = attack.with_eps(2 * EPS)
    assert type(other) is type(attack)
    assert other.eps == 2 * EPS
    assert other.with_eps(EPS) == attack


def test_the_images_and_the_model_are_left_alone(attack_class, model):
    given, before = images(), images()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    build(attack_class)(loss_of(model), given, generator=rng())
    assert torch.equal(given, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(attack_class, value):
    floats = [entry.name for entry in dataclasses.fields(attack_class) if "float" in str(entry.type)]
    assert "eps" in floats
    for key in floats:
        with pytest.raises(ValueError, match=f"{key}={value}"):
            attack_class(**{key: value})


def test_images_that_are_no_pixels_are_refused(attack_class, model):
    with pytest.raises(ValueError, match="divide them by 255"):
        build(attack_class)(loss_of(model), 255 * images())


def test_a_model_with_images_and_labels_is_told_the_call(attack_class, model):
    with pytest.raises(ValueError, match=r"called as attack\(loss_fn, images\), but \w+ was given 3 arguments"):
        build(attack_class)(model, images(), torch.zeros(len(images()), dtype=torch.int64))
