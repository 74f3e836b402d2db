"""Where images come from: finds and opens embedded, local and Hub data sets."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from timm_fsr.data.decoding import ArrayPictures, Rows, TablePictures, one_line
from timm_fsr.utils import defaults
from timm_fsr.utils.errors import unknown

if TYPE_CHECKING:
    import datasets

EMBEDDED = defaults.EMBEDDED
"""Name of the data set inside this package: 10,000 train and 2,000 test images of Fashion-MNIST."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
FOLDER_SPLITS = ("train", "validation", "valid", "val", "test")
CLASS_ORDERS = defaults.CLASS_ORDERS
IDX_IMAGES = "-images-idx3-ubyte.gz"
IDX_NAMES = {"test": "t10k"}


def open_rows(
    source: str,
    split: str,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_order: str = "codepoint",
    mapped: bool = False,
) -> Rows:
    """Opens one split of a source; the arguments and errors are those of `timm_fsr.data.dataset.load_data`.

    With `mapped`, a table is mapped from the disk instead of held in memory: see `timm_fsr.data.streaming.stream_data`.
    """
    if class_order not in CLASS_ORDERS:
        raise ValueError(unknown("class_order", class_order, list(CLASS_ORDERS)))
    path = Path(source).expanduser()
    if config is not None and (source == EMBEDDED or path.exists() or glob.has_magic(source)):
        raise ValueError(f"config={config!r} is for data sets of the Hub, and {source} is none; leave it out")
    if path.suffix == ".npz":
        return _npz_rows(path, split)
    if source != EMBEDDED and path.is_dir() and any(path.glob("*" + IDX_IMAGES)):
        return _idx_rows(path, split)
    table = _open_table(source, path, split, config, class_order, mapped)
    return _table_rows(table, f"{source}[{split}]", image_column, label_column)


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
    return Rows(f"{folder}[{split}]", numbers.tolist(), None, ArrayPictures(pixels[..., None]))


def _npz_rows(path: Path, split: str) -> Rows:
    """Rows of a NumPy archive with the arrays "image" and "label", as generated CIFAR images are published."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path and the working directory")
    if split not in ("train", _split_of(path)):
        raise _unknown_split(path, split, sorted({"train", _split_of(path)}))
    needed = "save it with numpy.savez(path, image=images, label=labels)"
    try:
        with path.open("rb") as file:  # numpy leaves a broken file open that it has opened itself
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array")
            found = {key: archive[key] for key in ("image", "label") if key in archive.files}
            names = ", ".join(archive.files)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is no complete NumPy archive of plain arrays ({one_line(error)}); fetch it again, or {needed}"
        ) from error
    if len(found) < 2:
        raise ValueError(f"{path} has the arrays {names or 'none'} but 'image' and 'label' are needed; {needed}")
    images, labels = found["image"], found["label"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{path} has an array 'image' of {images.dtype} with shape {found['image'].shape}; it must be uint8 with "
            "shape (N, H, W, 3), or (N, H, W) for grey, and values from 0 to 255"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} has an array 'label' of {labels.dtype} with shape {labels.shape}; it must hold one whole number "
            f"for each of {len(images)} images"
        )
    return Rows(f"{path}[{split}]", labels.tolist(), None, ArrayPictures(images))


def _open_table(
    source: str, path: Path, split: str, config: str | None, class_order: str, mapped: bool
) -> datasets.Dataset:
    if source == EMBEDDED:
        return _embedded(split)
    if is_image_folder(source):
        return _image_folder(path, split, class_order)
    if path.exists() or glob.has_magic(source):
        return _read_parquet(_parquet_files(path, split), source, mapped=mapped)
    return _hub(source, split, config)


def _embedded(split: str) -> datasets.Dataset:
    folder = resources.files(__package__) / "embedded" / EMBEDDED
    with resources.as_file(folder / f"{split}.parquet") as path:
        if not path.exists():
            raise _unknown_split(EMBEDDED, split, ("train", "test"))
        return _read_parquet([path], EMBEDDED)


def is_image_folder(source: str) -> bool:
    """Whether the source is a folder of images, whose classes are folders in it."""
    path = Path(source).expanduser()
    return source != EMBEDDED and path.is_dir() and not any(path.glob("*" + IDX_IMAGES)) and not _parquet_in(path)


def in_class_order(names: Iterable[str], class_order: str) -> list[str]:
    """Class folders in the order of their labels.

    Args:
        names: of the folders.
        class_order: "codepoint" sorts names as Python does (Zebra, apple, class10, class9), "timm" as timm's own
            scripts do: naturally, upper and lower case alike (apple, class9, class10, Zebra).
    """
    return sorted(sorted(names), key=_natural if class_order == "timm" else str)


def other_class_order(classes: Sequence[str], class_order: str) -> tuple[str, list[str]] | None:
    """The name of the other order and the classes in it; None if both orders are the same."""
    other = next(name for name in CLASS_ORDERS if name != class_order)
    found = in_class_order(classes, other)
    return None if found == list(classes) else (other, found)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Orders as timm's `natural_key` does, where a number begins every second part."""
    parts = re.split(r"(\d+)", name.lower())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _image_folder(folder: Path, split: str, class_order: str) -> datasets.Dataset:
    """A table of the image paths in `folder[/split]/class/`, whose classes are the sorted folder names."""
    import datasets

    root = folder / split
    if not root.is_dir():
        splits = [name for name in FOLDER_SPLITS if (folder / name).is_dir()]
        if splits or split != "train":
            raise _unknown_split(folder, split, splits or ("train",))
        root = folder
    found = (entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = in_class_order(found, class_order)
    endings = set(Image.registered_extensions())
    files = {
        name: [str(path) for path in sorted((root / name).rglob("*")) if path.suffix.lower() in endings]
        for name in classes
    }
    if class_order == "timm":  # whose scripts do not count a folder without images
        classes = [name for name in classes if files[name]]
    paths = [(path, label) for label, name in enumerate(classes) for path in files[name]]
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


def _read_parquet(files: Sequence[Path], source: str, *, mapped: bool = False) -> datasets.Dataset:
    """One table in memory, or mapped from an Arrow copy of the files.

    A row in the middle of a Parquet file cannot be read without its whole row group, often thousands of images, so
    that reading images one by one needs the copy, which `datasets` makes once in its cache.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [str(file) for file in files]
    try:
        if mapped:
            return datasets.Dataset.from_parquet([glob.escape(name) for name in names])
        return datasets.Dataset(pq.read_table(names, partitioning=None))
    except (pa.ArrowException, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"{source} has a broken Parquet file ({one_line(error)}); fetch it again or remove it"
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
            f"{source} is neither a path here nor a data set that the Hub gives ({one_line(error)}); "
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
    return Rows(where, table[label][:], tuple(names) if names else None, TablePictures(encoded, image))


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
