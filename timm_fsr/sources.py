"""Where images come from: finds, opens and decodes embedded, local and Hub data sets."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import re
import textwrap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    import datasets

EMBEDDED = "fashion_mnist"
"""Name of the data set inside this package: 10,000 train and 2,000 test images of Fashion-MNIST."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
FOLDER_SPLITS = ("train", "validation", "valid", "val", "test")
IDX_IMAGES = "-images-idx3-ubyte.gz"
IDX_NAMES = {"test": "t10k"}
MODES = {1: "L", 3: "RGB"}
GREY_MODES = ("1", "L", "LA")
CHUNK = 128  # images decoded at once: photographs of full size then stay within a few hundred MB


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

    def decode(
        self, indices: list[int], *, size: tuple[int, int] | None, channels: int | None, progress: bool
    ) -> Tensor:
        """The images at `indices` as a uint8 tensor (N, C, H, W).

        Args:
            indices: positions in this split.
            size: (height, width) that images are scaled and centre-cropped to; None keeps their common size.
            channels: 1 for grey, 3 for RGB, or None to keep what the images have.
            progress: show a progress bar on stderr if that is a terminal.

        Raises:
            ValueError: an image is broken, or images differ in size or colour and nothing says what to do.
        """
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hidden = not (progress and console.is_terminal)
        mode = MODES[channels] if channels else None
        images = torch.empty(0, dtype=torch.uint8)
        for start in track(range(0, len(indices), CHUNK), "decoding", console=console, disable=hidden):
            pictures = self._read(indices[start : start + CHUNK])
            mode = mode or _mode_of(pictures)
            if channels is None and mode != _mode_of(pictures) == "RGB":
                raise ValueError(f"{self.name} has grey and colour images; use channels=3 or channels=1 for all")
            arrays = [_pixels(picture, mode, size) for picture in pictures]
            if start == 0:
                height, width, depth = arrays[0].shape
                images = images.new_empty(len(indices), depth, height, width)
            sizes = {array.shape[:2] for array in arrays} | {tuple(images.shape[2:])}
            if len(sizes) > 1:
                found = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
                raise ValueError(f"{self.name} has images of different sizes, {found}; use size=(height, width)")
            images[start : start + CHUNK] = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return images

    def _read(self, indices: list[int]) -> list[Image.Image]:
        try:
            read = self.pictures(indices)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.name} has an image that cannot be decoded in rows {indices[0]} to {indices[-1]} "
                f"({_one_line(error)}); fetch the data again or remove that image"
            ) from error
        pictures = [picture for picture in read if picture is not None]
        if len(pictures) < len(read):
            raise ValueError(f"{self.name} has rows without an image; remove them first")
        if any(picture.mode.startswith(("I", "F")) for picture in pictures):
            raise ValueError(f"{self.name} has images of more than 8 bits per channel; convert them to 8 bits first")
        return pictures


