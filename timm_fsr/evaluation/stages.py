"""Stages: the single attacks that an evaluation is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

StageFunction = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Stage:
    """One attack on a model.

    Attributes:
        name: short, unique within its suite.
        detail: what it does and with which parameters, for the report.
        run: maps (pixel-space model in eval mode with frozen parameters, images (N, C, H, W) in [0, 1], labels (N,),
            generator on the images' device) to adversarial images of the same shape, in [0, 1] and in the ball.
        reuse: take over what the same attack, by name and detail, has done to an image in a suite before this one,
            instead of repeating it.
    """

    name: str
    detail: str
    run: StageFunction
    reuse: bool = False


@dataclass(frozen=True)
class Suite:
    """What a report calls an attack: one stage, or several of which each attacks what those before it left.

    Attributes:
        name: as asked for, such as "pgd20" or "autoattack".
        stages: in their order.
        every_image: attack also images that are wrong already, as papers count single attacks; else only those that
            are classified correctly so far.
        note: what a reader has to know about it; "" is nothing.
    """

    name: str
    stages: tuple[Stage, ...]
    every_image: bool = False
    note: str = ""

    @property
    def detail(self) -> str:
        """Every stage written out."""
        if len(self.stages) == 1:
            return self.stages[0].detail
        return "; ".join(f"{stage.name}: {stage.detail}" for stage in self.stages)
