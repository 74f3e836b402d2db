"""How training scales: with processes, attack steps, image size, sites and batch size.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --parts processes --rounds 5 --images 4096 --epochs 6
    python benchmarks/scaling.py --parts costs --plot benchmarks/scaling.png

Processes: `accelerate launch` trains the demonstration's network on the embedded images with one and two processes of
one thread each, in turn. Strong: two processes share the batch and the images of one. Weak: each has as many as the
one. The time is that of an epoch in `metrics.jsonl`, wall time, so it means something on an idle machine only: the load
average beside it tells. The first epoch (which warms up) and the last (which validates) are left out if others remain.

Costs: CPU time of one step of adversarial training as each quantity varies and the others stay, fitted by a straight
line. Images count by their pixels. Sites are blocks of a ViT, which are all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from side_by_side import ROOT, adversarial_step, parser, random_batch, time_in_turn, write

import timm_fsr
from timm_fsr.reports.charts import new_figure, save_png

PROCESSES = {1: "one_cpu", 2: "two_cpu_processes"}
FACTORS = {"strong": 1, "weak": 2}  # images and batch of two processes over those of one
LABELS = {
    "attack_steps": "attack steps",
    "pixels": "pixels of an image",
    "sites": "sites of FSR",
    "batch": "images of a batch",
}


def main() -> None:
    """Measure the parts that are asked for."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if "processes" in args.parts:
        results["processes"] = measure_processes(args)
        print(process_table(results["processes"]), flush=True)
    if "costs" in args.parts:
        results["costs"] = {name: measure_cost(steps, args.rounds) for name, steps in sweeps(args).items()}
        print("\n" + cost_table(results["costs"]))
        if args.plot:
            draw(results["costs"], args.plot)
    write(args.json, results)


