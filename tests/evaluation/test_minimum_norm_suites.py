"""FMN and DDN as attacks of an evaluation: an image is robust if its distance is more than eps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.evaluation.registry import list_attacks

DUALS = {"linf": 1, "l2": 2, "l1": torch.inf}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


@pytest.mark.parametrize(("name", "norm"), [("fmn60", "linf"), ("fmn60", "l2"), ("fmn60", "l1"), ("ddn60", "l2")])
def test_an_image_is_robust_if_it_is_farther_than_eps_from_the_border(name, norm):
    model = Linear()
    images = 0.5 + 0.1 * (torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    with torch.no_grad():
        logits = model(images)
        gap = (logits[:, 0] - logits[:, 1]).abs() / (model.weight[0] - model.weight[1]).norm(p=DUALS[norm])
    ordered = gap.sort().values
    eps = float(ordered[5:7].mean())
    report = timm_fsr.evaluate(model, (images, logits.argmax(1)), norm=norm, eps=eps, attacks=[name])
    clear = (gap - eps).abs() > 0.03 * eps
    assert int(clear.sum()) >= 9
    assert torch.equal(report.correct[name][clear], (gap > eps)[clear])


def test_they_are_listed_and_refuse_other_balls(capsys):
    assert {"fmn100", "ddn100"} <= set(list_attacks())
    tag = "resnet_tiny_cifar_fsr.at_fashion_mnist"
    assert main(["evaluate", tag, "--attacks", "ddn100", "--norm", "linf", "--eps", "0.1"]) == 2
    assert "ddn100" in capsys.readouterr().err
