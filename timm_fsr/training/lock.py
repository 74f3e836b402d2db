"""One run for each output folder: a lock file says which process has it, and counts for as long as that lives."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_fsr.utils.distributed import from_main

LOCK = "run.lock"
_ATTEMPTS = 10  # to take a stale lock away while others try the same


class FolderInUseError(FileExistsError):
    """Another process has a folder.

    Attributes:
        path: of its lock.
        holder: which process that is, and since when.
    """

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self.path, self._known = path, holder
        self.holder = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
        super().__init__(
            f"a run is going on in {path.parent}: {self.holder}; wait for its end, or choose another folder with "
            f"--output. If that process is gone for certain, delete {path}"
        )

    def __reduce__(self) -> tuple[type[FolderInUseError], tuple[Path, dict[str, Any]]]:
        return type(self), (self.path, self._known)  # the main process sends it to the others


@contextmanager
def reserved(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Within it the folder belongs to this run; the main process holds the lock for all of them.

    Raises:
        FolderInUseError: another run has the folder; on every process.
        OSError: the folder cannot be made, or is not writable.
    """
    with ExitStack() as undo:
        from_main(accelerator, lambda: undo.enter_context(locked(folder)))
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if necessary, and hold its lock; a folder that stays empty is removed again.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be made, or is not writable.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LOCK, _ours()
    try:
        _take(path, own)
        try:
            yield
        finally:
            if _read(path) == own:
                path.unlink(missing_ok=True)
    finally:
        for empty in made:
            with suppress(OSError):  # it is not empty
                empty.rmdir()


def check_unlocked(folder: Path) -> None:
    """Raise FolderInUseError if another process trains into the folder now."""
    holder = _holder(folder)
    if holder is not None:
        raise FolderInUseError(folder / LOCK, holder)


def is_locked(folder: Path) -> bool:
    """Whether a process works in the folder now."""
    return _holder(folder) is not None


def _holder(folder: Path) -> dict[str, Any] | None:
    holder = _read(folder / LOCK)
    return None if holder is None or _is_stale(holder) else holder


def _take(path: Path, own: dict[str, Any]) -> None:
    """Write the lock file, whole and only where there is none, or a stale one."""
    with tempfile.NamedTemporaryFile("w", prefix=".lock-", dir=path.parent, encoding="utf-8") as file:
        file.write(json.dumps(own))
        file.flush()
        for _ in range(_ATTEMPTS):
            try:
                _link(Path(file.name), path, own)
            except FileExistsError:
                holder = _read(path)
                if holder is not None and not _is_stale(holder):
                    raise FolderInUseError(path, holder) from None
                _remove(path, holder)
            else:
                return
    raise FileExistsError(f"{path} comes back whenever it is removed; do other runs start in {path.parent} right now?")


def _link(written: Path, path: Path, own: dict[str, Any]) -> None:
    """Give what is written the name `path`, unless that exists; FileExistsError then."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(own))


def _remove(path: Path, holder: dict[str, Any] | None) -> None:
    """Remove a stale lock, but not one that somebody else has put there in the meantime."""
    aside = path.with_name(f".stale-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(FileNotFoundError):  # others were faster
        path.rename(aside)
        if _read(aside) != holder:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; {} for what no run has written, None where there is no lock."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _ours() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "born": _born(os.getpid()),
        "number": time.monotonic_ns(),
    }


def _is_stale(holder: dict[str, Any]) -> bool:
    """Whether the process is gone; unknown for another machine, where it counts as alive."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return True  # half written, on a disk that was full
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is somebody else's, and alive
        pass
    return holder.get("born") != _born(pid)  # another process has got its number


def _born(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]