def open_rows(
    source: str,
    split: str,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Rows:
    """Opens one split of a source; the arguments and errors are those of `timm_fsr.data.load_data`."""
    path = Path(source).expanduser()
    if source != EMBEDDED and path.is_dir() and any(path.glob("*" + IDX_IMAGES)):
        return _idx_rows(path, split)
    table = _open_table(source, path, split, config)
    return _table_rows(table, f"{source}[{split}]", image_column, label_column)


def _mode_of(pictures: Sequence[Image.Image]) -> str:
    return "L" if all(picture.mode in GREY_MODES for picture in pictures) else "RGB"


def _pixels(picture: Image.Image, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """Uint8 array (H, W, C), scaled bicubically with antialiasing and centre-cropped if `size` is given."""
    picture = picture if picture.mode == mode else picture.convert(mode)
    if size is not None:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _idx_rows(folder: Path, split: str) -> Rows:
    """Rows of a folder of gzipped IDX files as MNIST has them, whose test split is called t10k."""
    images = folder / f"{IDX_NAMES.get(split, split)}{IDX_IMAGES}"
    labels = Path(str(images).replace("-images-idx3-", "-labels-idx1-"))
    if not images.exists():
        raise _unknown_split(folder, split, ("train", "test"))
    try:
        # A header of 4-byte numbers comes first: magic, count, rows, columns; for labels only the first two.
        raw = gzip.decompress(images.read_bytes())
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(np.frombuffer(raw, ">i4", 4)[1:])
        numbers = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, len(pixels), offset=8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{images} or its labels are not complete IDX files ({error}); fetch them again") from error
    return Rows(
        f"{folder}[{split}]",
        numbers.tolist(),
        None,
        lambda rows: [Image.fromarray(pixels[row]) for row in rows],
    )


def _open_table(source: str, path: Path, split: str, config: str | None) -> datasets.Dataset:
    if source == EMBEDDED:
        return _embedded(split)
    if path.is_dir() and not _parquet_in(path):
        return _image_folder(path, split)
    if path.exists() or glob.has_magic(source):
        return _read_parquet(_parquet_files(path, split), source)
    return _hub(source, split, config)


def _embedded(split: str) -> datasets.Dataset:
    folder = resources.files(__package__) / "embedded" / EMBEDDED
    with resources.as_file(folder / f"{split}.parquet") as path:
        if not path.exists():
            raise _unknown_split(EMBEDDED, split, ("train", "test"))
        return _read_parquet([path], EMBEDDED)


def _image_folder(folder: Path, split: str) -> datasets.Dataset:
    """A table of the image paths in `folder[/split]/class/`, whose classes are the sorted folder names."""
    import datasets

    root = folder / split
    if not root.is_dir():
        splits = [name for name in FOLDER_SPLITS if (folder / name).is_dir()]
        if splits or split != "train":
            raise _unknown_split(folder, split, splits or ("train",))
        root = folder
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    endings = set(Image.registered_extensions())
    paths = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in endings
    ]
    if not paths:
        raise ValueError(
            f"{root} holds neither Parquet nor IDX files nor images in one folder per class; "
            "point the source at a folder with one of these"
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    columns = dict(zip(("image", "label"), map(list, zip(*paths, strict=True)), strict=True))
    return datasets.Dataset.from_dict(columns, features=features)


def _parquet_files(path: Path, split: str) -> list[Path]:
    """The Parquet files of a split; a file or a glob is taken for the default split whatever its name."""
    if path.is_dir():
        files = _parquet_in(path)
    else:
        files = [path] if path.exists() else [Path(found) for found in sorted(glob.glob(str(path)))]
    chosen = [file for file in files if _split_of(file) == split or (split == "train" and not path.is_dir())]
    if not files:
        raise FileNotFoundError(f"no file matches {path}; check the pattern and the working directory")
    if not chosen:
        raise _unknown_split(path, split, sorted({_split_of(file) for file in files}))
    return chosen


def _parquet_in(folder: Path) -> list[Path]:
    """Not searched deeper, for a folder of images may hold a million files."""
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _split_of(file: Path) -> str:
    """The split in a name like `train-00000-of-00001.parquet` or `train/0000.parquet`."""
    first = file.stem.split("-")[0]
    return file.parent.name if first.isdecimal() or file.parent.name in FOLDER_SPLITS else first


def _read_parquet(files: Sequence[Path], source: str) -> datasets.Dataset:
    """One table in memory; `datasets.load_dataset` would leave a copy in the user's cache."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return datasets.Dataset(pq.read_table([str(file) for file in files], partitioning=None))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{source} has a broken Parquet file ({_one_line(error)}); fetch it again or remove it"
        ) from error


def _hub(source: str, split: str, config: str | None) -> datasets.Dataset:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) or source.endswith(".parquet"):
        raise FileNotFoundError(f"there is no file or folder {source}; check the path and the working directory")
    if difflib.get_close_matches(source.lower(), [EMBEDDED], cutoff=0.7):
        raise ValueError(f"there is no data set {source!r}; did you mean {EMBEDDED!r}, the one in this package?")
    import datasets

    try:
        splits = datasets.get_dataset_split_names(source, config)
        if split in splits:
            return datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source} is neither a path here nor a data set that the Hub gives ({_one_line(error)}); "
            f"check the name, the config and the network, or use the embedded {EMBEDDED!r}"
        ) from error
    raise _unknown_split(source, split, splits)


def _table_rows(table: datasets.Dataset, where: str, image: str | None, label: str | None) -> Rows:
    """Rows of a table, whose image column may also hold plain bytes or paths."""
    import datasets

    image = _column(table.column_names, image, IMAGE_COLUMNS, "image", where)
    label = _column(table.column_names, label, LABEL_COLUMNS, "label", where)
    if not isinstance(table.features[image], datasets.Image):
        try:
            table = table.cast_column(image, datasets.Image())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"column {image!r} of {where} holds {table.features[image]} rather than images; "
                f"name another one of {', '.join(table.column_names)} with image_column"
            ) from error
    encoded = table.select_columns(image)
    names = getattr(table.features[label], "names", None)
    return Rows(where, table[label][:], tuple(names) if names else None, lambda rows: encoded[rows][image])


def _column(columns: Sequence[str], given: str | None, usual: Sequence[str], role: str, where: str) -> str:
    """The column `given`, or the only one with a usual name."""
    found = [name for name in (usual if given is None else (given,)) if name in columns]
    if len(found) == 1:
        return found[0]
    if given is not None:
        problem = f"has no column {given!r}"
    else:
        problem = f"has {'several columns' if found else 'no column'} of the usual {role} names {', '.join(usual)}"
    raise ValueError(f"{where} {problem}; set {role}_column to one of its columns: {', '.join(columns)}")


def _unknown_split(source: str | os.PathLike[str], split: str, splits: Sequence[str]) -> ValueError:
    return ValueError(f"{source} has no split {split!r}; use one of: {', '.join(splits)}")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
