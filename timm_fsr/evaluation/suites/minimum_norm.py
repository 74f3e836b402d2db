"""FMN and DDN in an evaluation: an image is broken if its nearest misclassified one lies in the ball."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import judged_loss
from timm_fsr.attacks.minimum_norm import DDN, FMN
from timm_fsr.evaluation.registry import Stage, Suite, Target, register_suite

_ROUNDING = 1e-6  # of a distance, relative


def _check_fmn(norm: str, eps: float, steps: int = 1) -> None:
    del eps
    FMN(norm=norm, steps=steps)


def _check_ddn(norm: str, eps: float, steps: int = 1) -> None:
    del norm, eps
    DDN(steps=steps)


@register_suite("fmn", check=_check_fmn, numbered=True, norms=("linf", "l2", "l1"))
def fast_minimum_norm(target: Target, steps: int) -> Sequence[Suite]:
    """FMN, which looks for each image's nearest misclassified one."""
    return [_suite(f"fmn{steps}", FMN(norm=target.norm, steps=steps), target.eps)]


@register_suite("ddn", check=_check_ddn, numbered=True, norms=("l2",))
def decoupled_direction_and_norm(target: Target, steps: int) -> Sequence[Suite]:
    """DDN, which looks for each image's nearest misclassified one in L2."""
    # From eps on, not from the paper's 1: few steps shrink or grow that only by a limited factor.
    return [_suite(f"ddn{steps}", DDN(steps=steps, first_eps=target.eps or 1.0), target.eps)]


def _suite(name: str, attack: FMN | DDN, eps: float) -> Suite:
    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        loss_fn = judged_loss(model, type(attack).model_loss, labels)
        found = (
            attack.nearest(loss_fn, images)
            if isinstance(attack, FMN)
            else attack.nearest(loss_fn, images, generator=generator)
        )
        outside = found.distances > eps * (1 + _ROUNDING)  # False for NaN, which must be seen
        return torch.where(outside.view(-1, 1, 1, 1), images, found.images)

    return Suite(name, (Stage(name, f"{attack!r}, within eps {eps:g}", run),), every_image=True)
