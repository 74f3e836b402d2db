"""Training augmentations: random crop and flip, random resized crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding and random horizontal flip: `augmentation(images, generator)`.

    Attributes:
        padding: pixels added on each side before the crop, 0 or more.
        flip: whether half of the images are mirrored.
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments (N, C, H, W) images, each by its own draw from `generator`."""
        return random_crop_flip(images, padding=self.padding, flip=self.flip, generator=generator)


def random_crop_flip(images: Tensor, *, padding: int = 4, flip: bool = True, generator: torch.Generator) -> Tensor:
    """Pads with zeros, crops back to size at random and mirrors at random, each image by its own draw.

    Args:
        images: uint8 or float tensor (N, C, H, W).
        padding: pixels added on each side.
        flip: whether half of the images are mirrored.
        generator: the only source of randomness; one on the CPU draws the same for images on any device.

    Returns:
        A new tensor like `images`.
    """
    count, channels, height, width = images.shape
    device = images.device
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=generator.device).to(device)
    rows = offsets[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=generator.device).to(device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = offsets[1] + columns
    padded = F.pad(images, (padding,) * 4)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    pixels = pixels.view(count, 1, height * width).expand(count, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(images.shape)


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, scaled to the training size, mirrored at random.

    Of streamed images it is drawn as each is decoded, from the whole; of images in memory from what is held of them.

    Attributes:
        scale: smallest and largest share of the image's area, 0 < smallest <= largest <= 1.
        flip: whether half of the images are mirrored.

    Raises:
        ValueError: `scale` is no such pair.
    """

    scale: tuple[float, ...] = (0.25, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"crop_scale={list(self.scale)} is no range of the image's area; write the smallest and the largest "
                "share, such as [0.25, 1.0]"
            )

    def __call__(self, picture: Image.Image, size: tuple[int, int], generator: torch.Generator) -> Image.Image:
        """The picture in (height, width) `size`, scaled bicubically with antialiasing; drawn from `generator`."""
        part = picture.crop(self.box(picture.height, picture.width, generator))
        part = part.resize(size[::-1], Image.Resampling.BICUBIC)
        mirrored = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        return ImageOps.mirror(part) if mirrored else part

    def of_batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Float images (N, C, H, W) in [0, 1], each drawn from its own generator and scaled back to its size."""
        size = (images.shape[2], images.shape[3])
        drawn = zip(to_pictures(images), generators, strict=True)
        return from_pictures([self(picture, size, generator) for picture, generator in drawn], images.device)

    def box(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """(left, upper, right, lower) of a part with an aspect from 3/4 to 4/3, drawn as in torchvision."""
        log_ratio = math.log(4 / 3)
        for _ in range(_TRIES):
            area, aspect, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp((2 * aspect - 1) * log_ratio)
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, upper = int(x * (width - wide + 1)), int(y * (height - high + 1))
                return left, upper, left + wide, upper + high
        # A very long image: its centre, of the nearest aspect allowed.
        wide, high = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, upper = (width - wide) // 2, (height - high) // 2
        return left, upper, left + wide, upper + high


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Float images (N, C, H, W) in [0, 1], grey or RGB, in 8 bits; exact for images that were 8 bits before."""
    arrays = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]


def from_pictures(pictures: Sequence[Image.Image], device: torch.device | str = "cpu") -> Tensor:
    """The way back: float32 images (N, C, H, W) in [0, 1] on `device`."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    stacked = torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None])
    return stacked.permute(0, 3, 1, 2).contiguous().to(device).float().div_(255)
