"""The images of one split, not decoded yet: their labels, and the pixels of those that are asked for."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from timm_fsr.utils.memory import check_memory

if TYPE_CHECKING:
    import datasets

MODES = {1: "L", 3: "RGB"}
GREY_MODES = ("1", "L", "LA")
SHOWN = 20  # broken images that a message names
_GAPS = 10  # numbers without an image that may still be classes
CHUNK = 128  # images decoded at once: photographs of full size then stay within a few hundred MB


class BrokenImagesError(ValueError):
    """Images that cannot be used.

    Args:
        found: which and why, as a sentence without its full stop.
        remedy: how to go on without them, in the words of the interface in use.
    """

    def __init__(self, found: str, remedy: str = "set on_error='skip' to go on without such images") -> None:
        super().__init__(f"{found}; replace them, or {remedy}")
        self.found, self.remedy = found, remedy

    def __reduce__(self) -> tuple[type[BrokenImagesError], tuple[str, str]]:
        return type(self), (self.found, self.remedy)


class MixedSizesError(ValueError):
    """Images of different sizes where nothing says which they should get."""


@dataclass(frozen=True, eq=False)
class TablePictures:
    """Reads pictures from a table of `datasets`, whose `column` has the feature Image; picklable, as workers need."""

    table: datasets.Dataset
    column: str

    @classmethod
    def of(cls, table: datasets.Dataset, column: str) -> TablePictures:
        """The pictures of a table of several columns."""
        import datasets

        return cls(table.select_columns(column).cast_column(column, datasets.Image(decode=False)), column)

    def __call__(self, rows: list[int]) -> Sequence[Image.Image | None]:
        """The decoded pictures at `rows`, None where the table has none."""
        import datasets

        decode = datasets.Image().decode_example
        return [None if cell is None else decode(_in_memory(cell)) for cell in self.table[rows][self.column]]

    def places(self, rows: list[int]) -> list[str]:
        """Where each is, for messages: the path of its file, or its row and the name that it has there."""
        found = []
        for row, cell in zip(rows, self.table[rows][self.column], strict=True):
            name = (cell or {}).get("path")
            stored = cell is None or cell.get("bytes") is not None
            found.append(f"row {row}" + (f" ({name})" if name else "") if stored or not name else name)
        return found


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
class ModelCrop:
    """How timm scales and crops images for a model.

    Attributes:
        share: of the scaled image's side that is kept, timm's `crop_pct`, in (0, 1].
        mode: timm's `crop_mode`: "center", "squash" or "border".
        interpolation: such as "bicubic".
        fill: of a border, one value in [0, 1] for each channel.
    """

    share: float
    mode: str = "center"
    interpolation: str = "bicubic"
    fill: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"crop_pct {self.share:g}, {self.mode}, {self.interpolation}"

    def __call__(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """A grey or RGB picture of (height, width) `size`, with the pixels that timm's own scripts see."""
        transform = _timm_transform(self, size, self.fill or (0.0,) * len(picture.getbands()))
        pixels: np.ndarray = np.asarray(transform(picture))
        return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


@functools.lru_cache(maxsize=8)  # to build one takes as long as to scale a small picture
def _timm_transform(crop: ModelCrop, size: tuple[int, int], fill: tuple[float, ...]) -> Callable[[Image.Image], Any]:
    from timm.data.transforms_factory import transforms_imagenet_eval

    transform: Callable[[Image.Image], Any] = transforms_imagenet_eval(
        size, crop_pct=crop.share, crop_mode=crop.mode, interpolation=crop.interpolation, mean=fill, use_prefetcher=True
    )
    return transform


WHOLE = ModelCrop(share=1.0)
"""How images are scaled and cropped for models that are trained here; their saved configuration tells timm the same."""


