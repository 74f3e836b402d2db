"""One run for each output folder, whoever else would like to have it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import before_step, contents, metrics, tiny

from timm_fsr.cli.demo import run_demo
from timm_fsr.training.lock import LOCK, locked
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train

SHORT = ("--optim.epochs=1", "--data.limit_train=60", "--evaluation.attacks=[]")


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that has the lock of `tmp_path / "run"`."""
    code = (
        "import pathlib, sys, time; from timm_fsr.training.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")])
    while not (tmp_path / "run" / LOCK).exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("flags", [(), ("--resume=true",), ("--overwrite=true",)], ids=str)
def test_a_second_run_is_refused_and_touches_nothing(tmp_path: Path, holder: Any, flags: tuple[str, ...]) -> None:
    before = contents(tmp_path / "run")
    message = rf"a run is going on in .*run: process {holder.pid} on {socket.gethostname()}, since .*--output"
    with pytest.raises(FileExistsError, match=message):
        train(tiny(tmp_path / "run", *flags))
    assert contents(tmp_path / "run") == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    train(tiny(tmp_path / "run", *SHORT))  # the lock is stale now
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_threads_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Exception] = []

    def second() -> None:
        try:
            train(tiny(tmp_path, *SHORT, "--seed=1"))
        except Exception as error:
            caught.append(error)

    def step() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        before_step(patch, 0, step)
        with pytest.raises(ZeroDivisionError):
            train(tiny(tmp_path, *SHORT))
    assert isinstance(caught[0], FileExistsError)
    assert not (tmp_path / LOCK).exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    train(tiny(tmp_path, *SHORT, "--resume=true"))
    assert len(metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    "lock",
    [
        "",
        "nonsense",
        "[]",
        json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "born": "1"}),  # the number was used again
    ],
    ids=["empty", "nonsense", "a list", "another process"],
)
def test_a_stale_lock_counts_for_nothing(tmp_path: Path, lock: str) -> None:
    (tmp_path / LOCK).write_text(lock)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_counts(tmp_path: Path) -> None:
    lock = json.dumps({"pid": 1, "host": "elsewhere", "started": "yesterday"})
    (tmp_path / LOCK).write_text(lock)
    with pytest.raises(FileExistsError, match=r"process 1 on elsewhere, since yesterday; .* delete .*run\.lock"):
        train(tiny(tmp_path))
    assert (tmp_path / LOCK).read_text() == lock


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()


def _race(folder: Path, wins: Any, start: Any) -> None:
    start.wait()
    try:
        with locked(folder):
            with wins.get_lock():
                wins.value += 1
            time.sleep(2)
    except FileExistsError:
        pass


def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**30, "host": socket.gethostname()}))
    context = multiprocessing.get_context("fork")
    wins, start = context.Value("i", 0), context.Barrier(6)
    processes = [context.Process(target=_race, args=(tmp_path, wins, start)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert wins.value == 1


# Overwriting.


def test_overwrite_works_in_a_recipe_file(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", *SHORT))
    foreign = ["mine.txt", "best/mine.txt", "best/sub/mine.txt", "last/a.ckpt", "checkpoints/mine.pt"]
    foreign += ["checkpoints/step-old/tensors.pt", "evaluation/outcomes/notes.txt", "trackers/mine.txt"]
    for name in foreign:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("precious")
    (tmp_path / "run" / "checkpoints" / "step-000000099").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-000000099" / "tensors.pt").write_text("of a longer run")
    recipe = tiny(tmp_path / "run", *SHORT, "--seed=1", "--overwrite=true")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    train(Recipe.load(tmp_path / "recipe.yaml"))
    assert "seed: 1" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert [name for name in foreign if (tmp_path / "run" / name).read_text() != "precious"] == []
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-0*")] == ["step-000000001"]
    assert len(metrics(tmp_path / "run")) == 1


def test_overwrite_deletes_nothing_that_no_run_has_made(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"which no run here has made .* deletes only what a run has made"):
        train(tiny(tmp_path, "--overwrite=true"))
    assert contents(tmp_path) == {"best/mine.txt": b"precious"}


def test_the_demonstration_keeps_the_rule(tmp_path: Path) -> None:
    (tmp_path / "with_fsr" / "evaluation").mkdir(parents=True)
    (tmp_path / "with_fsr" / "evaluation" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="which no run here has made"):
        run_demo(tmp_path, epochs=1, limit=300)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "attack.png").write_text("precious")
    with pytest.raises(FileExistsError, match="is of no demonstration"):
        run_demo(tmp_path / "other", epochs=1, limit=300)
    assert contents(tmp_path) == {"with_fsr/evaluation/mine.txt": b"precious", "other/attack.png": b"precious"}
