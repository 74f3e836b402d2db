"""The subject of evidence: a model and some images, attacked in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_fsr.attacks import Attack, LossFunction, judged_loss
from timm_fsr.data import derive_generator
from timm_fsr.inference import predict
from timm_fsr.margins import cross_entropy
from timm_fsr.soundness import check_attacked

ImageLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What the evidence is about.

    Attributes:
        model: in pixel space, in eval mode.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        norm: "linf" or "l2".
        eps: radius, in pixels of [0, 1].
        seed: of everything random.
        batch_size: images per pass.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    norm: str
    eps: float
    seed: int
    batch_size: int

    def robust_to(self, attack: Attack, name: str, loss: ImageLoss = cross_entropy) -> Tensor:
        """(N,) bool: is the image right clean and under the attack? Images that are wrong already are not attacked."""
        right = self.right_on(self.images, name)
        attacked = self.attacked(attack, name, loss, right)
        return right & self.right_on(attacked, name)

    def attacked(
        self,
        attack: Attack,
        name: str,
        loss: ImageLoss = cross_entropy,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The images, those `chosen` (N,) of them attacked."""
        result = self.images.clone()
        indices = torch.arange(len(self.images), device=self.images.device)
        indices = indices if chosen is None else indices[chosen]
        for number, part in enumerate(indices.split(self.batch_size) if len(indices) else ()):
            generator = derive_generator(self.seed, 0, number, 0, self.images.device, stream=f"evidence {name}")
            labels = self.labels[part]
            result[part] = attack(self.loss_fn(loss, labels), self.images[part], generator=generator)
            check_attacked(result[part], name)
        return result

    def loss_fn(self, loss: ImageLoss, labels: Tensor) -> LossFunction:
        """What an attack maximises on the images with these labels."""
        return judged_loss(self.model, loss, labels)

    def right_on(self, images: Tensor, kind: str) -> Tensor:
        """(N,) bool: is the image classified correctly?"""
        return torch.cat([predict(self.model, part, kind) for part in images.split(self.batch_size)]) == self.labels