@dataclass(frozen=True)
class Rows:
    """Images of one split, not decoded yet.

    Attributes:
        name: the source and the split, for errors and reports.
        labels: one per image, a number or a class name.
        classes: the names that numbers stand for, if the source has them.
        pictures: reads the images at the given positions.
        empty: what class folders without images hold, by their names.
    """

    name: str
    labels: list[int] | list[str]
    classes: tuple[str, ...] | None
    pictures: Callable[[list[int]], Sequence[Image.Image | None]]
    empty: Mapping[str, str] = field(default_factory=dict)

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
            names = self.classes or _number_names(labels, classes)
            if self.classes is None and names != _up_to(len(names)):
                labels = _by_number(labels, names)
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
        self,
        indices: list[int],
        *,
        size: tuple[int, int] | None,
        channels: int | None,
        progress: bool,
        mixed_size: tuple[int, int] | None = None,
        crop: ModelCrop | None = None,
        skip: bool = False,
    ) -> Decoded:
        """The images at `indices`.

        Args:
            indices: positions in this split.
            size: (height, width) that images are scaled and centre-cropped to; None keeps their common size.
            channels: 1 for grey, 3 for RGB, or None to keep what the images have.
            progress: show on stderr how far it is.
            mixed_size: the size that all get if `size` is None and they have none in common.
            crop: how they get their size, in place of scaling and centre-cropping.
            skip: leave out images that cannot be used.

        Raises:
            BrokenImagesError: images cannot be used, or none of them can; all of them are named together.
            ValueError: images differ in size or colour and nothing says what to do.
        """
        if isinstance(self.pictures, ArrayPictures):
            stored = self.pictures.as_wanted(size, channels)
            if stored is not None:  # a million small images take seconds rather than minutes
                height, width, depth = stored.shape[1:]
                self._check_fits(len(indices), (depth, height, width))
                return _from_array(stored, indices, progress)
        try:
            return self._decode(indices, size, channels, progress, crop, skip)
        except MixedSizesError:
            if mixed_size is None:
                raise
            return self._decode(indices, mixed_size, channels, progress, crop, skip)

    def _decode(
        self,
        indices: list[int],
        size: tuple[int, int] | None,
        channels: int | None,
        progress: bool,
        crop: ModelCrop | None,
        skip: bool,
    ) -> Decoded:
        images, kept, sizes = torch.empty(0, dtype=torch.uint8), list[int](), Sizes()
        broken: dict[int, str] = {}
        first: tuple[int, int, int] | None = None
        for start in chunk_starts(len(indices), "decoding images", progress):
            chunk = indices[start : start + CHUNK]
            read, reasons = self.attempt(chunk)
            broken |= reasons
            pictures = [picture for picture in read if picture is not None]
            if not pictures or (broken and not skip):  # the others are still looked at, to name all that are broken
                continue
            if first is None:
                mode = MODES[channels] if channels else mode_of(pictures)
                first = (1 if mode_of(pictures[:1]) == "L" else 3, pictures[0].height, pictures[0].width)
            self.check_mode(pictures, mode, channels)
            sizes.add(pictures)
            if not kept and (size is not None or not sizes.mixed):
                self._check_fits(len(indices), (1 if mode == "L" else 3, *(size or first[1:])))
            arrays = self._stack([fit(picture, mode, size, crop) for picture in pictures], tuple(images.shape[2:]))
            if not kept:
                height, width, depth = arrays.shape[1:]
                images = images.new_empty(len(indices), depth, height, width)
            images[len(kept) : len(kept) + len(arrays)] = torch.from_numpy(arrays).permute(0, 3, 1, 2)
            kept += [start + place for place, picture in enumerate(read) if picture is not None]
        if broken and (not skip or first is None):
            raise self.broken_error(broken)
        assert first is not None
        return Decoded(images[: len(kept)], torch.tensor(kept), first, sizes, broken)

    def attempt(self, indices: list[int]) -> tuple[list[Image.Image | None], dict[int, str]]:
        """The pictures at `indices` as they are stored, None for those that cannot be used, and why by index."""
        try:
            read = list(self.pictures(indices))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if len(indices) == 1:
                unknown = isinstance(error, UnidentifiedImageError)  # its text has a memory address
                return [None], {indices[0]: "not an image" if unknown else one_line(error)}
            parts = [self.attempt([index]) for index in indices]
            return [part[0][0] for part in parts], {key: why for part in parts for key, why in part[1].items()}
        reasons = {index: _why_unusable(picture) for index, picture in zip(indices, read, strict=True)}
        pictures = [None if reasons[index] else picture for index, picture in zip(indices, read, strict=True)]
        return pictures, {index: why for index, why in reasons.items() if why}

    def read(self, indices: list[int]) -> list[Image.Image]:
        """The pictures at `indices`, as they are stored.

        Raises:
            BrokenImagesError: some cannot be used.
        """
        pictures, broken = self.attempt(indices)
        if broken:
            raise self.broken_error(broken)
        return [picture for picture in pictures if picture is not None]

    def broken_error(self, broken: Mapping[int, str]) -> BrokenImagesError:
        """The error that names the images `broken`, by index with the reason."""
        return BrokenImagesError(f"{self.name} has {self.describe_broken(broken)}")

    def describe_broken(self, broken: Mapping[int, str], *, most: int = SHOWN, short: bool = False) -> str:
        """Such as "2 images that cannot be used: a/1.png (not an image), a/2.png (truncated)".

        Args:
            broken: why, by index.
            most: as many are named.
            short: name files by their last two parts, for reports, which may leave this machine.
        """
        rows = list(broken)[:most]
        named = []
        for row, place in zip(rows, self._places(rows), strict=True):
            name = "/".join(Path(place).parts[-2:]) if short and not place.startswith("row ") else place
            named.append(f"{name} ({broken[row].replace(f': {place!r}', '')})")
        more = f" and {len(broken) - most} more" if len(broken) > most else ""
        count = f"{len(broken)} images that cannot" if len(broken) > 1 else "1 image that cannot"
        return f"{count} be used: {', '.join(named)}{more}"

    def _places(self, rows: list[int]) -> list[str]:
        if isinstance(self.pictures, TablePictures):
            return self.pictures.places(rows)
        return [f"row {row}" for row in rows]

    def check_mode(self, pictures: Sequence[Image.Image], mode: str, channels: int | None) -> None:
        """Raise ValueError where `channels` is not given and colour would become grey."""
        if channels is None and mode != mode_of(pictures) == "RGB":
            raise ValueError(f"{self.name} has grey and colour images; use channels=3 or channels=1 for all")

    def _check_fits(self, count: int, image_size: tuple[int, int, int]) -> None:
        """Refuse images that the memory cannot hold: all of them decoded, and the pictures of one chunk."""
        channels, height, width = image_size
        check_memory(
            (count + min(count, CHUNK)) * channels * height * width,
            f"{count} images of {channels}x{height}x{width} pixels ({self.name})",
            "choose a smaller size or a limit, or let a recipe decode them as they are needed (data.streamed=true)",
        )

    def _stack(self, arrays: Sequence[np.ndarray], size: tuple[int, ...]) -> np.ndarray:
        """One array (N, H, W, C) of arrays that have one size, that of those before (none before: `size` is empty)."""
        sizes = {array.shape[:2] for array in arrays} | ({size} if size else set())
        if len(sizes) > 1:
            found = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
            raise MixedSizesError(f"{self.name} has images of different sizes, {found}; use size=(height, width)")
        return np.stack(arrays)


