"""Models and suites whose outcome is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_fsr.evaluation.registry import Stage, Suite


class Brightness(nn.Module):
    """Two classes, dark (0) and bright (1), told apart by the mean pixel: 0.5 is the border."""

    def forward(self, given: Tensor) -> Tensor:
        excess = 10 * (given.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-excess, excess], dim=1)


def grey(*levels: float) -> Tensor:
    """One image per level, of that level everywhere."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 3, 3).clone()


class Fixed:
    """An attack that swaps dark and bright on given images of a batch, and notes the seeds of its random starts."""

    def __init__(self, broken: list[int], seeds: list[int]) -> None:
        self.broken, self.seeds = broken, seeds

    def __call__(self, model: nn.Module, given: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        self.seeds.append(generator.initial_seed())
        adversarial = given.clone()
        adversarial[self.broken] = 1 - adversarial[self.broken]
        return adversarial


def suite(name: str, *stages: tuple[str, Fixed], every_image: bool = True) -> Suite:
    return Suite(name, tuple(Stage(key, f"Fixed({run.broken})", run) for key, run in stages), every_image=every_image)
