"""Where images come from: finds and opens embedded, local and Hub data sets."""

from __future__ import annotations

import difflib
import glob
import gzip
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timm_fsr.data.decoding import ArrayPictures, Rows, TablePictures, one_line
from timm_fsr.data.folders import check_class_order, find_split, is_junk, meaning_of, read_class_folders
from timm_fsr.utils import defaults

if TYPE_CHECKING:
    import datasets

EMBEDDED = defaults.EMBEDDED
"""Name of the data set inside this package: 10,000 train and 2,000 test images of Fashion-MNIST."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
IDX_IMAGES = "-images-idx3-ubyte.gz"
IDX_NAMES = {"train": "train", "test": "t10k"}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


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
    check_class_order(class_order)
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _npz_rows(path, split)
    if source != EMBEDDED and path.is_dir() and _has_idx(path):
        return _idx_rows(path, split)
    if is_image_folder(source):
        return _folder_rows(path, f"{source}[{split}]", split, class_order)
    table = _open_table(source, path, split, config, mapped)
    return _table_rows(table, f"{source}[{split}]", image_column, label_column)


def _idx_rows(folder: Path, split: str) -> Rows:
    """Rows of a folder of gzipped IDX files as MNIST has them, whose test split is called t10k."""
    present = [name for name, file in IDX_NAMES.items() if (folder / f"{file}{IDX_IMAGES}").exists()]
    others = [path.name.removesuffix(IDX_IMAGES) for path in _seen(folder.glob("*" + IDX_IMAGES))]
    found = find_split(split, [*present, *(name for name in others if name not in IDX_NAMES.values())], folder)
    images = folder / f"{IDX_NAMES.get(found, found)}{IDX_IMAGES}"
    labels = Path(str(images).replace("-images-idx3-", "-labels-idx1-"))
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
        find_split(split, sorted({"train", _split_of(path)}), path)
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


def _open_table(source: str, path: Path, split: str, config: str | None, mapped: bool) -> datasets.Dataset:
    if source == EMBEDDED:
        return _embedded(split)
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise ValueError(f"{path} is an archive; unpack it, and point the source at the folder")
    if path.exists() or glob.has_magic(source):
        return _read_parquet(_parquet_files(path, split), source, mapped=mapped)
    return _hub(source, split, config)


def _embedded(split: str) -> datasets.Dataset:
    folder = resources.files(__package__) / "embedded" / EMBEDDED
    with resources.as_file(folder / f"{find_split(split, ('train', 'test'), EMBEDDED)}.parquet") as path:
        return _read_parquet([path], EMBEDDED)


def is_image_folder(source: str) -> bool:
    """Whether the source is a folder of images, whose classes are folders in it."""
    path = Path(source).expanduser()
    return source != EMBEDDED and path.is_dir() and not _has_idx(path) and not _parquet_in(path)


def _folder_rows(folder: Path, name: str, split: str, class_order: str) -> Rows:
    """Rows of the images in `folder[/split]/class/`, which stay where they lie."""
    import datasets

    found = read_class_folders(folder, split, class_order)
    table = datasets.Dataset.from_dict({"image": found.paths}, features=datasets.Features({"image": datasets.Image()}))
    return Rows(name, found.labels, found.classes, TablePictures.of(table, "image"), empty=found.empty)


def _parquet_files(path: Path, split: str) -> list[Path]:
    """The Parquet files of a split; a file or a glob is taken for the default split whatever its name."""
    if path.is_dir():
        files = _parquet_in(path)
    else:
        files = [path] if path.exists() else [Path(found) for found in sorted(glob.glob(str(path)))]
    if not files:
        raise FileNotFoundError(f"no file matches {path}; check the pattern and the working directory")
    if split == "train" and not path.is_dir():
        return files
    found = find_split(split, sorted({_split_of(file) for file in files}), path)
    return [file for file in files if _split_of(file) == found]


def _parquet_in(folder: Path) -> list[Path]:
    """Not searched deeper, for a folder of images may hold a million files."""
    return sorted(_seen([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")], folder))


def _has_idx(folder: Path) -> bool:
    return bool(_seen(folder.glob("*" + IDX_IMAGES)))


def _seen(paths: Iterable[Path], folder: Path | None = None) -> list[Path]:
    """Those that are no junk, by their own names or by those of the folders between `folder` and them."""
    return [path for path in paths if not any(map(is_junk, path.relative_to(folder).parts if folder else (path.name,)))]


def _split_of(file: Path) -> str:
    """The split in a name like `train-00000-of-00001.parquet` or `train/0000.parquet`."""
    first = file.stem.split("-")[0]
    own = not first.isdecimal() and (meaning_of(first) or not meaning_of(file.parent.name))
    return first if own else file.parent.name


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
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(source, error) from error
    found = find_split(split, splits, source)
    try:
        return datasets.load_dataset(source, config, split=found)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"{source} is neither a path here nor a data set that the Hub gives ({one_line(error)}); "
        f"check the name, the config and the network, or use the embedded {EMBEDDED!r}"
    )


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
    names = getattr(table.features[label], "names", None)
    return Rows(where, table[label][:], tuple(names) if names else None, TablePictures.of(table, image))


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