@dataclass
class Sizes:
    """The smallest and the largest of images, by area, as (height, width); None before the first."""

    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def add(self, pictures: Iterable[Image.Image]) -> None:
        """Take note of the sizes of `pictures`."""
        seen = {(picture.height, picture.width) for picture in pictures} | {self.smallest, self.largest} - {None}
        known = sorted((size for size in seen if size), key=lambda size: (size[0] * size[1], size))
        self.smallest, self.largest = known[0], known[-1]

    def __str__(self) -> str:
        return " to ".join(f"{size[0]}x{size[1]}" for size in (self.smallest, self.largest) if size)

    @property
    def mixed(self) -> bool:
        """Whether there were different ones."""
        return self.smallest != self.largest


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images in memory.

    Attributes:
        images: uint8 tensor (N, C, H, W).
        kept: int64 tensor (N,), which of the images asked for they are, by position; all, if none was left out.
        stored: channels, height and width of the first one before it was scaled and converted.
        sizes: of all before they were scaled.
        broken: why others were left out, by index.
    """

    images: Tensor
    kept: Tensor
    stored: tuple[int, int, int]
    sizes: Sizes
    broken: Mapping[int, str] = field(default_factory=dict)


def chunk_starts(count: int, what: str, progress: bool) -> Iterable[int]:
    """Where each chunk of `count` images begins; with `progress`, stderr shows how many of them are done."""
    from timm_fsr.utils.progress import progress as shown

    starts = range(0, count, CHUNK)
    return shown(starts, count, what, size=lambda start: min(CHUNK, count - start)) if progress else starts


def _in_memory(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell of a table with the content of the file that it names: PIL leaves broken files open."""
    path = cell.get("path")
    if cell.get("bytes") is not None or not path or "://" in path:
        return cell
    return {"path": path, "bytes": Path(path).read_bytes()}


