"""MART: boosted cross-entropy and a weighted divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack
from timm_fsr.training.objectives.base import LossTerms, Objective, check_weight, register_objective
from timm_fsr.training.objectives.passes import divergence, joint_forward


@register_objective
@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """MART (Wang et al., 2020, ICLR, equation 11): boosted cross-entropy + beta * KL weighted by 1 - p(label | clean).

    The boosted cross-entropy adds -log(1 - p) of the strongest wrong class of the attacked image. The attack maximises
    the cross-entropy. One forward pass and auxiliary terms as in `TRADES`.

    Attributes:
        beta: weight of the divergence (5 in the paper).
    """

    name: ClassVar[str] = "mart"
    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("beta", self.beta)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "adversarial", "margin" and "consistency", and the auxiliary ones."""
        clean, attacked, aux = joint_forward(model, images, adversarial, labels)
        own = F.one_hot(labels, clean.shape[1]).bool()
        probabilities = attacked.softmax(dim=1)
        rival = probabilities.masked_fill(own, 0).amax(dim=1)
        weights = 1.0000001 - clean.softmax(dim=1)[own]  # these small numbers are the original code's
        apart = divergence(clean.log_softmax(dim=1), (probabilities + 1e-12).log())
        terms = LossTerms(
            adversarial=self._cross_entropy(attacked, labels),
            margin=-(1.0001 - rival + 1e-12).log().mean(),
            consistency=self.beta * (weights * apart).mean(),
            **aux,
        )
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms
