"""Checkpoints that a run resumes from: written whole or not at all, rotated, verified by checksum."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_fsr.utils.files import file_digest

_PREFIX, _SCRATCH = "step-", ".writing-"
_DIGITS = 9
_TENSORS, _VALUES, _SUMS = "tensors.pt", "values.json", "checksums.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, each a folder `step-<number>` with a SHA-256 of every file.

    Attributes:
        folder: holds them; made when the first one is saved.
        keep: how many of the newest stay.
    """

    folder: Path
    keep: int = 2

    def save(self, step: int, tensors: dict[str, Any], values: dict[str, Any]) -> Path:
        """Write one; it appears under its name when all of it is on the disk. Older ones are removed afterwards.

        Args:
            step: steps done; names the checkpoint.
            tensors: what `torch.load(weights_only=True)` reads back: tensors, numbers and text in dictionaries.
            values: what JSON holds.

        Raises:
            OSError: it could not be written; the older ones are untouched.
        """
        target = self.folder / f"{_PREFIX}{step:0{_DIGITS}d}"
        scratch = old = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
            torch.save(tensors, scratch / _TENSORS)
            (scratch / _VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")
            sums = {name: file_digest(scratch / name) for name in (_TENSORS, _VALUES)}
            (scratch / _SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for path in (*scratch.iterdir(), scratch):
                _to_disk(path)
            if target.exists():  # a broken one, or the same step before the epoch's end; a folder is not replaced
                old = target.replace(scratch.with_suffix(".old"))
            scratch.replace(target)
            _to_disk(self.folder)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            if old is not None and not target.exists():
                old.replace(target)
            raise OSError(
                getattr(error, "errno", None),
                f"could not write the checkpoint {target} ({error}); the older ones are untouched: free space or check "
                "the permissions, then resume the run",
            ) from error
        finally:
            for path in filter(None, (scratch, old)):
                shutil.rmtree(path, ignore_errors=True)
        self._rotate(target)
        return target

    def load_newest(self, warn: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors (on the CPU) and values of the newest checkpoint that is whole; None if there is no checkpoint.

        Args:
            warn: is told of each broken one that is passed over.

        Raises:
            ValueError: there are checkpoints, but none is whole.
        """
        found = self._all()
        for path in reversed(found):
            problem = _problem(path)
            if problem is None:
                try:
                    tensors = torch.load(path / _TENSORS, map_location="cpu", weights_only=True)
                    return tensors, json.loads((path / _VALUES).read_text(encoding="utf-8"))
                except (pickle.UnpicklingError, RuntimeError, ValueError) as error:  # not written by `save`
                    problem = f"{type(error).__name__}: it holds more than tensors and plain values"
            warn(f"the checkpoint {path} is not whole ({problem}); going back to the one before")
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoint(s) in {self.folder} is whole; start the run again with "
                "--overwrite=true"
            )
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_PREFIX}{'[0-9]' * _DIGITS}") if path.is_dir())

    def _rotate(self, newest: Path) -> None:
        """Keep `newest` and those before it; later ones were broken, or are of a course that was given up."""
        before = [path for path in self._all() if path.name <= newest.name]
        for path in {*self._all()} - {*before[-self.keep :]}:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{_SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(path, ignore_errors=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
        broken = [name for name in (_TENSORS, _VALUES) if sums[name] != file_digest(path / name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{broken[0]} differs from its checksum" if broken else None


def _to_disk(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, survives a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
