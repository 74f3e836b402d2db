"""The images of one split, not decoded yet: their labels, and the pixels of those that are asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    import datasets

MODES = {1: "L", 3: "RGB"}
GREY_MODES = ("1", "L", "LA")
CHUNK = 128  # images decoded at once: photographs of full size then stay within a few hundred MB


@dataclass(frozen=True, eq=False)
class TablePictures:
    """Reads pictures from a table of `datasets`, whose `column` has the feature Image; picklable, as workers need."""

    table: datasets.Dataset
    column: str

    def __call__(self, rows: list[int]) -> Sequence[Image.Image | None]:
        """The decoded pictures at `rows`, None where the table has none."""
        return self.table[rows][self.column]


@dataclass(frozen=True, eq=False)
class ArrayPictures:
    """Reads pictures from an array in memory, a uint8 `pixels` (N, H, W, C) with C = 1 or 3."""

    pixels: np.ndarray

    def __call__(self, rows: list[int]) -> Sequence[Image.Image | None]:
        """The pictures at `rows`."""
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in self.pixels[rows]]

    def as_wanted(self, size: tuple[int, int] | None, channels: int | None) -> np.ndarray | None:
        """The array if `size` and `channels` change nothing in it, else None."""
        height, width, depth = self.pixels.shape[1:]
        return self.pixels if size in (None, (height, width)) and channels in (None, depth) else None


@dataclass(frozen=True)
class Rows:
    """Images of one split, not decoded yet.

    Attributes:
        name: the source and the split, for errors and reports.
        labels: one per image, a number or a class name.
        classes: the names that numbers stand for, if the source has them.
        pictures: reads the images at the given positions.
    """

    name: str
    labels: list[int] | list[str]
    classes: tuple[str, ...] | None
    pictures: Callable[[list[int]], Sequence[Image.Image | None]]

    @property
    def named(self) -> bool:
        """Whether the source has names of the classes, and not plain numbers alone."""
        return self.classes is not None or isinstance(self.labels[0], str)

    def encode(self, classes: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
        """Int64 labels (N,) and class names, in the order of `classes` if given.

        Raises:
            ValueError: labels are neither whole numbers nor names, or do not fit the classes.
        """
        kinds = {type(label) for label in self.labels}
        if kinds == {str}:
            names = tuple(sorted(set(map(str, self.labels))))
            position = {label: number for number, label in enumerate(names)}
            labels = torch.tensor([position[str(label)] for label in self.labels])
        elif kinds == {int}:
            labels = torch.tensor(self.labels)
            names = self.classes or classes or tuple(map(str, range(int(labels.max()) + 1)))
        else:
            found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
            raise ValueError(
                f"{self.name} has labels of type {found}; point label_column at whole numbers or class names"
            )
        check_range(labels, len(names), self.name)
        if classes is None or classes == names:
            return labels, names
        unknown = [names[number] for number in labels.unique().tolist() if names[number] not in classes]
        if unknown:
            raise ValueError(
                f"{self.name} has classes that are not among those given; add to classes: {', '.join(unknown)}"
            )
        moved = torch.tensor([classes.index(label) if label in classes else -1 for label in names])
        return moved[labels], classes

    def decode(
        self, indices: list[int], *, size: tuple[int, int] | None, channels: int | None, progress: bool
    ) -> Tensor:
        """The images at `indices` as a uint8 tensor (N, C, H, W).

        Args:
            indices: positions in this split.
            size: (height, width) that images are scaled and centre-cropped to; None keeps their common size.
            channels: 1 for grey, 3 for RGB, or None to keep what the images have.
            progress: show on stderr how far it is.

        Raises:
            ValueError: an image is broken, or images differ in size or colour and nothing says what to do.
        """
        from timm_fsr.utils.progress import progress as shown

        stored = self.pictures.as_wanted(size, channels) if isinstance(self.pictures, ArrayPictures) else None
        images = torch.empty(0, dtype=torch.uint8)
        starts: Iterable[int] = range(0, len(indices), CHUNK)
        if progress:
            starts = shown(starts, len(indices), "decoding images", size=lambda start: min(CHUNK, len(indices) - start))
        for start in starts:
            chunk = indices[start : start + CHUNK]
            if stored is not None:  # a million small images take seconds rather than minutes
                arrays = stored[chunk]
            else:
                pictures = self.read(chunk)
                if start == 0:
                    mode = MODES[channels] if channels else mode_of(pictures)
                self.check_mode(pictures, mode, channels)
                arrays = self._stack([fit(picture, mode, size) for picture in pictures], tuple(images.shape[2:]))
            if start == 0:
                height, width, depth = arrays.shape[1:]
                images = images.new_empty(len(indices), depth, height, width)
            images[start : start + CHUNK] = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        return images

    def read(self, indices: list[int]) -> list[Image.Image]:
        """The pictures at `indices`, as they are stored.

        Raises:
            ValueError: one is broken, missing, or has more than 8 bits per channel.
        """
        try:
            read = self.pictures(indices)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            rows = f"row {indices[0]}" if len(indices) == 1 else f"rows {indices[0]} to {indices[-1]}"
            raise ValueError(
                f"{self.name} has an image that cannot be decoded in {rows} "
                f"({one_line(error)}); fetch the data again or remove that image"
            ) from error
        pictures = [picture for picture in read if picture is not None]
        if len(pictures) < len(read):
            raise ValueError(f"{self.name} has rows without an image; remove them first")
        if any(picture.mode.startswith(("I", "F")) for picture in pictures):
            raise ValueError(f"{self.name} has images of more than 8 bits per channel; convert them to 8 bits first")
        return pictures

    def check_mode(self, pictures: Sequence[Image.Image], mode: str, channels: int | None) -> None:
        """Raise ValueError where `channels` is not given and colour would become grey."""
        if channels is None and mode != mode_of(pictures) == "RGB":
            raise ValueError(f"{self.name} has grey and colour images; use channels=3 or channels=1 for all")

    def _stack(self, arrays: Sequence[np.ndarray], size: tuple[int, ...]) -> np.ndarray:
        """One array (N, H, W, C) of arrays that have one size, that of those before (none before: `size` is empty)."""
        sizes = {array.shape[:2] for array in arrays} | ({size} if size else set())
        if len(sizes) > 1:
            found = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
            raise ValueError(f"{self.name} has images of different sizes, {found}; use size=(height, width)")
        return np.stack(arrays)


def mode_of(pictures: Sequence[Image.Image]) -> str:
    """The mode that keeps all the colour of `pictures`: "L" (grey) or "RGB"."""
    return "L" if all(picture.mode in GREY_MODES for picture in pictures) else "RGB"


def fit(picture: Image.Image, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """Uint8 array (H, W, C), scaled bicubically with antialiasing and centre-cropped if `size` is given."""
    picture = picture if picture.mode == mode else picture.convert(mode)
    if size is not None and picture.size != size[::-1]:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    return pixels_of(picture)


def pixels_of(picture: Image.Image) -> np.ndarray:
    """Uint8 array (H, W, C) of a grey or RGB picture."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def check_range(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise ValueError unless 0 <= label < `num_classes` for all `labels` of the data set `name`."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name} has labels from {low} to {high} but {num_classes} classes, so labels must be in "
            f"0..{num_classes - 1}; use a split with labels, or give every class a name"
        )


def one_line(error: Exception) -> str:
    """An error of another package, short enough to be quoted in ours."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
