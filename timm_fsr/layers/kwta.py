"""k-Winners-Take-All (Xiao et al., ICLR 2020, arXiv 1905.10510)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from timm_fsr.layers.base import Aux, FeatureLayer, register_layer
from timm_fsr.layers.common import with_gradient_of


@register_layer
class KWTA(FeatureLayer):
    """Keeps the largest activations of each image and deactivates all others.

    With f the feature map of one image, N = C * H * W and k = floor(ratio * N), at least 1 (paper, equation 1):

        out = f where f >= the k-th largest of the N values of f, else 0

    The gradient is that of what is kept: 1 there, 0 elsewhere; which ones are kept has none. So the loss jumps between
    nearby images, which hides it from gradients without making the network robust: Tramer et al., 2020 (arXiv
    2002.08347) broke it with smoothed gradients. Attacks may select the surrogate "soft_mask", the gradient of
    f * sigmoid((f - threshold) / s) with the same threshold and s the standard deviation of the image's activations.

    Values equal to the k-th largest are all kept, as in the released code. The paper puts this function in the place
    of every ReLU, and its code can lower the ratio in fine-tuning (from 0.2, by 0.005 every two epochs); here it acts
    at the end of each stage, behind the backbone's own activation, with a fixed ratio. Where so many activations are
    0 already that the k-th largest is one of them, it changes nothing.

    Args:
        channels: C of the feature map.
        num_classes: not used.
        ratio: the share that is kept (gamma), in (0, 1]; 0.1 in the released adversarial training.

    Raises:
        ValueError: a ratio out of range.
    """

    name: ClassVar[str] = "kwta"
    soft_labels: ClassVar[bool] = True
    default_at: ClassVar[tuple[int | str, ...]] = ("stages",)
    surrogates: tuple[str, ...] = ("soft_mask",)

    def __init__(self, channels: int, num_classes: int, *, ratio: float = 0.1) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} must be above 0 and at most 1: it is the share of activations kept")
        self.ratio = ratio

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Keep the winners of `feature` (N, C, H, W).

        Returns:
            The feature map, and with `wants_aux` the `mask` (N, C, H, W), 1 where kept and else 0, float32.
        """
        flat = feature.detach().flatten(1)
        winners = max(1, int(self.ratio * flat.shape[1]))
        threshold = flat.topk(winners, dim=1, sorted=False).values.amin(dim=1)[:, None, None, None]
        kept = feature >= threshold
        out = torch.where(kept, feature, 0.0)
        if self.surrogate == "soft_mask":
            spread = flat.float().std(dim=1, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
            soft = torch.sigmoid((feature - threshold).float() / spread[:, None, None, None])
            out = with_gradient_of(feature * soft.to(feature.dtype), out)
        return out, {"mask": kept.float()} if self.wants_aux else {}
