"""Adversarial fine-tuning via disentanglement (AFD)."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.hooks.tape import Tape, record
from timm_fsr.training.objectives.base import LossTerms, Objective, check_weight, register_objective, unwrapped


@register_objective
@dataclass(frozen=True, kw_only=True)
class AFD(Objective):
    """Adversarial fine-tuning via disentanglement (Zhou et al., AAAI 2025, arXiv 2401.14707).

    Cross-entropy on adversarial images + alignment * (1 - cos(i, t)), where i are the pooled intrinsic features of the
    adversarial images, as the feature layer "afd" gives them, and t those that the teacher has of the clean images. The
    teacher is the model as it was before this training, frozen and in eval mode. The layer's own terms disentangle
    the features. The attack maximises the cross-entropy.

    Attributes:
        label_smoothing: see `Objective`.
        alignment: weight of the alignment with the teacher (gamma, 25 in the paper for ResNet-18 on CIFAR-10).
    """

    name: ClassVar[str] = "afd"
    soft_labels: ClassVar[bool] = True
    layer: ClassVar[str | None] = "afd"
    fine_tunes: ClassVar[bool] = True
    alignment: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("alignment", self.alignment)

    def begin(self, model: nn.Module) -> AFD:
        """The objective with a frozen copy of `model` for its teacher.

        Raises:
            ValueError: the model has no feature layer "afd".
        """
        if not any(layer.name == self.layer for layer in feature_layers(model)):
            raise ValueError(
                f"AFD needs the feature layer {self.layer!r}, which the model does not have; attach it, or set "
                f"model.layer={self.layer} in the recipe"
            )
        objective = dataclasses.replace(self)
        teacher = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
        object.__setattr__(objective, "teacher", teacher)
        return objective

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "adversarial" and "alignment", and the auxiliary ones."""
        if self.teacher is None:
            raise ValueError("AFD has no teacher yet; train with objective.begin(model), called before the first step")
        with torch.no_grad(), record(self.teacher) as taught:
            self.teacher(images)
        with record(model, labels) as tape:
            logits = model(adversarial).float()
        pairs = zip(self._intrinsic(tape), self._intrinsic(taught), strict=True)
        apart = torch.stack([1 - F.cosine_similarity(mine, wanted, dim=1).mean() for mine, wanted in pairs])
        terms = LossTerms(
            adversarial=self._cross_entropy(logits, labels),
            alignment=self.alignment * apart.mean(),
            **tape.losses(logits, labels),
        )
        terms.logits = {"adversarial": logits.detach()}
        return terms

    def _intrinsic(self, tape: Tape) -> list[Tensor]:
        return [aux["intrinsic"] for site, aux in tape.recorded() if site.layer.name == self.layer]
