"""Images and labels in memory: loading, choosing, splitting."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_fsr.data.decoding import CHUNK, Rows, check_range, mode_of
from timm_fsr.data.sources import open_rows
from timm_fsr.utils.memory import check_memory
from timm_fsr.utils.random import derive_generator

if TYPE_CHECKING:
    from typing_extensions import Self


class Images(ABC):
    """Images with one label each, held in memory (`ImageData`) or decoded when needed (`StreamedData`).

    Attributes:
        labels: int64 tensor (N,), 0 <= label < len(classes).
        classes: the name of each class.
        name: where the images came from, for logs and reports.
        named: whether `classes` are names; False where the source has plain numbers, which then stand for them.
    """

    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each has an image here."""
        return len(self.classes)

    def __str__(self) -> str:
        channels, height, width = self.image_size
        return f"{self.name}: {len(self)} images of {channels} x {height} x {width} pixels, {self.num_classes} classes"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these images and labels from others."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same data, whose batches are on another device."""

    @abstractmethod
    def take(self, indices: Tensor, *, name: str | None = None) -> Self:
        """The images at `indices`, an int64 tensor (M,), in that order, under the same name or another."""

    def head(self, count: int) -> Self:
        """The first `count` images, or all if there are fewer."""
        return self.take(torch.arange(len(self))[:count])

    def subset(self, count: int, *, seed: int = 0) -> Self:
        """`count` images drawn by `seed`, each class in its share, in their order here.

        Raises:
            ValueError: `count` is not between 1 and the number of images.
        """
        return self if count == len(self) else self.split(count, seed=seed)[1]

    def split(self, held_out: int | float, *, seed: int = 0) -> tuple[Self, Self]:
        """Two disjoint parts (rest, held out), each class in its share in both, in their order here.

        Args:
            held_out: the number of images (int) or the fraction of them (float in (0, 1)) in the second part.
            seed: with the labels the only thing that decides which images are held out.

        Raises:
            ValueError: one part would be empty.
        """
        rest, chosen = _split_indices(self.labels.cpu(), held_out, seed=seed, name=self.name)
        drawn = f"{len(chosen)} of {len(self)}, seed {seed}"
        return (
            self.take(rest, name=f"{self.name} without held-out ({drawn})"),
            self.take(chosen, name=f"{self.name} held-out ({drawn})"),
        )

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Float images (M, C, H, W) in [0, 1] and int64 labels (M,) at `indices`, an int64 tensor (M,)."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels in natural order; the last batch may be smaller."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageData(Images):
    """Images with one label each, held as one uint8 tensor.

    Attributes:
        images: uint8 tensor (N, C, H, W); `batch` and `batches` give it as floats in [0, 1].
        labels: int64 tensor (N,), 0 <= label < len(classes), on the device of `images`.
        classes: the name of each class.
        name: where the images came from, for logs and reports.
        named: whether `classes` are names; False where the source has plain numbers, which then stand for them.
        stored: channels, height and width of the first image before it was scaled and converted, if that is known.

    Raises:
        ValueError: the tensors have other types, shapes or ranges than these.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool = True
    stored: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be a uint8 tensor (N, C, H, W), got {self.images.dtype} with shape "
                f"{tuple(self.images.shape)}; scale to 0..255 and convert with .to(torch.uint8)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be an int64 tensor with one label for each of {len(self.images)} images, got "
                f"{self.labels.dtype} with shape {tuple(self.labels.shape)}; use .long() and match lengths"
            )
        if self.images.numel() == 0:
            raise ValueError(f"{self.name} has no images; check the source, the split and the limit")
        check_range(self.labels, len(self.classes), self.name)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over shape, pixels and labels."""
        return digest_of(tuple(self.images.shape), self.images, self.labels)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor, *, name: str | None = None) -> ImageData:
        """The images at `indices`, an int64 tensor (M,), in that order, under the same name or another."""
        indices = indices.to(self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices], name=name or self.name)

    def head(self, count: int) -> ImageData:
        """The first `count` images, or all if there are fewer; they share memory with these."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Float images (M, C, H, W) in [0, 1] and int64 labels (M,) at `indices`, an int64 tensor (M,)."""
        picked = self.take(indices)
        return picked.images.float().div_(255), picked.labels

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels in natural order; the last batch may be smaller."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield images.float().div_(255), labels