def parse_args() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__, "scaling")
    parts = ["processes", "costs"]
    result.add_argument("--parts", nargs="+", choices=parts, default=parts)
    result.add_argument("--sharing", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    result.add_argument("--rounds", type=int, default=3, help="timed rounds")
    result.add_argument("--images", type=int, default=1024, help="training images of one process")
    result.add_argument("--train-batch", type=int, default=128, help="batch of one process")
    result.add_argument("--epochs", type=int, default=4, help="of each training")
    result.add_argument("--model", default="resnet_tiny_cifar", help="network of the costs, for images of any size")
    result.add_argument("--attack-steps", type=int, nargs="+", default=[1, 2, 4, 7, 10])
    result.add_argument("--image-sizes", type=int, nargs="+", default=[16, 24, 32, 40, 48], help="side in pixels")
    result.add_argument("--sites", type=int, nargs="+", default=[0, 1, 2, 4, 6], help="numbers of sites, 0 to 6")
    result.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    result.add_argument("--plot", type=Path, metavar="FILE", help="draw the costs, such as benchmarks/scaling.png")
    return result.parse_args()


def measure_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per epoch with one process, and with two in both ways, in turn."""
    runs = {"one": (1, 1)} | {f"two, {sharing}": (2, FACTORS[sharing]) for sharing in args.sharing}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    load: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, (processes, factor) in runs.items():
            seconds[name].append(train(processes, factor, args))
            load[name].append(round(os.getloadavg()[0], 2))  # of the last minute, this run's own processes included
    efficiency = {  # of the work that one process does in the same time, how much each of two does
        sharing: statistics.median(
            FACTORS[sharing] * one / (2 * two)
            for one, two in zip(seconds["one"], seconds[f"two, {sharing}"], strict=True)
        )
        for sharing in args.sharing
    }
    return {"seconds_per_epoch": seconds, "load_average": load, "efficiency": efficiency, "cores": os.cpu_count()}


def train(processes: int, factor: int, args: argparse.Namespace) -> float:
    """Median seconds per epoch of a training by `processes`, on `factor` times the images and the batch."""
    config = ROOT / "recipes" / "accelerate" / f"{PROCESSES[processes]}.yaml"
    recipe = ROOT / "recipes" / "fashion_mnist_quickstart.yaml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)),
            *(str(ROOT / "recipes" / "train.py"), "--config", str(recipe), f"--output={output}"),
            *(f"--optim.epochs={args.epochs}", f"--optim.batch_size={factor * args.train_batch}"),
            *("--data.held_out=10", f"--data.limit_train={factor * args.images + 10}"),
            *("--evaluation.attacks=[]", "--evaluation.validation_steps=1", "--evaluation.validate_every=1000000"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a training with {processes} process(es) failed:\n{done.stdout}{done.stderr}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return statistics.median(seconds[1:-1] or seconds[:1])


def sweeps(args: argparse.Namespace) -> dict[str, dict[int, Callable[[], None]]]:
    """By varied quantity and its value, a training step."""
    return {
        "attack_steps": {steps: convolutional(args.model, attack_steps=steps) for steps in args.attack_steps},
        "pixels": {side**2: convolutional(args.model, side=side) for side in args.image_sizes},
        "sites": {sites: transformer(sites) for sites in args.sites},
        "batch": {batch: convolutional(args.model, batch=batch) for batch in args.batches},
    }


def convolutional(name: str, *, attack_steps: int = 5, side: int = 32, batch: int = 16) -> Callable[[], None]:
    """A step of the network with FSR."""
    model = timm_fsr.attach(timm.create_model(name, num_classes=10))
    return adversarial_step(model, *random_batch(batch, (3, side, side), 10, "cpu"), attack_steps=attack_steps)


def transformer(sites: int) -> Callable[[], None]:
    """A step of a small ViT of seven blocks with FSR after the first so many of them."""
    model = timm.create_model("vit_tiny_patch4_32", embed_dim=96, depth=7)
    if sites:
        timm_fsr.attach(model, at=tuple(f"blocks.{number}" for number in range(sites)))
    return adversarial_step(model, *random_batch(8, (3, 32, 32), 10, "cpu"), attack_steps=2)


def measure_cost(steps: dict[int, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Median seconds by value, and the straight line through them."""
    timings = time_in_turn({str(value): step for value, step in steps.items()}, rounds=rounds)
    values, seconds = list(steps), [timing.median for timing in timings.values()]
    return {"values": values, "seconds": seconds, "line": fit(values, seconds)}


def fit(values: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares: slope, intercept, and the share of the variance that the line explains."""
    slope, intercept = statistics.linear_regression(values, seconds)
    mean = statistics.fmean(seconds)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in zip(values, seconds, strict=True))
    total = sum((y - mean) ** 2 for y in seconds)
    return {"slope": slope, "intercept": intercept, "r_squared": 1 - rest / total if total else 1.0}


def process_table(result: dict[str, Any]) -> str:
    """One row per number of processes and way of sharing."""
    lines = ["| processes | seconds per epoch | load average | efficiency |", "| --- | --- | --- | --- |"]
    for name, seconds in result["seconds_per_epoch"].items():
        load = result["load_average"][name]
        efficiency = result["efficiency"].get(name.removeprefix("two, "))
        shown = "" if efficiency is None else f"{100 * efficiency:.0f} %"
        lines.append(f"| {name} | {statistics.median(seconds):.3g} | {min(load)} to {max(load)} | {shown} |")
    return "\n".join(lines)


def cost_table(costs: dict[str, Any]) -> str:
    """One row per varied quantity: the line, and the times at its ends."""
    lines = ["| varied | from, to | seconds of a step | intercept + slope x | R^2 |", "| --- | --- | --- | --- | --- |"]
    for name, cost in costs.items():
        values, seconds, line = cost["values"], cost["seconds"], cost["line"]
        ends = f"{values[0]}, {values[-1]} | {seconds[0]:.3g}, {seconds[-1]:.3g}"
        equation = f"{line['intercept']:.3g} + {line['slope']:.3g} x"
        lines.append(f"| {LABELS[name]} | {ends} | {equation} | {line['r_squared']:.3f} |")
    return "\n".join(lines)


def draw(costs: dict[str, Any], path: Path) -> None:
    """The measured times and their lines as a PNG, one panel per varied quantity."""
    figure = new_figure(10, 2.8)
    for number, (name, cost) in enumerate(costs.items(), start=1):
        axes = figure.add_subplot(1, len(costs), number)
        line, end = cost["line"], max(cost["values"])
        axes.plot([0, end], [line["intercept"], line["intercept"] + line["slope"] * end], color="#b3541e")
        axes.plot(cost["values"], cost["seconds"], "o", color="#1f5f8b")
        axes.set(xlabel=LABELS[name], ylim=(0, None), title=f"$R^2$ = {line['r_squared']:.3f}")
        axes.grid(alpha=0.3)
        if number == 1:
            axes.set_ylabel("CPU seconds of a training step")
    save_png(figure, path)


if __name__ == "__main__":
    main()
