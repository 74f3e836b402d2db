"""The training step timed by the benchmarks of a checkout, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timm_fsr
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies.study import say
from timm_fsr.utils.files import write_text

BENCHMARKS = (Path(timm_fsr.__file__).parents[1] / "benchmarks", Path("benchmarks"))
"""Where they may be: next to a package that is used from its checkout, or in the folder that the command is run in."""


def check_speed(recipe: Recipe) -> None:
    """Raise ValueError where the benchmarks are missing or cannot run a recipe."""
    _benchmarks()
    if recipe.mixed_precision == "fp16":
        raise ValueError("--speed knows float32 and bf16; set mixed_precision=bf16, or leave --speed out")


def _benchmarks() -> Path:
    for folder in BENCHMARKS:
        if (folder / "training_step.py").is_file():
            return folder.resolve()
    raise ValueError(
        "--speed runs the scripts in benchmarks/, which only a checkout of the repository has; run the command in one, "
        "or leave --speed out"
    )


def measure_speed(recipe: Recipe, output: Path, *, device: str, official: Path | None, minutes: float | None) -> None:
    """Time the training step (`speed.json`) and measure the share of the machine's peak (`peak.json`).

    Args:
        recipe: gives network, batch size, attack steps, precision and compiler.
        output: folder of the results; what it has of the same question is kept.
        device: such as "cuda".
        official: a checkout of the official code, to time it too.
        minutes: each measurement is given up after a sixth of them; None sets no limit.

    Raises:
        ChildProcessError: a script failed; its own message is on the screen.
    """
    for name, command in _commands(recipe, device, official).items():
        path, fresh = output / f"{name}.json", output / f"{name}.new"
        if path.exists() and json.loads(path.read_text())["asked"] == command:
            continue
        script = [sys.executable, str(_benchmarks() / command[0]), *command[1:], "--json", str(fresh)]
        try:
            subprocess.run(script, check=True, timeout=60 * minutes / 6 if minutes else None)
        except subprocess.TimeoutExpired:
            say(f"{command[0]} takes longer than a sixth of --minutes={minutes}: not measured")
            continue
        except subprocess.CalledProcessError as error:
            raise ChildProcessError(f"{command[0]} failed, see above; leave --speed out to go on without it") from error
        write_text(path, json.dumps({"asked": command, **json.loads(fresh.read_text())}, indent=1) + "\n")
        fresh.unlink()


def _commands(recipe: Recipe, device: str, official: Path | None) -> dict[str, list[str]]:
    """The scripts with their flags, by the name of their results."""
    common = ["--device", device, "--batch", str(recipe.optim.batch_size)]
    common += ["--steps", str(getattr(recipe.attack.build(), "steps", 1)), "--rounds", "3"]
    common += [f"--compile={recipe.compile}"] if recipe.compile else []
    model = ["--model", recipe.model.name]
    network = ["--official", str(official)] if official else model
    return {
        "speed": ["training_step.py", *common, *network, "--no-memory"],
        "peak": ["profile_step.py", *common, *model, "--precision", recipe.mixed_precision],
    }
