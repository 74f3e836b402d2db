"""Channel-wise Activation Suppressing (Bai et al., ICLR 2021, arXiv 2103.08307)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_weights, register_layer
from timm_fsr.layers.common import auxiliary_logits, prediction_losses, with_gradient_of


@register_layer
class CAS(FeatureLayer):
    """Scales the channels of a feature map by the weights that an auxiliary classifier gives them for one class.

    With f the feature map, its mean over H and W (pool) and the classifier's weights M (classes, C), bias b:

        p     = M pool(f) + b           auxiliary logits
        k     = y in training, argmax(p) in eval mode
        out_c = M_kc * f_c              one factor per channel, of any sign

    The auxiliary classifier learns by `weight` * CE(p, y). Training attacks maximise the main loss and
    `attack_weight` * CE(p, y); TRADES' attack, as in the released code, the KL divergence of p from that of the clean
    image in place of the cross-entropy.

    In training without labels k is argmax(p) as well. The choice of k has no gradient, so attacks may select the
    surrogate "soft_rows": the gradient of softmax(p) M, the expected row. Without classes (`num_classes` 0) the layer
    does nothing.

    What the released code does otherwise: on its WideResNet the layer sits before the last block and after the final
    norm; its TRADES and MART train p by the same formulas as the main logits, here p has the cross-entropy on the
    attacked images under each method. Its attacks hand labels to the model, which ignores them in eval mode; here
    they get none. Its weights are 2 throughout, means over the sites, as here.

    Args:
        channels: C of the feature map.
        num_classes: of the auxiliary classifier.
        weight: of its loss (beta, 2 in the paper's experiments on CIFAR-10).
        attack_weight: of its loss in training attacks; the paper has the same as `weight`.

    Raises:
        ValueError: a negative weight.
    """

    name: ClassVar[str] = "cas"
    default_at: ClassVar[tuple[int | str, ...]] = ("blocks:-1",)
    surrogates: tuple[str, ...] = ("soft_rows",)

    def __init__(self, channels: int, num_classes: int, *, weight: float = 2.0, attack_weight: float = 2.0) -> None:
        super().__init__()
        check_weights(weight=weight, attack_weight=attack_weight)
        self.channels = channels
        self.weight = weight
        self.attack_weight = attack_weight
        self.head: nn.Linear | None = None
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the auxiliary classifier by a fresh one for `num_classes` classes (0: none)."""
        self.head = nn.Linear(self.channels, num_classes) if num_classes else None

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Scale `feature` (N, C, H, W).

        Returns:
            The scaled feature map, and with `wants_aux` the auxiliary `logits` (N, classes) and the channels'
            `scale` (N, C), both float32.
        """
        if self.head is None:
            return feature, {}
        logits = self.head(feature.mean(dim=(2, 3)).to(self.head.weight.dtype)).float()
        rows = self.head.weight.float()
        scale = rows[labels if self.training and labels is not None else logits.argmax(dim=1)]
        if self.surrogate == "soft_rows":
            scale = with_gradient_of(logits.softmax(dim=1) @ rows, scale)
        out = feature * scale[:, :, None, None].to(feature.dtype)
        return out, {"logits": logits, "scale": scale} if self.wants_aux else {}

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The auxiliary classifier's cross-entropy, weighted."""
        return {"classification": self.weight * F.cross_entropy(auxiliary_logits(aux, logits), labels)}

    def attack_losses(self, aux: Aux, logits: Tensor, labels: Tensor, clean: Aux | None = None) -> Tensor | None:
        """The auxiliary classifier's cross-entropy, or its divergence from the clean images', weighted, (N,)."""
        found = auxiliary_logits(aux, logits)
        return self.attack_weight * prediction_losses(found, labels, None if clean is None else clean["logits"])
