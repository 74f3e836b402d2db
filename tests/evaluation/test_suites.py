"""What every registered suite keeps to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode
from timm_fsr.evaluation.model_checks import examine
from timm_fsr.evaluation.registry import SUITES, Suite, Target, build_suites, check_names

pytest.importorskip("pyautoattack")

EPS = 0.02


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5))

    def forward(self, given: Tensor) -> Tensor:
        return self.body(given)


def images() -> Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images()).argmax(dim=1)


def name_of(suite: str) -> str:
    return f"{suite}2" if SUITES[suite].numbered else suite


def built(name: str, norm: str) -> tuple[nn.Module, list[Suite]]:
    model = Network().eval()
    target = Target(model, norm, EPS, 0, examine(model, images(), labels(model)), {"source": Network().eval()})
    return model, build_suites([name_of(name)], target)


@pytest.mark.parametrize("name", SUITES.names())
def test_it_takes_each_ball_that_it_says(name):
    for norm in SUITES[name].norms:
        check_names([name_of(name)], norm, EPS)
        check_names([name_of(name)], norm, 0.0)
    assert SUITES[name].about.endswith(".")


@pytest.mark.parametrize("name", SUITES.names())
def test_its_stages_are_told_apart_and_described(name):
    _, suites = built(name, "linf")
    for suite in suites:
        names = [stage.name for stage in suite.stages]
        assert len(set(names)) == len(names) > 0
        assert all(stage.detail for stage in suite.stages)


@pytest.mark.parametrize("name", [name for name in SUITES.names() if name not in ("plus", "rand", "adaptive")])
def test_attacked_images_are_pixels_in_the_ball(name):
    model, suites = built(name, "linf")
    for stage in (stage for suite in suites for stage in suite.stages[:1]):
        with attack_mode(model):
            attacked = stage.run(model, images(), labels(model), torch.Generator().manual_seed(0))
        assert attacked.shape == images().shape
        assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
        assert float((attacked - images()).abs().max()) <= EPS + 1e-6
