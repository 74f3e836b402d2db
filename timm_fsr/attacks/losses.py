"""Losses that attacks maximise: one value per image from its logits and its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12  # keeps the ratios finite where logits are equal


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) of logits (N, classes) and true classes (N,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The strongest wrong logit minus the true one, (N,); positive exactly where the image is misclassified."""
    true, wrong = _true_and_strongest_wrong(logits, labels)
    return wrong - true


def carlini_wagner(logits: Tensor, labels: Tensor, *, confidence: float = 50.0) -> Tensor:
    """-max(true logit - strongest wrong logit + confidence, 0), (N,), as the official FSR code tests with.

    After Carlini and Wagner (2017, arXiv 1608.04644, f6) with the threat model's ball in place of their penalty.

    Args:
        logits: (N, classes).
        labels: (N,) true classes.
        confidence: the margin beyond which there is no gradient left.
    """
    return -(confidence - margin(logits, labels)).clamp_min(0)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, 2020, arXiv 2003.01690, equation 6), (N,).

    The margin over the distance of the largest from the third largest logit: it does not change with their scale.

    Raises:
        ValueError: fewer than three classes.
    """
    _check_classes("dlr", logits, 3)
    ordered = logits.float().sort(dim=1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Difference of logits ratio towards `targets` (N,) (arXiv 2003.01690, equation 7), (N,).

    Raises:
        ValueError: fewer than four classes.
    """
    _check_classes("targeted_dlr", logits, 4)
    logits = logits.float()
    ordered = logits.sort(dim=1, descending=True).values
    difference = logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])
    return difference[:, 0] / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + _TINY)


def _true_and_strongest_wrong(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_classes("this loss", logits, 2)
    logits = logits.float()
    own = labels[:, None]
    return logits.gather(1, own)[:, 0], logits.scatter(1, own, -torch.inf).amax(dim=1)


def _check_classes(name: str, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(f"{name} compares {least} logits, but there are {logits.shape[1]}; use the loss 'margin'")
