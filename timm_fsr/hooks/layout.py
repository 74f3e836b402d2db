"""Conversion of the feature layouts found in timm (NCHW, NHWC, NLC with prefix tokens) to NCHW and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How one module of a model lays out its feature map.

    Attributes:
        kind: order of the dimensions; NLC is a sequence whose spatial tokens follow `prefix_tokens` others.
        channels: number of channels C.
        grid: (rows, columns) for an input of `image_size`.
        image_size: (height, width) of the input the layout was measured with.
        prefix_tokens: class, distillation and register tokens in front of the spatial ones (NLC only).
    """

    kind: Literal["NCHW", "NHWC", "NLC"]
    channels: int
    grid: Size
    image_size: Size
    prefix_tokens: int = 0

    def to_nchw(self, feature: Tensor, image_size: Size | None = None) -> Tensor:
        """View the spatial part of `feature` as (N, C, H, W).

        Args:
            feature: the module's output in this layout.
            image_size: (height, width) of the current input image; decides the grid of a sequence whose length
                differs from the measured one or whose image has another aspect ratio.
        """
        if self.kind == "NCHW":
            return feature
        if self.kind == "NHWC":
            return feature.permute(0, 3, 1, 2)
        rows, columns = self.grid_of(feature.shape[1] - self.prefix_tokens, image_size)
        tokens = feature[:, self.prefix_tokens :]
        return tokens.transpose(1, 2).reshape(feature.shape[0], feature.shape[2], rows, columns)

    def from_nchw(self, spatial: Tensor, feature: Tensor) -> Tensor:
        """Put `spatial` (N, C, H, W) back into the layout of `feature`, whose prefix tokens are kept."""
        if self.kind == "NCHW":
            return spatial
        if self.kind == "NHWC":
            return spatial.permute(0, 2, 3, 1)
        tokens = spatial.flatten(2).transpose(1, 2)
        if not self.prefix_tokens:
            return tokens
        return torch.cat([feature[:, : self.prefix_tokens], tokens], dim=1)

    def grid_of(self, tokens: int, image_size: Size | None) -> Size:
        """Rows and columns of a sequence of `tokens` spatial tokens.

        Raises:
            ValueError: no grid of that many tokens fits the image.
        """
        if image_size is None:
            if tokens == self.grid[0] * self.grid[1]:
                return self.grid
            side = math.isqrt(tokens)
            if side * side == tokens:
                return side, side
        else:
            # Whole numbers, rounded down, up and to the nearest: torch.export can follow them for any image size.
            for half in (0, 2, 1):
                rows, columns = (
                    (size * cells + half * (full - 1) // 2) // full
                    for size, cells, full in zip(image_size, self.grid, self.image_size, strict=True)
                )
                if rows * columns == tokens:
                    return rows, columns
        raise ValueError(
            f"cannot arrange {tokens} spatial tokens as a grid for an image of size {image_size}; "
            f"this layer was attached to a model that gives a {self.grid} grid for {self.image_size}"
        )


def measure(
    shape: torch.Size,
    image_size: Size,
    channels: int | None = None,
    reduction: float | None = None,
    prefer: str = "NCHW",
) -> Layout | None:
    """The layout of a module's output of `shape` for an image of `image_size`; None if it is not spatial.

    Args:
        shape: of the output, batch first.
        image_size: (height, width) of the input.
        channels: what the model says of the number of channels, if anything.
        reduction: what the model says of image pixels per feature cell, if anything.
        prefer: the answer where a shape such as (N, 16, 16, 16) fits both NCHW and NHWC.
    """
    if len(shape) == 4:
        nchw = channels in (None, shape[1]) and _shaped_like(shape[2:4], image_size)
        nhwc = channels in (None, shape[3]) and _shaped_like(shape[1:3], image_size)
        if nhwc and (not nchw or prefer == "NHWC"):
            return Layout("NHWC", shape[3], (shape[1], shape[2]), image_size)
        if nchw or channels == shape[1]:
            return Layout("NCHW", shape[1], (shape[2], shape[3]), image_size)
    if len(shape) == 3 and channels in (None, shape[2]):
        return _measure_sequence(shape, image_size, reduction)
    return None


def _shaped_like(grid: tuple[int, ...], image_size: Size) -> bool:
    """Whether a grid has the aspect ratio of the image, up to one cell of padding."""
    rows, columns = grid
    ratio = image_size[0] / image_size[1]
    return abs(rows - columns * ratio) <= max(1.0, ratio)


def _measure_sequence(shape: torch.Size, image_size: Size, reduction: float | None) -> Layout | None:
    """A sequence whose spatial part is a grid with the image's aspect ratio and at most 16 tokens before it."""
    length = shape[1]
    ratio = image_size[0] / image_size[1]
    for prefix in range(min(length, 17)):
        tokens = length - prefix
        columns = round(math.sqrt(tokens / ratio))
        for rows in {math.floor(columns * ratio), math.ceil(columns * ratio)}:
            expected = reduction is None or abs(image_size[0] / reduction - rows) < 1.5
            if rows > 0 and rows * columns == tokens and expected:
                return Layout("NLC", shape[2], (rows, columns), image_size, prefix)
    return None
