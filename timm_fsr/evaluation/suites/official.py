"""What the official FSR code tests with: FGSM, PGD-20, PGD-100 and C&W-30, in steps of 0.1 eps from the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timm_fsr.attacks.base import Attack, ImageLoss
from timm_fsr.attacks.losses import carlini_wagner, cross_entropy
from timm_fsr.attacks.pgd import FGSM, PGD
from timm_fsr.evaluation.registry import Suite, Target, register_suite, single

NAMES = ("official-fgsm", "official-pgd20", "official-pgd100", "official-cw30")
"""Besides what is decorated: the names that are registered here, for help texts, which read this file as text."""


def _pgd(norm: str, eps: float, steps: int) -> PGD:
    return PGD(norm=norm, eps=eps, steps=steps, step_size=0.1 * eps or None, random_start=False)


@register_suite("cw", check=_pgd, numbered=True)
def carlini_wagner_pgd(target: Target, steps: int) -> Sequence[Suite]:
    """PGD on the loss of Carlini and Wagner, as the official FSR code has it."""
    return [single(f"cw{steps}", _pgd(target.norm, target.eps, steps), carlini_wagner)]


def _register(name: str, make: Callable[[str, float], Attack], loss: ImageLoss, about: str) -> None:
    def build(target: Target) -> Sequence[Suite]:
        return [single(name, make(target.norm, target.eps), loss)]

    build.__doc__, build.__qualname__ = about, name
    register_suite(name, check=make)(build)


_register("official-fgsm", lambda norm, eps: FGSM(norm=norm, eps=eps), cross_entropy, "FGSM, one of 'official'.")
_register("official-pgd20", lambda norm, eps: _pgd(norm, eps, 20), cross_entropy, "PGD-20, one of 'official'.")
_register("official-pgd100", lambda norm, eps: _pgd(norm, eps, 100), cross_entropy, "PGD-100, one of 'official'.")
_register("official-cw30", lambda norm, eps: _pgd(norm, eps, 30), carlini_wagner, "C&W-30, one of 'official'.")