def _from_array(pixels: np.ndarray, indices: list[int], progress: bool) -> Decoded:
    """The rows `indices` of a uint8 array (N, H, W, C), unchanged."""
    height, width, depth = pixels.shape[1:]
    images = torch.empty(len(indices), depth, height, width, dtype=torch.uint8)
    for start in chunk_starts(len(indices), "decoding images", progress):
        chunk = indices[start : start + CHUNK]
        images[start : start + CHUNK] = torch.from_numpy(pixels[chunk]).permute(0, 3, 1, 2)
    return Decoded(images, torch.arange(len(indices)), (depth, height, width), Sizes((height, width), (height, width)))


def _why_unusable(picture: Image.Image | None) -> str:
    if picture is None:
        return "the row has no image"
    if picture.mode.startswith(("I", "F")):
        return "more than 8 bits per channel: convert it to 8 bits"
    return ""


def _number_names(labels: Tensor, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of labels that are plain numbers: `classes` if given, else the numbers.

    Those are 0, 1, ... up to the largest label, unless most of them would be classes without an image: then only those
    that occur.
    """
    if classes is not None:
        return classes
    found = labels.unique().tolist()
    count = found[-1] + 1
    sparse = found[0] >= 0 and count >= 2 * len(found) and count > len(found) + _GAPS
    return tuple(map(str, found)) if sparse else _up_to(count)


def _by_number(labels: Tensor, names: tuple[str, ...]) -> Tensor:
    """Labels as positions in `names` where these are their numbers, in ascending order; else as they are."""
    if not all(name.isdecimal() for name in names):
        return labels
    numbers = list(map(int, names))
    place = {number: position for position, number in enumerate(numbers)}
    if numbers != sorted(numbers) or not place.keys() >= set(labels.unique().tolist()):
        return labels
    return torch.tensor([place[label] for label in labels.tolist()])


def _up_to(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def mode_of(pictures: Sequence[Image.Image]) -> str:
    """The mode that keeps all the colour of `pictures`: "L" (grey) or "RGB"."""
    return "L" if all(picture.mode in GREY_MODES for picture in pictures) else "RGB"


def fit(picture: Image.Image, mode: str, size: tuple[int, int] | None, crop: ModelCrop | None = None) -> np.ndarray:
    """Uint8 array (H, W, C) of (height, width) `size` if that is given.

    A picture of another size is scaled bicubically with antialiasing and centre-cropped, to the pixels that timm sees,
    or as `crop` says.
    """
    picture = picture if picture.mode == mode else picture.convert(mode)
    if size is not None and picture.size != size[::-1]:
        picture = (crop or WHOLE)(picture, size)
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
