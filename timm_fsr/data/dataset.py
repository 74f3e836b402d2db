"""Images and labels in memory: loading, choosing, splitting."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_fsr.data.decoding import ModelCrop, Rows, check_range
from timm_fsr.data.sources import open_rows
from timm_fsr.utils import defaults
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.random import derive_generator

if TYPE_CHECKING:
    from typing_extensions import Self

ON_ERROR = defaults.ON_ERROR
"""What becomes of images that cannot be used."""

_SHOWN = 10  # classes that a sentence names


class Images(ABC):
    """Images with one label each, held in memory (`ImageData`) or decoded when needed (`StreamedData`).

    Attributes:
        labels: int64 tensor (N,), 0 <= label < len(classes).
        classes: the name of each class.
        name: where the images came from, for logs and reports.
        named: whether `classes` are names; False where the source has plain numbers, which then stand for them.
        notes: what a reader has to know of how the images were read, as sentences.
        skipped: how many images of the source were left out because they cannot be used.
        crop: how they were scaled and cropped, if not bicubically and to the centre of the whole.
    """

    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool
    notes: tuple[str, ...]
    skipped: int
    crop: ModelCrop | None

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
        notes: see `Images`, as are the next two.
        skipped: see `notes`.
        crop: see `notes`.

    Raises:
        ValueError: the tensors have other types, shapes or ranges than these.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool = True
    stored: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()
    skipped: int = 0
    crop: ModelCrop | None = None

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
    mixed_size: int | tuple[int, int] | None = None,
    crop: ModelCrop | None = None,
    class_order: str = "codepoint",
    limit: int | None = None,
    on_error: str = "stop",
    progress: bool = True,
) -> ImageData:
    """Reads and decodes one split of an image classification data set.

    Args:
        source: `"fashion_mnist"` (inside this package); a Parquet file, a glob of them or a folder with
            `<split>-*.parquet` or `<split>/*.parquet`; a folder of images `[<split>/]<class>/<image>`; a
            folder of IDX files as MNIST has them; an `.npz` file with arrays "image", uint8 (N, H, W, 3) or
            (N, H, W), and "label", whole numbers (N,); else the id of a data set on the Hub.
        split: `"train"`, `"test"` or another name that the source has. A Parquet file, a glob or an `.npz` file is
            one split: either its name begins with `split`, or `split` is left at the default. Where no split is called
            so, one that means the same is taken: "Training" for "train", "val" for "validation". Hidden files and
            folders, `__MACOSX` and the like are skipped.
        config: the configuration, for a Hub data set with several.
        image_column: the column with images; found by its usual names if not given.
        label_column: the column with labels; found by its usual names if not given.
        classes: class names in label order, to make a test split agree with its train split.
        size: (height, width), or both in one number, that images are scaled (bicubic) and centre-cropped to.
        channels: 1 for grey or 3 for RGB; whichever the images have if not given.
        mixed_size: the size that images get, as by `size`, if that is not given and they are not all of one size.
        crop: how images get that size, in place of scaling and centre-cropping: what
            `timm_fsr.models.description.own_crop` says of a model of timm.
        class_order: how class folders are numbered where `classes` does not say: "codepoint" (Zebra, apple, class10,
            class9), or "timm" as timm's own scripts do (apple, class9, class10, Zebra).
        limit: the largest number of images to decode, each class in its share and always the same ones.
        on_error: what becomes of images that cannot be used, such as broken files: "stop" names all of them in an
            error, "skip" leaves them out and counts them.
        progress: show on stderr how far it is.

    Returns:
        The split on the CPU, in its stored order. Its `notes` say what was left out or changed.

    Raises:
        FileNotFoundError: the path does not exist (one that could be a Hub id, "a/b", is looked for there: ValueError).
        ValueError: the source, split, column, label or image cannot be read; the message says what to change.
    """
    box, mixed_box = box_of(size), box_of(mixed_size)
    check_format(box, channels, on_error)
    rows = open_rows(
        os.fspath(source),
        split,
        config=config,
        image_column=image_column,
        label_column=label_column,
        class_order=class_order,
    )
    chosen = choose(rows, tuple(classes) if classes else None, limit)
    decoded = rows.decode(
        chosen.indices.tolist(),
        size=box,
        channels=channels,
        progress=progress,
        mixed_size=mixed_box,
        crop=crop,
        skip=on_error == "skip",
    )
    notes = [*chosen.notes, *skipped_note(rows, decoded.broken)]
    if decoded.sizes.mixed:
        height, width = decoded.images.shape[2:]
        notes.append(
            f"{rows.name} has images of different sizes, {decoded.sizes}: all were scaled and centre-cropped to "
            f"{height}x{width}"
        )
    return ImageData(
        decoded.images,
        chosen.labels[decoded.kept],
        chosen.classes,
        chosen.name,
        chosen.named,
        decoded.stored,
        tuple(notes),
        len(decoded.broken),
        crop,
    )


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which rows of a source are used, and how they are labelled.

    Attributes:
        indices: their positions in the source, an int64 tensor (N,) in ascending order.
        labels: int64 tensor (N,).
        classes: the name of each class.
        name: where they come from, for logs and reports.
        named: whether `classes` are names rather than plain numbers.
        notes: what a reader has to know of them, as sentences.
    """

    indices: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    named: bool
    notes: tuple[str, ...] = ()


