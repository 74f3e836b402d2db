"""High-Frequency Feature Disentanglement and Recalibration (Zhang et al., 2024, arXiv 2407.04016)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_temperature, check_weights, register_layer
from timm_fsr.layers.common import logistic_noise, soft_mask, three_convolutions

# High-pass kernels of the steganalysis rich model, as (divisor, rows): of second order in both directions at once, of
# the square 5x5, and of second order along rows.
_KERNELS: tuple[tuple[float, tuple[tuple[int, ...], ...]], ...] = (
    (4, ((0, 0, 0, 0, 0), (0, -1, 2, -1, 0), (0, 2, -4, 2, 0), (0, -1, 2, -1, 0), (0, 0, 0, 0, 0))),
    (12, ((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1))),
    (2, ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, -2, 1, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0))),
)


@register_layer
class HFDR(FeatureLayer):
    """Splits a feature map by a mask of its high frequencies and recalibrates these.

    With f the feature map, K the three fixed high-pass kernels on each channel, A a 1x1 convolution from 3 C channels
    to C, and R the recalibration network (three 3x3 convolutions, as in FSR):

        m   = Gumbel-sigmoid(A(ReLU(BN(K * f))); tau)   one value in [0, 1] per element of (C, H, W)
        h   = m * f                                     high-frequency part
        l   = (1 - m) * f                               low-frequency part
        out = m * R(h) + l

    Frequency attention regularisation keeps the share of high frequencies near `ratio`:

        loss = weight * (sum(m) / sum(1 - m) - ratio / (1 - ratio))^2 / (N C)

    with sums over the batch of N images. The mask is noisy exactly when `self.training` (and `noise`), else it is
    sigmoid(A(...) / tau). The released code draws noise in every pass, also at test, and its attacks do so too: its
    robust accuracy is that of a random defence under attacks that do not average. The division by N C, which makes
    the term tiny, is the released code's. Mask and loss are float32 also under autocast.

    A mask near 0 or 1 has almost no gradient, so attacks may select the surrogates "wide_tau", "straight_through" and
    "detached_mask", which are FSR's.

    Args:
        channels: C of the feature map.
        num_classes: of no use here.
        hidden: width of R between its convolutions; 64 in the original.
        tau: temperature of the Gumbel softmax, > 0; 0.1 in the original.
        ratio: wanted share of high frequencies, in (0, 1); 0.1 in the released code.
        weight: of the regularisation; 0.1 in the released code.
        noise: draw Gumbel noise while training.

    Raises:
        ValueError: a width, temperature, share or weight out of range.
    """

    name: ClassVar[str] = "hfdr"
    soft_labels: ClassVar[bool] = True
    default_at: ClassVar[tuple[int | str, ...]] = (0,)
    surrogates: tuple[str, ...] = ("wide_tau", "straight_through", "detached_mask")
    kernels: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 64,
        tau: float = 0.1,
        ratio: float = 0.1,
        weight: float = 0.1,
        noise: bool = True,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1: it is the width of two convolutions")
        check_temperature(tau)
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio} must lie in (0, 1): it is the share of high frequencies")
        check_weights(weight=weight)
        self.hidden = hidden
        self.tau = tau
        self.ratio = ratio
        self.weight = weight
        self.noise = noise
        kernels = torch.stack([torch.tensor(rows) / divisor for divisor, rows in _KERNELS])
        self.register_buffer("kernels", kernels.repeat(channels, 1, 1).unsqueeze(1), persistent=False)
        self.separation = nn.Sequential(
            nn.BatchNorm2d(3 * channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(3 * channels, channels, 1),
        )
        self.recalibration = three_convolutions(channels, hidden)

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Separate `feature` (N, C, H, W) and recalibrate its high frequencies.

        Returns:
            The new feature map, and with `wants_aux` the `mask` (N, C, H, W) in [0, 1], float32.
        """
        high_passed = F.conv2d(feature.to(self.kernels.dtype), self.kernels, padding=2, groups=feature.shape[1])
        mask_logits = self.separation(high_passed).float()
        if self.training and self.noise:
            mask_logits = mask_logits + logistic_noise(mask_logits)
        mask = soft_mask(mask_logits, self.tau, self.surrogate)
        keep = mask.to(feature.dtype)
        high = keep * feature
        out = keep * self.recalibration(high).to(feature.dtype) + (feature - high)
        return out, {"mask": mask} if self.wants_aux else {}

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Frequency attention regularisation, weighted."""
        mask = aux["mask"]
        share = mask.mean()
        odds = share / (1 - share).clamp_min(torch.finfo(share.dtype).eps)
        excess = (odds - self.ratio / (1 - self.ratio)).square()
        return {"frequency": self.weight * excess / (mask.shape[0] * mask.shape[1])}
