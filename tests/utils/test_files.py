"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import timm_fsr.utils.files
from timm_fsr.utils.files import staged, write_text


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk; Python ignores the signal and gets EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files of an earlier save and one of somebody else."""
    for name, text in {"a": "old a", "b": "old b", "other": "not ours"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


OLD = {"a": "old a", "b": "old b", "other": "not ours"}


def test_the_files_replace_the_old_ones(folder):
    with staged(folder) as scratch:
        (scratch / "a").write_text("new a")
        (scratch / "c").write_text("new c")
        assert contents(scratch) == {"a": "new a", "c": "new c"}
        assert (folder / "a").read_text() == "old a", "replaced before the block ended"
    assert contents(folder) == {**OLD, "a": "new a", "c": "new c"}


def test_folders_are_made(tmp_path):
    write_text(tmp_path / "x" / "y" / "text", "ünïcode")
    assert (tmp_path / "x" / "y" / "text").read_text(encoding="utf-8") == "ünïcode"
    assert [path.name for path in (tmp_path / "x" / "y").iterdir()] == ["text"]


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("y"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_exception_in_the_middle_changes_nothing_and_passes_unchanged(folder, error):
    def save() -> None:
        with staged(folder) as scratch:
            (scratch / "a").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        save()
    assert caught.value is error
    assert contents(folder) == OLD


def failing_replace(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: BaseException) -> list[str]:
    """Let those calls of `Path.replace` fail whose number `fails` likes; gives the names of what was moved."""
    original, moved, calls = Path.replace, [], itertools.count(1)

    def replace(self: Path, target: Path) -> Path:
        if fails(next(calls)):
            raise error
        moved.append(self.name)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return moved


ENDS = (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(3))


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("links", [True, False])
def test_what_fails_between_two_moves_is_undone(folder, monkeypatch, error, which, links):
    if not links:
        monkeypatch.setattr(
            timm_fsr.utils.files.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no such thing here"))
        )
    failing_replace(monkeypatch, lambda number: number == which, error)

    def save() -> None:
        with staged(folder) as scratch:
            for name in "abc":
                (scratch / name).write_text(f"new {name}")

    with pytest.raises(type(error)):
        save()
    assert contents(folder) == OLD


def test_what_cannot_be_undone_is_kept_and_said(folder, monkeypatch):
    failing_replace(monkeypatch, lambda number: number > 1, OSError(errno.EIO, "Input/output error"))

    def save() -> None:
        with staged(folder) as scratch:
            for name in "ab":
                (scratch / name).write_text(f"new {name}")

    with pytest.raises(OSError, match=r"holds some new files beside old ones .* the old ones lie in") as caught:
        save()
    (old,) = folder.glob(".writing-*/.old-*")
    assert f"the old ones lie in {old}: move them back" in str(caught.value)
    assert (old / "a").read_text() == "old a"


def test_what_describes_the_others_moves_last(folder, monkeypatch):
    moved = failing_replace(monkeypatch, lambda number: False, KeyError())
    with staged(folder) as scratch:
        for name in ("a", "config.json", "model.safetensors"):
            (scratch / name).write_text("new")
    assert moved == ["a", "model.safetensors", "config.json"]


def test_a_full_disk_changes_nothing_and_says_so(folder):
    with file_size_limit(1000), pytest.raises(OSError, match="could not write to") as caught:
        write_text(folder / "a", "x" * 2000)
    assert caught.value.errno == errno.EFBIG
    message = str(caught.value)
    assert str(folder) in message
    assert "what was there before is untouched: free space, check the permissions or choose another" in message
    assert contents(folder) == OLD


def test_a_full_disk_under_safetensors_reads_the_same(folder):
    def save() -> None:
        with staged(folder) as scratch:
            (scratch / "a").write_text("new")
            save_file({"x": zeros(1000)}, scratch / "b")

    with file_size_limit(1000), pytest.raises(OSError, match=r"could not write to .* untouched") as caught:
        save()
    assert caught.value.errno == errno.EFBIG
    assert contents(folder) == OLD


def test_a_disk_that_fills_at_the_very_end_changes_nothing(folder, monkeypatch):
    """Some file systems report a full disk only when the data is forced out."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(timm_fsr.utils.files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(folder / "a", "new")
    assert caught.value.errno == errno.ENOSPC
    assert contents(folder) == OLD


@pytest.mark.parametrize("path", ["a", "a/below"])
def test_a_file_in_place_of_the_folder_is_refused(folder, path):
    with pytest.raises(OSError, match=r"could not write to .* choose another folder"), staged(folder / path):
        pytest.fail("the block must not run")
    assert contents(folder) == OLD


def test_a_folder_that_cannot_be_written_is_refused(folder, monkeypatch):
    """Simulated, for tests may run as root, whom permissions do not stop."""

    def denied(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(timm_fsr.utils.files.tempfile, "mkdtemp", denied)
    with pytest.raises(PermissionError, match=r"Permission denied.*check the permissions"):
        write_text(folder / "a", "new")
    assert contents(folder) == OLD
