"""Writing files whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LAST = "config.json"  # it has the checksum of the weights beside it


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files replace those of `folder` when the block ends well; else nothing changes.

    Each file is on the disk before the first one is moved, and moves atomically. An exception between two moves, Ctrl-C
    included, puts the old files back.

    Raises:
        OSError: the files could not be written; the message says that the old ones are untouched, or where they lie.
    """
    target, keep = folder.absolute(), False
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=target))
    except OSError as error:
        raise _failed(target, error.errno, error) from error
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _move(scratch, target)
    except _NotUndoneError:
        keep = True
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise _failed(target, number, error) from error
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically.

    Raises:
        OSError: see `staged`.
    """
    with staged(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _NotUndoneError(OSError):
    """Old and new files are mixed, and stay so."""


def _move(scratch: Path, target: Path) -> None:
    """Replace the files of `target` by those of `scratch`, all or none.

    The one that describes the others goes last: a crash of the machine then leaves a mixture that it does not fit.
    """
    names = sorted((path.name for path in scratch.iterdir()), key=lambda name: (name == _LAST, name))
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=scratch))
    touched: list[str] = []
    try:
        for name in names:
            if (target / name).exists():
                _keep(target / name, old / name)
            touched.append(name)
            (scratch / name).replace(target / name)
    except BaseException as error:
        try:
            for name in touched:
                if (old / name).exists():
                    (old / name).replace(target / name)
                else:
                    (target / name).unlink(missing_ok=True)
        except BaseException as second:
            raise _NotUndoneError(
                f"{target} holds some new files beside old ones ({error}; undoing it failed: {second}); the old ones "
                f"lie in {old}: move them back, and delete {scratch}"
            ) from error
        raise


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file that is to be replaced; a copy where the file system has none."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _error_number(error: Exception) -> int | None:
    """The system's error number; safetensors wraps a full disk in an exception of its own, which names it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _failed(target: Path, number: int | None, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or error
    return OSError(
        number,
        f"could not write to {target} ({reason}); what was there before is untouched: free space, check the "
        "permissions or choose another folder",
    )
