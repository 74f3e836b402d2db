"""The Frequency Preference Control Module (Bu et al., ICCV 2023, arXiv 2307.09763)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, register_layer


@register_layer
class FPCM(FeatureLayer):
    """Weights the low and the high frequencies of a feature map, channel by channel, in favour of the low.

    With f the feature map, its P = H * W positions read row by row as one sequence, F the Fourier transform along it
    and k in 0..P/2 the frequency:

        low   = F^-1(exp(-(k / (cutoff * P))^2 / 2) * F(f))       Gaussian low-pass filter
        alpha = 0.5 + 0.5 * sigmoid(w_c * mean(f_c) + b_c)        one value in [0.5, 1] per image and channel c
        out   = alpha * low + (1 - alpha) * (f - low)

    This is what the released code computes: it transforms along channels too, where nothing is filtered and the
    inverse undoes it, and it applies a 1x1 convolution to each position before the mean, which is the same. Its
    ResNet-18 learns w and b per channel, as here; its WRN-34-10 a full matrix, C times the parameters.
    Its ResNet-18 lowers the cutoff linearly over the epochs, from 1/2 to 1/8, and is tested at 1/8; its WRN-34-10
    trains and is tested at 1/8. Here it is constant. The filter and alpha are float32 also under autocast.

    Args:
        channels: C of the feature map.
        num_classes: not used.
        cutoff: standard deviation of the filter, > 0, as a share of the number of positions.

    Raises:
        ValueError: a cutoff out of range.
    """

    name: ClassVar[str] = "fpcm"
    soft_labels: ClassVar[bool] = True
    default_at: ClassVar[tuple[int | str, ...]] = ("stages",)

    def __init__(self, channels: int, num_classes: int, *, cutoff: float = 0.125) -> None:
        super().__init__()
        if not 0 < cutoff < float("inf"):
            raise ValueError(f"cutoff={cutoff} must be positive: it is the width of a filter, as a share of H * W")
        self.cutoff = cutoff
        self.projection = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Filter `feature` (N, C, H, W).

        Returns:
            The feature map, and with `wants_aux` `alpha` (N, C), float32.
        """
        full = feature.float()
        low = self._low_pass(full)
        pooled = full.mean(dim=(2, 3), keepdim=True).to(self.projection.weight.dtype)
        alpha = 0.5 + 0.5 * torch.sigmoid(self.projection(pooled).float())
        out = (1 - alpha) * (full - low) + alpha * low
        return out.to(feature.dtype), {"alpha": alpha.flatten(1)} if self.wants_aux else {}

    def _low_pass(self, feature: Tensor) -> Tensor:
        sequence = feature.flatten(2)
        positions = sequence.shape[2]
        frequency = torch.arange(positions // 2 + 1, device=feature.device) / (self.cutoff * positions)
        passed = torch.fft.rfft(sequence, dim=2) * torch.exp(-0.5 * frequency.square())
        return torch.fft.irfft(passed, n=positions, dim=2).view(feature.shape)
