"""TRADES: natural cross-entropy and the divergence under attack."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack, LossFunction
from timm_fsr.hooks.tape import record
from timm_fsr.training.objectives.base import LossTerms, Objective, check_weight, register_objective
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.passes import attack_loss, divergence, joins_attacks, joint_forward


@register_objective
@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """TRADES (Zhang et al., 2019, arXiv 1901.08573, equation 5): natural cross-entropy + beta * KL(clean || attacked).

    The attack maximises the divergence, whose gradient is zero at the image itself, so it needs a random start. Clean
    and adversarial images share one forward pass, and so their BatchNorm statistics (the original makes two passes,
    which DistributedDataParallel cannot do with BatchNorm). Auxiliary terms are those of the adversarial half.

    Attributes:
        beta: weight of the divergence (6 in the paper). 0 is natural training: nothing is attacked.
    """

    name: ClassVar[str] = "trades"
    soft_labels: ClassVar[bool] = True
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("beta", self.beta)

    @property
    def attacks(self) -> bool:
        """Unless beta is 0."""
        return bool(self.beta)

    def check_attack(self, attack: Attack) -> None:
        """Raise ValueError for an attack without a random start."""
        if self.attacks and not getattr(attack, "random_start", True):
            raise ValueError(
                "TRADES maximises a divergence whose gradient is zero at the image itself, so an attack that starts "
                "there does nothing; use one with random_start=True, such as PGD"
            )

    def attack_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
        """KL divergence of the attacked image's class probabilities from the clean image's, and layers' terms."""
        heard = record(model) if joins_attacks(model) else nullcontext()
        with torch.no_grad(), heard as tape:
            clean = model(images).float().log_softmax(dim=1)
        return attack_loss(model, labels, lambda logits: divergence(clean, logits.log_softmax(dim=1)), tape)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "natural" and "consistency", and the auxiliary ones."""
        if not self.beta:
            return Natural(label_smoothing=self.label_smoothing).terms(model, attack, images, images, labels)
        clean, attacked, aux = joint_forward(model, images, adversarial, labels)
        consistency = divergence(clean.log_softmax(dim=1), attacked.log_softmax(dim=1)).mean()
        terms = LossTerms(natural=self._cross_entropy(clean, labels), consistency=self.beta * consistency, **aux)
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms
