"""Training objectives: how to attack a batch, and what to minimise on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_fsr.attacks import Attack, attack_mode
from timm_fsr.sites import record


class LossTerms(dict[str, Tensor]):
    """Weighted scalar loss terms by name; their sum is minimised.

    Attributes:
        logits: (N, classes) of the pass the terms come from, detached, for metrics.
    """

    logits: Tensor

    def total(self) -> Tensor:
        """The sum of the terms."""
        return torch.stack(list(self.values())).sum()


class Objective(Protocol):
    """A training method: attacks a batch and names what to minimise on it."""

    def __call__(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms of `images` (N, C, H, W) in [0, 1] with `labels` (N,)."""


@dataclass(frozen=True, kw_only=True)
class Natural:
    """Training on clean images: cross-entropy, and the feature layers' auxiliary terms on them.

    Attributes:
        label_smoothing: in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms; `attack` and `generator` are not used."""
        return _cross_entropy_terms("natural", model, images, labels, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AT:
    """Adversarial training (Madry et al., 2018): cross-entropy on adversarial images.

    With FSR its auxiliary terms are added, on the adversarial images too (FSR paper, equation 8). The attack
    maximises the main cross-entropy in eval mode, as the official code does.

    Attributes:
        label_smoothing: in [0, 1), of the training loss only.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms "adversarial" and the auxiliary ones ("fsr.separation", ...)."""
        adversarial = attack_cross_entropy(model, attack, images, labels, generator=generator)
        return _cross_entropy_terms("adversarial", model, adversarial, labels, self.label_smoothing)


OBJECTIVES: dict[str, type[Natural] | type[AT]] = {"natural": Natural, "at": AT}


def attack_cross_entropy(
    model: nn.Module,
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial images that maximise the cross-entropy of `model` in eval mode.

    Under DistributedDataParallel the attack runs through the wrapped module: passing the wrapper would synchronise
    buffers in each step and could pair up wrong collectives.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with attack_mode(inner):
        return attack(
            lambda candidate: F.cross_entropy(inner(candidate).float(), labels, reduction="none"),
            images,
            generator=generator,
        )


def _cross_entropy_terms(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float
) -> LossTerms:
    with record(model, labels) as tape:
        logits = model(images).float()
    terms = LossTerms({name: F.cross_entropy(logits, labels, label_smoothing=label_smoothing)})
    terms.update(tape.losses(logits, labels))
    terms.logits = logits.detach()
    return terms


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1): it is a share of probability")
