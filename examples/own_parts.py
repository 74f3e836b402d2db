"""A layer, an objective and an attack of your own: each is known by its name, in recipes and on the command line.

The same by command: timm-fsr train --import examples/own_parts.py --model.layer=gate --objective.name=confident_at
--attack.name=best_noise --attack.steps=null --output runs/own
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_fsr
from timm_fsr.training.objectives import LossTerms


@timm_fsr.register_layer
class Gate(timm_fsr.FeatureLayer):
    """Scales each channel by a learned number in (0, 1), which is kept small by a loss of its own."""

    name = "gate"

    def __init__(self, channels: int, num_classes: int, *, start: float = 2.0) -> None:
        super().__init__()
        self.start = start  # each argument is kept, so that the model can be saved
        self.logits = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Scale a feature map (N, C, H, W)."""
        mask = torch.sigmoid(self.logits).expand_as(feature)
        return mask.to(feature.dtype) * feature, {"mask": mask} if self.wants_aux else {}

    def aux_losses(self, aux: dict[str, Tensor], logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A weighted term, which every objective adds."""
        return {"size": 0.01 * aux["mask"].mean()}


@timm_fsr.register_objective
@dataclass(frozen=True, kw_only=True)
class ConfidentAT(timm_fsr.Objective):
    """Adversarial training that also rewards low entropy."""

    name: ClassVar[str] = "confident_at"
    weight: float = 0.1

    def terms(self, model: nn.Module, attack: object, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """What to minimise, by one pass of the model."""
        with timm_fsr.record(model, labels) as tape:
            logits = model(adversarial).float()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        terms = LossTerms(
            adversarial=F.cross_entropy(logits, labels), entropy=self.weight * entropy, **tape.losses(logits, labels)
        )
        terms.logits = {"adversarial": logits.detach()}
        return terms


@timm_fsr.register_attack
@dataclass(frozen=True, kw_only=True)
class BestNoise:
    """Random points of the ball, of which the one of highest loss is kept: weak, and without gradients."""

    name: ClassVar[str] = "best_noise"
    eps: float = 8 / 255
    tries: int = 4

    def with_eps(self, eps: float) -> BestNoise:
        """The same attack in another ball."""
        return replace(self, eps=eps)

    def __call__(self, loss_fn, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[no-untyped-def]
        """Attack images (N, C, H, W) in [0, 1]."""
        best, highest = images, torch.full_like(images[:, 0, 0, 0], -torch.inf)
        for _ in range(self.tries):
            noise = torch.empty_like(images).uniform_(-self.eps, self.eps, generator=generator)
            tried = (images + noise).clamp(0, 1)
            with torch.no_grad():
                found = loss_fn(tried)
            loss = getattr(found, "loss", found)  # evaluations also say which images are fooled
            best = torch.where((loss > highest).view(-1, 1, 1, 1), tried, best)
            highest = torch.maximum(highest, loss)
        return best


def main(images: int = 1000, epochs: int = 4, output: str = "example_run") -> None:
    """Train with all three by a recipe: a small network on some embedded images of Fashion-MNIST."""
    recipe = timm_fsr.Recipe.load(
        overrides=[
            "--model.name=resnet_tiny_cifar",
            "--model.layer=gate",
            "--objective.name=confident_at",
            "--attack.name=best_noise",
            "--attack.steps=null",
            "--attack.eps=0.1",
            f"--data.limit_train={images}",
            f"--data.held_out={images // 10}",
            f"--data.limit_test={images // 10}",
            f"--optim.epochs={epochs}",
            "--optim.batch_size=50",
            "--optim.lr=0.05",
            "--optim.schedule=cosine",
            "--evaluation.attacks=[best_noise,pgd20]",
            f"--output={output}",
            "--overwrite=true",
        ]
    )
    timm_fsr.train(recipe)


if __name__ == "__main__":
    main()
