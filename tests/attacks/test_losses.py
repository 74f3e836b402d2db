"""Losses of attacks against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from timm_fsr.attacks.losses import carlini_wagner, cross_entropy, dlr, margin, targeted_dlr

LOGITS = 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 6
TARGETS = (LABELS + 2) % 6


def by_hand(name: str, row: list[float], label: int, target: int) -> float:
    wrong = max(value for index, value in enumerate(row) if index != label)
    ordered = sorted(row, reverse=True)
    if name == "cross_entropy":
        return math.log(sum(math.exp(value - row[label]) for value in row))
    if name == "margin":
        return wrong - row[label]
    if name == "carlini_wagner":
        return -max(row[label] - wrong + 50, 0)
    if name == "dlr":
        return -(row[label] - wrong) / (ordered[0] - ordered[2])
    return -(row[label] - row[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


@pytest.mark.parametrize("loss", [cross_entropy, margin, carlini_wagner, dlr, targeted_dlr], ids=lambda f: f.__name__)
def test_values(loss):
    found = loss(LOGITS, LABELS, TARGETS) if loss is targeted_dlr else loss(LOGITS, LABELS)
    rows = zip(LOGITS.tolist(), LABELS.tolist(), TARGETS.tolist(), strict=True)
    expected = [by_hand(loss.__name__, row, label, target) for row, label, target in rows]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("loss", [margin, dlr])
def test_the_sign_says_who_is_misclassified(loss):
    wrong = LOGITS.argmax(1) != LABELS
    assert torch.equal(loss(LOGITS, LABELS) > 0, wrong)
    assert 0 < int(wrong.sum()) < len(wrong)


def test_dlr_does_not_change_with_the_scale():
    torch.testing.assert_close(dlr(1000 * LOGITS, LABELS), dlr(LOGITS, LABELS))


def test_carlini_wagner_has_no_gradient_beyond_its_confidence():
    def gradient(gap: float) -> Tensor:
        logits = torch.tensor([[0.0, gap, 0.0]], requires_grad=True)
        return torch.autograd.grad(carlini_wagner(logits, torch.tensor([0])).sum(), logits)[0]

    assert gradient(49).abs().sum() > 0
    assert gradient(51).abs().sum() == 0


@pytest.mark.parametrize("loss", [cross_entropy, margin, carlini_wagner, dlr])
def test_half_precision_logits_give_float32(loss):
    assert loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "classes"),
    [(margin, 1), (dlr, 2), (lambda x, y: targeted_dlr(x, y, y), 3)],
    ids=["margin", "dlr", "targeted"],
)
def test_too_few_classes(loss, classes):
    with pytest.raises(
        ValueError, match=f"compares {classes + 1} logits, but there are {classes}; use the loss 'margin'"
    ):
        loss(LOGITS[:, :classes], LABELS % classes)


def test_infinite_logits_of_other_classes_do_not_hide_the_margin():
    logits = torch.tensor([[1.0, -torch.inf, 3.0]])
    assert margin(logits, torch.tensor([0])).item() == 2
