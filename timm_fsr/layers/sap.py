"""Stochastic activation pruning (Dhillon et al., ICLR 2018, arXiv 1803.01442)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from timm_fsr.layers.base import Aux, FeatureLayer, register_layer


@register_layer
class SAP(FeatureLayer):
    """Draws activations in proportion to their size, deactivates those never drawn and scales the others up.

    With f the feature map of one image, M = C * H * W and r = floor(fraction * M), at least 1 (paper, section 3):

        p_i   = |f_i| / sum_j |f_j|
        out_i = f_i / (1 - (1 - p_i)^r)  if i is among r draws with replacement from p, else 0

    The scale makes f the expectation of the output. It is random exactly when `self.training`; in eval mode the layer
    is its expectation, the identity, as every layer of this package is deterministic there. So in eval mode the
    network is the base network that was trained with this noise, and its figures are not those of the paper's
    defence, which is random at test time too: for that, evaluate inside `timm_fsr.hooks.surrogates.noisy(model)` and
    attack by the mean gradient of several passes (EOT), on a line of its own. Athalye et al., 2018 (arXiv 1802.00420)
    broke the defence in this way.

    The gradient is the scale where kept and 0 elsewhere; p, and with it the scale, is taken for constant, as in the
    released operator. The paper prunes behind every activation of a trained network; here at the end of each stage,
    in training too.

    Args:
        channels: C of the feature map.
        num_classes: not used.
        fraction: draws per activation, > 0; 1 in the released operator.

    Raises:
        ValueError: no draws.
    """

    name: ClassVar[str] = "sap"
    soft_labels: ClassVar[bool] = True
    default_at: ClassVar[tuple[int | str, ...]] = ("stages",)

    def __init__(self, channels: int, num_classes: int, *, fraction: float = 1.0) -> None:
        super().__init__()
        if not 0 < fraction < float("inf"):
            raise ValueError(f"fraction={fraction} must be positive: it is the number of draws per activation")
        self.fraction = fraction

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Prune `feature` (N, C, H, W).

        Returns:
            The feature map, and with `wants_aux`, in training mode, the `mask` (N, C, H, W), 1 where kept and else 0,
            float32.
        """
        if not self.training:
            return feature, {}
        with torch.no_grad():
            size = feature.flatten(1).abs().float()
            draws = max(1, int(self.fraction * size.shape[1]))
            kept = drawn(size, draws)
            share = size / size.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            chance = -torch.expm1(draws * torch.log1p(-share))  # 1 - (1 - p)^r, exact for a p near 0
            scale = torch.where(kept, 1 / chance, 0).view(feature.shape)
        aux = {"mask": kept.float().view(feature.shape)} if self.wants_aux else {}
        return (feature.float() * scale).to(feature.dtype), aux  # a scale may be beyond float16, the product is not


def drawn(size: Tensor, draws: int) -> Tensor:
    """Which entries of each row of `size` (N, M), 0 or more, are among `draws` with replacement in proportion to it.

    An entry of 0 never is.
    """
    cumulative = size.cumsum(dim=1)
    points = torch.rand(len(size), draws, device=size.device) * cumulative[:, -1:]
    # Rounding may put a point at the very end, beyond the last entry; in a row of zeros all are there.
    index = torch.searchsorted(cumulative, points, right=True).clamp_max(size.shape[1] - 1)
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, index, True) & (size > 0)
