"""What tests of training objectives share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import timm_fsr
from support.tiny import labels
from timm_fsr.attacks.base import LossFunction
from timm_fsr.training.objectives.base import LossTerms

FSR_TERMS = ["fsr.separation", "fsr.recalibration"]


class Brighten:
    """Stands in for an attack: what it does is known, and it notes how it was called."""

    eps = 0.1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: Tensor | None = None
        self.modes: set[bool] = set()
        self.frozen = False
        self.generator: torch.Generator | None = None

    def __call__(self, loss_fn: LossFunction, given: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        self.modes = {module.training for module in self.model.modules()}
        self.frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        self.losses, self.generator = loss_fn(brighter(given)).detach(), generator
        return brighter(given)


def brighter(given: Tensor) -> Tensor:
    return (given + 0.1).clamp(0, 1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Written out, in float64 and differentiable."""
    shifted = logits.double() - logits.double().amax(1, keepdim=True).detach()
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def cross_entropy(logits: Tensor, classes: Tensor, smoothing: float = 0.0) -> Tensor:
    """One value per image: the share `smoothing` of the target is spread over all classes."""
    rows = log_probabilities(logits)
    right = torch.stack([row[label] for row, label in zip(rows, classes, strict=True)])
    return -(1 - smoothing) * right - smoothing * rows.sum(1) / rows.shape[1]


def fsr_terms(model: nn.Module, given: Tensor, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The paper's auxiliary terms of some rows of a pass over `given`; none for a plain model."""
    with timm_fsr.record(model) as tape, torch.no_grad():
        logits = model(given)[rows].clone()
    if not tape:
        return {}
    aux = tape["layer4"]
    logits[torch.arange(len(logits)), labels()] = float("-inf")
    robust, nonrobust = aux.robust_logits[rows], aux.nonrobust_logits[rows]
    separation = cross_entropy(robust, labels()).mean() + cross_entropy(nonrobust, logits.argmax(1)).mean()
    recalibration = cross_entropy(aux.recalibrated_logits[rows], labels()).mean()
    return {"fsr.separation": separation, "fsr.recalibration": recalibration}


def assert_terms(found: LossTerms, expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == ()
        torch.testing.assert_close(
            found[name].detach().double(),
            value.double(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    torch.testing.assert_close(
        found.total().detach().double(),
        torch.stack([value.double() for value in expected.values()]).sum(),
        rtol=1e-5,
        atol=1e-6,
    )
