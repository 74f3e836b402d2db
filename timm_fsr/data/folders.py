"""Folders of images: which are splits, which are classes, and which files count."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from timm_fsr.utils import defaults
from timm_fsr.utils.errors import unknown

CLASS_ORDERS = defaults.CLASS_ORDERS

_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "validate", "validating", "valid", "val", "dev"),
    "test": ("test", "testing", "tst"),
}
_MEANING = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_ENDINGS = ("set", "split", "data", "images", "imgs")

# What systems leave in folders: archives of macOS, thumbnails of Synology, bins and the like of others.
_JUNK = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


@dataclass(frozen=True)
class ClassFolders:
    """The images of one split.

    Attributes:
        classes: the names of the class folders, in the order of their labels.
        paths: of the images, class by class.
        labels: one for each path.
        empty: folders without images and what they hold, by name; a class or not.
    """

    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    empty: dict[str, str] = field(default_factory=dict)


def is_junk(name: str) -> bool:
    """Whether a file or folder of that name is no data: hidden ones, `__MACOSX` and others that systems leave."""
    return name.startswith(".") or name.casefold() in _JUNK


def meaning_of(name: str) -> str | None:
    """Which of "train", "validation" and "test" a name like "Training", "val" or "test_set" stands for, if any."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    for ending in _ENDINGS:
        plain = plain.removesuffix(ending) or plain
    return _MEANING.get(plain)


def find_split(split: str, present: Iterable[str], source: str | os.PathLike[str]) -> str:
    """The one of the splits `present` that is called `split`, or else the only one that means the same.

    Args:
        split: as asked for.
        present: names of the splits that there are.
        source: of the data, for messages.

    Raises:
        ValueError: there is none, or several mean the same.
    """
    names = list(dict.fromkeys(present))
    if split in names:
        return split
    wanted = meaning_of(split)
    same = [n for n in names if n.casefold() == split.casefold() or (wanted is not None and meaning_of(n) == wanted)]
    if len(same) == 1:
        return same[0]
    if same:
        raise ValueError(f"{source} has several splits that may be {split!r}: {', '.join(same)}; name one of them")
    raise ValueError(f"{source} has no split {split!r}; use one of: {', '.join(names)}")


def read_class_folders(folder: Path, split: str, class_order: str) -> ClassFolders:
    """The images in `folder[/split]/class/`, at any depth.

    Args:
        folder: of the data; if it holds nothing but one folder with splits in it, as unpacked archives do, that one.
        split: see `find_split`; a folder without splits is "train".
        class_order: see `in_class_order`.

    Raises:
        ValueError: there is no such split, or no image in a class folder.
    """
    root = _root_of(folder, split)
    files = {name: _files_in(root / name) for name in _folders_in(root)}
    endings = set(Image.registered_extensions())
    images = {name: [str(path) for path in found if path.suffix.lower() in endings] for name, found in files.items()}
    classes = in_class_order(images, class_order)
    empty = {name: _content(files[name]) for name in classes if not images[name]}
    if class_order == "timm":  # whose scripts do not count a folder without images
        classes = [name for name in classes if images[name]]
    paths = [(path, label) for label, name in enumerate(classes) for path in images[name]]
    if not paths:
        raise ValueError(
            f"{root} holds neither Parquet nor IDX files nor images in one folder per class; "
            "point the source at a folder with one of these"
        )
    return ClassFolders(tuple(classes), [path for path, _ in paths], [label for _, label in paths], empty)


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


def check_class_order(class_order: str) -> None:
    """Raise ValueError for an order that does not exist."""
    if class_order not in CLASS_ORDERS:
        raise ValueError(unknown("class_order", class_order, list(CLASS_ORDERS)))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Orders as timm's `natural_key` does, where a number begins every second part."""
    parts = re.split(r"(\d+)", name.lower())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _root_of(folder: Path, split: str) -> Path:
    """The folder that holds the class folders of the split."""
    names = _folders_in(folder)
    splits = _splits_in(folder, names, split)
    if not splits and len(names) == 1 and _splits_in(folder / names[0], _folders_in(folder / names[0])):
        return _root_of(folder / names[0], split)
    if splits:
        return folder / find_split(split, splits, folder)
    if names and all(map(meaning_of, names)):
        raise ValueError(
            f"{folder / names[0]} has no class folders: the label of an image is the name of the folder that it is in; "
            "sort the images of each split into one folder per class"
        )
    return folder if split == "train" else folder / find_split(split, ["train"], folder)


def _splits_in(folder: Path, names: Sequence[str], split: str | None = None) -> list[str]:
    """Those of the folders called `names` that are splits; a class may be called "train" too, but holds images."""
    return [name for name in names if (name == split or meaning_of(name)) and _folders_in(folder / name)]


def _folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_junk(entry.name))


def _files_in(folder: Path) -> list[Path]:
    """All files at any depth, in the order of their paths; links to folders are not followed."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not is_junk(name)]
        found += [Path(place, name) for name in names if not is_junk(name)]
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def _content(files: Sequence[Path]) -> str:
    """What a class folder without images holds, such as "2 files of other kinds: .heic"."""
    if not files:
        return "an empty folder"
    kinds = sorted({path.suffix.lower() or "no ending" for path in files})
    return f"{len(files)} file(s) of other kinds: {', '.join(kinds[:5])}"
