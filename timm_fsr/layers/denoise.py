"""Feature denoising (Xie et al., CVPR 2019, arXiv 1812.03411)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_choice, register_layer
from timm_fsr.layers.common import with_gradient_of


@register_layer
class Denoise(FeatureLayer):
    """Adds a filtered copy of the feature map to it, through a 1x1 convolution.

    With f_i the features of position i, y the filtered map (paper, section 4):

        y_i = sum_j w_ij f_j
        out = f + BN(W y)

        kind              w_ij                                              j over
        "softmax"         softmax over j of theta(f_i) . phi(f_j) / sqrt d  all positions
        "dot"             f_i . f_j / number of positions                   all positions
        "bilateral"       as "softmax"                                      the 3x3 window around i
        "bilateral_dot"   as "dot"                                          the 3x3 window around i
        "mean"            1 / number of positions                           the 3x3 window around i
        "median"          y_i is the median of each channel                 the 3x3 window around i

    theta and phi are 1x1 convolutions to d = C / 2 channels. The released code has the first two kinds: "softmax" in
    its ResNet-152 behind each stage (the default place), "dot" in its ResNeXt-101 behind each block. As there, no
    convolution has a bias, theta and phi start at N(0, 0.01^2), and the BatchNorm's scale starts at 0, so that a
    fresh layer changes nothing. The borders of the other kinds are ours: a window holds what lies inside the map;
    only the median's repeats the border, so as to have nine values. The softmax is float32 also under autocast;
    "softmax" holds (H W)^2 weights per image.

    A median has the gradient of one of nine values. Attacks may select "mean_filter": that of their mean.

    Args:
        channels: C of the feature map.
        num_classes: not used.
        kind: the filter, one of the table.

    Raises:
        ValueError: an unknown kind.
    """

    name: ClassVar[str] = "denoise"
    soft_labels: ClassVar[bool] = True
    default_at: ClassVar[tuple[int | str, ...]] = ("stages",)
    surrogates: tuple[str, ...] = ("mean_filter",)

    def __init__(self, channels: int, num_classes: int, *, kind: str = "softmax") -> None:
        super().__init__()
        check_choice(type(self), "kind", kind, [*_WEIGHTED, *_UNWEIGHTED])
        self.kind = kind
        self.surrogates = ("mean_filter",) if kind == "median" else ()
        embedded = kind in ("softmax", "bilateral")
        self.theta = _embedding(channels) if embedded else nn.Identity()
        self.phi = _embedding(channels) if embedded else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Denoise `feature` (N, C, H, W); there are no auxiliary outputs."""
        if self.kind in _UNWEIGHTED:
            filtered = _UNWEIGHTED[self.kind](feature)
        else:
            filtered = _WEIGHTED[self.kind](self.theta(feature), self.phi(feature), feature)
        if self.surrogate == "mean_filter":
            filtered = with_gradient_of(mean(feature), filtered)
        return feature + self.norm(self.conv(filtered.to(feature.dtype))).to(feature.dtype), {}


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Non-local mean of `value` (N, C, H, W), weighted by the softmax of `query` . `key`, each (N, d, H, W)."""
    scores = query.flatten(2).transpose(1, 2) @ key.flatten(2)
    weights = (scores.float() / query.shape[1] ** 0.5).softmax(dim=2)
    return (value.flatten(2) @ weights.transpose(1, 2).to(value.dtype)).view(value.shape)


def dot(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Non-local mean of `value` (N, C, H, W), weighted by `query` . `key`, each (N, d, H, W)."""
    query, key, flat = query.flatten(2), key.flatten(2), value.flatten(2)
    key = key / key.shape[2]  # before the sums: half precision would overflow
    if flat.shape[1] < flat.shape[2]:  # the same product, through the smaller matrix
        return (flat @ key.transpose(1, 2) @ query).view(value.shape)
    return (flat @ (key.transpose(1, 2) @ query)).view(value.shape)


def bilateral(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `softmax`, over the 3x3 window around each position."""
    scores = _window_scores(query, key).float() / query.shape[1] ** 0.5
    weights = scores.masked_fill(_inside(value) == 0, float("-inf")).softmax(dim=2)
    return (weights.to(value.dtype) * _windows(value)).sum(dim=2)


def bilateral_dot(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `dot`, over the 3x3 window around each position."""
    weights = _window_scores(query, key) / _inside(value).sum(dim=2, keepdim=True)
    return (weights.to(value.dtype) * _windows(value)).sum(dim=2)


def mean(feature: Tensor) -> Tensor:
    """Mean of `feature` (N, C, H, W) over the 3x3 window around each position."""
    return F.avg_pool2d(feature, 3, stride=1, padding=1, count_include_pad=False)


def median(feature: Tensor) -> Tensor:
    """Median of each channel of `feature` (N, C, H, W) over the 3x3 window around each position."""
    padded = F.pad(feature, (1, 1, 1, 1), mode="replicate")
    return _windows(padded)[..., 1:-1, 1:-1].topk(5, dim=2).values[:, :, 4]


_WEIGHTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": softmax,
    "dot": dot,
    "bilateral": bilateral,
    "bilateral_dot": bilateral_dot,
}
_UNWEIGHTED: dict[str, Callable[[Tensor], Tensor]] = {"mean": mean, "median": median}


def _embedding(channels: int) -> nn.Conv2d:
    embedding = nn.Conv2d(channels, max(1, channels // 2), 1, bias=False)
    nn.init.normal_(embedding.weight, std=0.01)
    return embedding


def _windows(feature: Tensor) -> Tensor:
    """The 3x3 window around each position, with zeros outside the map: (N, C, 9, H, W)."""
    columns = F.unfold(feature, 3, padding=1)
    return columns.view(feature.shape[0], feature.shape[1], 9, *feature.shape[2:])


def _inside(feature: Tensor) -> Tensor:
    """Which positions of each window lie inside the map: 1 or 0, (1, 1, 9, H, W)."""
    return _windows(torch.ones_like(feature[:1, :1]))


def _window_scores(query: Tensor, key: Tensor) -> Tensor:
    """`query` . `key` for the nine keys around each position: (N, 1, 9, H, W)."""
    return (query.unsqueeze(2) * _windows(key)).sum(dim=1, keepdim=True)