def choose(rows: Rows, classes: tuple[str, ...] | None, limit: int | None) -> Chosen:
    """At most `limit` of `rows`, each class in its share and always the same ones, labelled by `classes`.

    Raises:
        ValueError: the limit leaves nothing, or labels and classes do not fit.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no images; use 1 or more, or None for all of them")
    labels, names = rows.encode(classes)
    named = rows.named or classes is not None
    notes = tuple(_notes_on_classes(rows, labels, names, named=named))
    if limit is None or limit >= len(labels):
        return Chosen(torch.arange(len(labels)), labels, names, rows.name, named, notes)
    indices = _stratified(labels, limit, seed=0)
    return Chosen(indices, labels[indices], names, f"{rows.name} limited to {limit}", named, notes)


def skipped_note(rows: Rows, broken: Mapping[int, str]) -> Iterator[str]:
    """A sentence on images that were left out, by index with the reason, if there are any."""
    if broken:
        yield f"{rows.name} was read without {rows.describe_broken(broken, most=5, short=True)}"


def box_of(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width), which may be given in one number."""
    return (size, size) if isinstance(size, int) else size


def check_format(size: tuple[int, int] | None, channels: int | None, on_error: str = "stop") -> None:
    """Raise ValueError for a (height, width) or a number of channels that no image can have, or an unknown policy."""
    if on_error not in ON_ERROR:
        raise ValueError(unknown("on_error", on_error, list(ON_ERROR)))
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels} is neither 1 (grey) nor 3 (RGB); leave it out to keep what images have")
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} is no image size; use (height, width) of 1 or more, or None to keep it")


def _notes_on_classes(rows: Rows, labels: Tensor, names: tuple[str, ...], *, named: bool) -> Iterator[str]:
    """Sentences on classes without images, and on numbers with gaps that became classes."""
    counts = labels.bincount(minlength=len(names))
    lacking = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if lacking:
        shown = [f"{name!r} ({rows.empty[name]})" if name in rows.empty else repr(name) for name in lacking[:_SHOWN]]
        more = f", ... ({len(lacking)} of {len(names)} classes)" if len(lacking) > _SHOWN else ""
        yield f"{rows.name} has no images of {', '.join(shown)}{more}"
    uncounted = [f"{name!r} ({content})" for name, content in rows.empty.items() if name not in names]
    if uncounted:
        yield f"{rows.name} has folders without images, which were not counted as classes: {', '.join(uncounted)}"
    if not named and names != tuple(map(str, range(len(names)))):
        yield (
            f"the labels of {rows.name} are {len(names)} of the numbers from {names[0]} to {names[-1]}; each of them "
            "became a class of that name"
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
