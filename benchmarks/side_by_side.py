"""What the benchmarks share: variants timed in turn (A B A B ...), medians and ratios, and a JSON record of the run.

Machines are noisy, so a single time means little: each round runs every variant once, and what counts is the ratio of
the medians of one run, with the quartiles of the ratios of single rounds beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_fsr import AT, PGD, PixelModel
from timm_fsr.attacks.bn_folding import find_folding

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "huggingface-hub", "pyautoattack", "numpy")


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry a round, and their relation to the first variant's."""

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """How many times faster than the first variant: the ratio of the medians."""
        return statistics.median(self.reference) / self.median

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the speed-up in single rounds."""
        ratios = [reference / own for reference, own in zip(self.reference, self.seconds, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "seconds": [round(value, 6) for value in self.seconds],
            "median_seconds": round(self.median, 6),
            "speedup": round(self.speedup, 3),
            "speedup_quartiles": [round(value, 3) for value in self.quartiles],
        }


def time_in_turn(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, Timing]:
    """Time each variant once a round, after `warmup` untimed rounds.

    Args:
        variants: what to time; ratios are to the first.
        rounds: number of timed rounds.
        device: on "cpu" the clock is the CPU time of this process and its threads, which other processes of a busy
            machine do not stretch as they do wall time; on a GPU it is wall time, waiting for the device.
        warmup: rounds that fill caches and compile.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = clock(device)
            run()
            seconds[name].append(clock(device) - started)
    reference = tuple(next(iter(seconds.values())))
    return {name: Timing(tuple(values), reference) for name, values in seconds.items()}


def adversarial_step(model: nn.Module, images: Tensor, labels: Tensor, *, attack_steps: int) -> Callable[[], None]:
    """One step of adversarial training as a function: PGD on the folded model, loss, gradient and SGD, as in `Trainer`.

    Args:
        model: a timm model with at least one parameter, on the device of the images; it is trained.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        attack_steps: of PGD, Linf 8/255.
    """
    pixel_model = PixelModel(model).to(images.device).train()
    optimizer = torch.optim.SGD(pixel_model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    objective, attack = AT(), PGD(norm="linf", eps=8 / 255, steps=attack_steps)
    generator = torch.Generator(images.device).manual_seed(0)
    folding = find_folding(pixel_model, images)

    def step() -> None:
        with folding.applied():
            adversarial = objective.craft(pixel_model, attack, images, labels, generator=generator)
        optimizer.zero_grad()
        objective.terms(pixel_model, attack, images, adversarial, labels).total().backward()
        optimizer.step()

    return step


def random_batch(count: int, image_size: tuple[int, int, int], classes: int, device: str) -> tuple[Tensor, Tensor]:
    """Noise in [0, 1] of (channels, height, width) `image_size`, and labels: times do not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *image_size, generator=generator)
    return images.to(device), torch.randint(classes, (count,), generator=generator).to(device)


def clock(device: str = "cpu") -> float:
    """Seconds of a clock that fits the device; see `time_in_turn`."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def table(timings: Mapping[str, Timing], per: str = "") -> str:
    """A Markdown table of medians, and how many times faster than the first each variant is."""
    lines = [
        f"| variant | median seconds{per} | times faster than the first | quartiles |",
        "| --- | --- | --- | --- |",
    ]
    for name, timing in timings.items():
        low, high = timing.quartiles
        lines.append(f"| {name} | {timing.median:.4g} | {timing.speedup:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, default=ROOT / "build" / f"{name}.json", help="where to write the figures")
    result.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU (default 1)")
    return result


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write a benchmark's figures with the command, commit, machine and versions they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **results}, indent=1) + "\n")
    print(f"\nwritten to {path}")


def provenance() -> dict[str, Any]:
    """Command, commit, machine and versions; no name of the machine or of its folders."""
    script = Path(sys.argv[0])
    arguments = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"benchmarks/{script.name}", *arguments]),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Short hash of the checkout, with "+" where files differ from it; "unknown" outside of one."""
    try:
        short, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, threads that torch uses, and GPU if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(name: str) -> str | None:
    """Installed version of a package; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