def digest_of(about: object, *tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over a value's repr and the content of tensors."""
    digest = hashlib.sha256(repr(about).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def load_data(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    class_order: str = "codepoint",
    limit: int | None = None,
    progress: bool = True,
) -> ImageData:
    """Reads and decodes one split of an image classification data set.

    Args:
        source: `"fashion_mnist"` (inside this package); a Parquet file, a glob of them or a folder with
            `<split>-*.parquet` or `<split>/*.parquet`; a folder of images `[<split>/]<class>/<image>`; a
            folder of IDX files as MNIST has them; an `.npz` file with arrays "image", uint8 (N, H, W, 3) or
            (N, H, W), and "label", whole numbers (N,); else the id of a data set on the Hub.
        split: `"train"`, `"test"` or another name that the source has. A Parquet file, a glob or an `.npz` file is
            one split: either its name begins with `split`, or `split` is left at the default.
        config: the configuration, for a Hub data set with several.
        image_column: the column with images; found by its usual names if not given.
        label_column: the column with labels; found by its usual names if not given.
        classes: class names in label order, to make a test split agree with its train split.
        size: (height, width), or both in one number, that images are scaled (bicubic) and centre-cropped to.
        channels: 1 for grey or 3 for RGB; whichever the images have if not given.
        class_order: how class folders are numbered where `classes` does not say: "codepoint" (Zebra, apple, class10,
            class9), or "timm" as timm's own scripts do (apple, class9, class10, Zebra).
        limit: the largest number of images to decode, each class in its share and always the same ones.
        progress: show on stderr how far it is.

    Returns:
        The split on the CPU, in its stored order.

    Raises:
        FileNotFoundError: the path does not exist (one that could be a Hub id, "a/b", is looked for there: ValueError).
        ValueError: the source, split, column, label or image cannot be read; the message says what to change.
    """
    box = (size, size) if isinstance(size, int) else size
    check_format(box, channels)
    rows = open_rows(
        os.fspath(source),
        split,
        config=config,
        image_column=image_column,
        label_column=label_column,
        class_order=class_order,
    )
    chosen = choose(rows, tuple(classes) if classes else None, limit)
    first = rows.read(chosen.indices[:1].tolist())
    stored = (1 if mode_of(first) == "L" else 3, first[0].height, first[0].width)
    _check_fits(chosen, (channels or stored[0], *(box or stored[1:])))
    images = rows.decode(chosen.indices.tolist(), size=box, channels=channels, progress=progress)
    return ImageData(images, chosen.labels, chosen.classes, chosen.name, chosen.named, stored)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which rows of a source are used, and how they are labelled.

    Attributes:
        indices: their positions in the source, an int64 tensor (N,) in ascending order.
        labels: int64 tensor (N,).
        classes: the name of each class.
        name: where they come from, for logs and reports.
        named: whether `classes` are names rather than plain numbers.
    """

    indices: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool


def choose(rows: Rows, classes: tuple[str, ...] | None, limit: int | None) -> Chosen:
    """At most `limit` of `rows`, each class in its share and always the same ones, labelled by `classes`.

    Raises:
        ValueError: the limit leaves nothing, or labels and classes do not fit.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no images; use 1 or more, or None for all of them")
    labels, names = rows.encode(classes)
    named = rows.named or classes is not None
    if limit is None or limit >= len(labels):
        return Chosen(torch.arange(len(labels)), labels, names, rows.name, named)
    indices = _stratified(labels, limit, seed=0)
    return Chosen(indices, labels[indices], names, f"{rows.name} limited to {limit}", named)


def check_format(size: tuple[int, int] | None, channels: int | None) -> None:
    """Raise ValueError for a (height, width) or a number of channels that no image can have."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels} is neither 1 (grey) nor 3 (RGB); leave it out to keep what images have")
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} is no image size; use (height, width) of 1 or more, or None to keep it")


def _check_fits(chosen: Chosen, image_size: tuple[int, int, int]) -> None:
    """Refuse images that the memory cannot hold: all of them decoded, and the pictures of one chunk."""
    channels, height, width = image_size
    count = len(chosen.indices)
    check_memory(
        (count + min(count, CHUNK)) * channels * height * width,
        f"{count} images of {channels}x{height}x{width} pixels ({chosen.name})",
        "choose a smaller size or a limit, or let a recipe decode them as they are needed (data.streamed=true)",
    )


def _split_indices(labels: Tensor, held_out: int | float, *, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Ascending positions (rest, held out) in `labels`, as `Images.split` draws them.

    Raises:
        ValueError: one part would be empty.
    """
    count = round(held_out * len(labels)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(labels):
        raise ValueError(
            f"cannot hold out {held_out} of the {len(labels)} images of {name}; "
            f"use a count from 1 to {len(labels) - 1} or a fraction between 0 and 1"
        )
    chosen = _stratified(labels, count, seed)
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, chosen, False).nonzero().flatten()
    return rest, chosen


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` sorted positions in `labels`, each class within one of its exact share."""
    totals = labels.bincount()
    share = totals * count
    quotas = share // len(labels)
    missing = count - int(quotas.sum())
    quotas[(share % len(labels)).argsort(descending=True, stable=True)[:missing]] += 1
    shuffled = torch.randperm(len(labels), generator=derive_generator(seed, 0, 0, 0, stream="split"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    place = torch.arange(len(labels)) - (totals.cumsum(0) - totals).repeat_interleave(totals)
    return by_class[place < quotas.repeat_interleave(totals)].sort().values
