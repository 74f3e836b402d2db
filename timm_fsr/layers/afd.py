"""Adversarial Fine-tuning via Disentanglement (Zhou et al., AAAI 2025, arXiv 2401.14707): its two linear maps."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_weights, register_layer
from timm_fsr.layers.common import auxiliary_logits, wrong_class_loss


@register_layer
class Disentangler(FeatureLayer):
    """Maps features to their intrinsic part and, beside it in training, to the confused part that attacks exploit.

    With f the feature map, A and B linear maps of its channels that begin as the identity, and pool the mean over H
    and W:

        out = A f                    intrinsic features, which go on through the network
        i   = pool(A f)
        c   = B pool(f)              confused features; f is held fixed

        loss = confusion_weight * CE(classifier(c), y')   trains B alone; y' is the strongest wrong class
             + separation_weight * cos(i, c)              trains all but B

    That is half of the method. The objective "afd" adds the alignment of i with the features that a frozen copy of the
    model, as it was before this training, has of the clean images. At test A is one more linear map before the
    pooling: in a network whose classifier follows the pooling it can be folded into the classifier.

    What differs from the released code: there `classifier` is the network's own, which a layer does not see. Here it is
    a linear one that learns on i, held fixed, by the same cross-entropy (the term "probe"). And there three
    optimizers step one after another on gradients that pile up, so that all but B step twice; here all terms are one
    loss with the same roles and one step.

    Args:
        channels: C of the feature map.
        num_classes: of the probe.
        confusion_weight: 0.05 in the original (alpha).
        separation_weight: 0.25 in the original (beta; sigma in the code).

    Raises:
        ValueError: a negative weight.
    """

    name: ClassVar[str] = "afd"
    soft_labels: ClassVar[bool] = True

    def __init__(
        self, channels: int, num_classes: int, *, confusion_weight: float = 0.05, separation_weight: float = 0.25
    ) -> None:
        super().__init__()
        check_weights(confusion_weight=confusion_weight, separation_weight=separation_weight)
        self.channels = channels
        self.confusion_weight = confusion_weight
        self.separation_weight = separation_weight
        self.intrinsic = nn.Conv2d(channels, channels, 1, bias=False)
        self.confused = nn.Linear(channels, channels, bias=False)
        with torch.no_grad():
            self.intrinsic.weight.copy_(torch.eye(channels)[:, :, None, None])
            self.confused.weight.copy_(torch.eye(channels))
        self.head: nn.Linear | None = None
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the probe by a fresh one for `num_classes` classes (0: none)."""
        weight = self.confused.weight
        self.head = nn.Linear(self.channels, num_classes).to(weight.device, weight.dtype) if num_classes else None

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Map `feature` (N, C, H, W) to its intrinsic part.

        Returns:
            The intrinsic feature map, and with `wants_aux` the pooled `intrinsic` and `confused` features (N, C), the
            probe's `logits` for the former and `confused_logits` for the latter (N, classes), all float32.
        """
        out = self.intrinsic(feature).to(feature.dtype)
        aux: Aux = {}
        if self.wants_aux:
            pooled = feature.detach().mean(dim=(2, 3)).to(self.confused.weight.dtype)
            aux["intrinsic"] = out.float().mean(dim=(2, 3))
            aux["confused"] = confused = self.confused(pooled).float()
            if self.head is not None:
                weight, bias = self.head.weight, self.head.bias
                aux["logits"] = self.head(aux["intrinsic"].detach().to(weight.dtype)).float()
                aux["confused_logits"] = F.linear(confused.to(weight.dtype), weight.detach(), bias.detach()).float()
        return out, aux

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The disentangling losses and the probe's, means over the batch."""
        probe = F.cross_entropy(auxiliary_logits(aux, logits), labels)
        confusion = wrong_class_loss(aux["confused_logits"], logits, labels)
        separation = F.cosine_similarity(aux["intrinsic"], aux["confused"].detach(), dim=1).mean()
        return {
            "confusion": self.confusion_weight * confusion,
            "separation": self.separation_weight * separation,
            "probe": probe,
        }
