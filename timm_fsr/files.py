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


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files replace those of `folder` when the block ends well; else nothing changes.

    Each file is on the disk before the first one is moved, and moves atomically.

    Raises:
        OSError: the files could not be written; the message says that the old ones are untouched.
    """
    target = folder.absolute()
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
        for path in sorted(scratch.iterdir()):
            path.replace(target / path.name)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise _failed(target, number, error) from error
    finally:
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
