"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from timm_fsr.attacks.base import Attack
from timm_fsr.training.objectives.base import LossTerms, Objective, register_objective
from timm_fsr.training.objectives.passes import forward


@register_objective
@dataclass(frozen=True, kw_only=True)
class Natural(Objective):
    """Training on clean images: cross-entropy, and the feature layers' auxiliary terms on them."""

    name: ClassVar[str] = "natural"
    soft_labels: ClassVar[bool] = True

    @property
    def attacks(self) -> bool:
        """Never."""
        return False

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "natural" and the auxiliary ones; `attack` and `adversarial` are not used."""
        logits, aux = forward(model, images, labels)
        terms = LossTerms(natural=self._cross_entropy(logits, labels), **aux)
        terms.logits = {"clean": logits.detach()}
        return terms
