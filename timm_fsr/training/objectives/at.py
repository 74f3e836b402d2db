"""Adversarial training (AT), with GradAlign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from timm_fsr.attacks.base import Attack
from timm_fsr.training.objectives.base import LossTerms, Objective, check_weight, register_objective, unwrapped
from timm_fsr.training.objectives.passes import forward, gradient_misalignment


@register_objective
@dataclass(frozen=True, kw_only=True)
class AT(Objective):
    """Adversarial training (Madry et al., 2018, arXiv 1706.06083): cross-entropy on adversarial images.

    The auxiliary terms are those of the same pass.

    Attributes:
        label_smoothing: see `Objective`.
        grad_align: weight of GradAlign (Andriushchenko and Flammarion, 2020, arXiv 2007.02617, equation 6), which
            keeps one-step training from catastrophic overfitting: 1 - cosine of the input gradients at the image and
            at a uniformly random point of the ball (0.2 for eps 8/255 in its paper); 0 leaves it out. The gradients
            are of the model in eval mode, as the attack's are; the original takes those in training mode.
    """

    name: ClassVar[str] = "at"
    soft_labels: ClassVar[bool] = True
    grad_align: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("grad_align", self.grad_align)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "adversarial", "grad_align" if asked for, and the auxiliary ones."""
        logits, aux = forward(model, adversarial, labels)
        terms = LossTerms(adversarial=self._cross_entropy(logits, labels), **aux)
        if self.grad_align:
            terms["grad_align"] = self.grad_align * gradient_misalignment(unwrapped(model), attack, images, labels)
        terms.logits = {"adversarial": logits.detach()}
        return terms
