"""The benchmark scripts, end to end at tiny sizes: that they run and what they write is tested, not the times."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_fsr.training.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "benchmarks"

# The arguments that make each script take seconds.
TINY = {
    "autoattack_speed": "--images 3 --eps 0.5",
    "data_loading": "--rounds 1 --limit 64 --batch 16 --demo-batch 4 --large-batch 1 --large-steps 1",
    "overhead": "--rounds 1 --models resnet_tiny_cifar test_vit --layers fsr --batch 2 --attack-steps 1 "
    "--image-size 64",
    "scaling": "--parts costs --rounds 1 --attack-steps 1 2 --image-sizes 8 16 --sites 0 1 --batches 2 4",
    "profile_step": "--model resnet_tiny_cifar --batch 2 --steps 1 --rounds 1",
    "startup": "--rounds 1 --warmup 0 --models resnet_tiny_cifar --more-layers 1",
    "waiting_threads": "--rounds 1 --steps 1 --threads 1",
    "training_step": "--model resnet_tiny_cifar --batch 2 --steps 1 --rounds 1 --no-memory",
}

# Those whose child processes differ in the environment's settings alone: one pass of their code will do.
SETTINGS_ALONE = {"waiting_threads"}

# What the scripts share, and those without a tiny mode.
OTHERS = {"side_by_side", "architectures", "make_embedded_fashion_mnist"}

SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)


def run(script: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script as `python benchmarks/<script>.py` does, and return what it wrote."""
    path, written = FOLDER / f"{script}.py", folder / "figures.json"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--json", str(written)])
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if script in SETTINGS_ALONE:
        monkeypatch.setattr(subprocess, "run", functools.partial(run_here, subprocess.run, {}))
    runpy.run_path(str(path), run_name="__main__")
    return json.loads(written.read_text())


def run_here(start: Any, done: dict[Any, Any], command: list[str], **options: Any) -> Any:
    """Run `python -c CODE ...` in this process, the same code once: a start takes seconds, and gives no other figure.

    Args:
        start: `subprocess.run`, for all other commands.
        done: what was run, with its result.
        command: see `subprocess.run`, as are the options.
    """
    if command[:2] != [sys.executable, "-c"]:
        return start(command, **options)
    if (key := tuple(command)) not in done:
        threads, output = torch.get_num_threads(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", ["-c", *command[3:]])
            exec(compile(command[2], "child", "exec"), {"__name__": "__main__"})
        torch.set_num_threads(threads)
        done[key] = subprocess.CompletedProcess(command, 0, output.getvalue(), "")
    return done[key]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_says_where_its_figures_come_from(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script in TINY, f"give {script}.py its tiny arguments in this test's table"
    figures = run(script, TINY[script].split(), tmp_path, monkeypatch)
    assert {"command", "commit", "machine", "versions"} < figures.keys()
    assert figures["command"].startswith(f"python benchmarks/{script}.py --")
    assert str(tmp_path) not in json.dumps(figures)
    assert figures["versions"]["torch"] == importlib.metadata.version("torch")
    assert "| --- |" in capsys.readouterr().out


def test_every_entry_of_the_table_is_a_script() -> None:
    assert set(SCRIPTS) >= TINY.keys()


def test_fsr_s_flops_are_those_of_its_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of three 3x3 convolutions, on the last feature map: 64 channels of 8x8 for images of 64x64."""
    figures = run("overhead", TINY["overhead"].split(), tmp_path, monkeypatch)
    variants = figures["networks"]["resnet_tiny_cifar"]["variants"]
    pixels, channels, hidden = (64 // 8) ** 2, 64, 64
    convolutions = 2 * 9 * (channels * hidden + hidden * hidden + hidden * channels)
    assert variants["fsr"]["flops"] - variants["plain"]["flops"] == 2 * pixels * convolutions


def test_scaling_compares_epochs_of_one_and_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launches are recorded here: they would take a minute, and end_to_end/test_accelerate_configs.py has them."""
    seconds = {("one_cpu", 8): 2.0, ("two_cpu_processes", 8): 1.25, ("two_cpu_processes", 16): 2.5}

    def launch(command: list[str], *, env: dict[str, str] | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        if env is None:  # git, for the commit
            return subprocess.CompletedProcess(command, 0, "abc", "")
        script = command.index(str(FOLDER.parent / "recipes" / "train.py"))
        config = Path(command[script - 1])
        recipe = Recipe.load(command[script + 2], command[script + 3 :])
        recipe.check()
        assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "")
        assert recipe.data.limit_train == 4 * recipe.optim.batch_size + recipe.data.held_out
        epochs = (100.0, seconds[config.stem, recipe.optim.batch_size], 100.0)
        recipe.folder.mkdir()
        (recipe.folder / "metrics.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in epochs))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", launch)
    arguments = ["--parts", "processes", "--rounds", "2", "--images", "32", "--train-batch", "8", "--epochs", "3"]
    figures = run("scaling", arguments, tmp_path, monkeypatch)["processes"]
    assert figures["seconds_per_epoch"] == {"one": [2, 2], "two, strong": [1.25, 1.25], "two, weak": [2.5, 2.5]}
    assert figures["efficiency"] == pytest.approx({"strong": 0.8, "weak": 0.8})
    assert "| two, weak | 2.5 |" in capsys.readouterr().out


def test_the_straight_line_through_exact_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    line = runpy.run_path(str(FOLDER / "scaling.py"))["fit"]([1, 2, 4], [5.0, 7.0, 11.0])
    assert line == pytest.approx({"slope": 2, "intercept": 3, "r_squared": 1})
