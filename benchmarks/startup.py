"""What the package adds to the start of a program: its import, the registered variants, and building a model.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 15 --models resnet50 convnext_tiny

Imports are timed in fresh processes, whose bytecode an untimed one before has written: `import timm` first, then
`import timm_fsr`. The same processes register a variant of every architecture for further made-up layers, as a package
with many layers would. Building a model with and without FSR takes turns in this process; it includes looking for the
place and its layout. Times are CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import timm
import torch
from side_by_side import Timing, parser, time_in_turn, write

MODELS = (
    "resnet18_cifar",
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
)
PARTS = {
    "timm": "import timm",
    "timm_fsr": "import timm_fsr, after timm",
    "layers": "variants of every architecture for {} more layers",
}

CHILD = """
import json, pathlib, sys, time

def memory():
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")  # not Linux
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

times, sizes = [time.process_time()], [memory()]
import timm
times.append(time.process_time()); sizes.append(memory())
import timm_fsr
times.append(time.process_time()); sizes.append(memory())
from timm_fsr.models.variants import register_variants
register_variants(tuple(f"layer{number}" for number in range(int(sys.argv[1]))))
times.append(time.process_time()); sizes.append(memory())
print(json.dumps([[after - before for before, after in zip(row, row[1:])] for row in (times, sizes)]))
"""


def main() -> None:
    """Time imports, then the building of models."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    imports = measure_imports(args.rounds, args.warmup, args.more_layers)
    print(import_table(imports, args.more_layers), flush=True)
    builds = {name: measure_build(name, args.rounds) for name in args.models}
    print("\n" + build_table(builds))
    built = {name: {key: timing.to_dict() for key, timing in pair.items()} for name, pair in builds.items()}
    write(args.json, {"imports": imports, "more_layers": args.more_layers, "create_model": built})


def parse_args() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__, "startup")
    result.add_argument("--models", nargs="+", default=list(MODELS), help="timm architectures to build")
    result.add_argument("--rounds", type=int, default=5, help="processes, and times that each model is built")
    result.add_argument("--warmup", type=int, default=1, help="untimed processes before them, which write bytecode")
    result.add_argument("--more-layers", type=int, default=9, help="made-up layers that get variants too")
    return result.parse_args()


def measure_imports(rounds: int, warmup: int, more_layers: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of each part of `PARTS` in fresh processes, and the ratio to `import timm` there."""
    runs = [run_child(more_layers) for _ in range(warmup + rounds)][warmup:]
    results = {}
    for place, part in enumerate(PARTS):
        seconds = [run[place] for run, _ in runs]
        ratios = [own / run[0] for own, (run, _) in zip(seconds, runs, strict=True)]
        results[part] = {
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "median_ratio_to_timm": statistics.median(ratios),
            "ratios_to_timm": ratios,
            "median_megabytes": statistics.median(sizes[place] for _, sizes in runs),
        }
    return results


def run_child(more_layers: int) -> tuple[list[float], list[float]]:
    """CPU seconds and growth in megabytes of each part in a fresh process."""
    command = [sys.executable, "-c", CHILD, str(more_layers)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, sizes = json.loads(printed.splitlines()[-1])
    return seconds, sizes


def measure_build(name: str, rounds: int) -> dict[str, Timing]:
    """Times of building one architecture plain and with FSR."""
    plain, with_layer = (partial(timm.create_model, model) for model in (name, f"{name}_fsr"))
    return time_in_turn({"plain": plain, "fsr": with_layer}, rounds=rounds)


def import_table(imports: dict[str, dict[str, Any]], more_layers: int) -> str:
    """One row per part."""
    lines = [
        "| part of the start | median seconds | of `import timm` | lowest and highest | memory, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, text in PARTS.items():
        row = imports[part]
        low, high = min(row["ratios_to_timm"]), max(row["ratios_to_timm"])
        cells = [
            text.format(more_layers),
            f"{row['median_seconds']:.3f}",
            f"{100 * row['median_ratio_to_timm']:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f} %",
            f"{row['median_megabytes']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_table(builds: dict[str, dict[str, Timing]]) -> str:
    """One row per architecture."""
    lines = [
        "| `create_model` | plain, s | with FSR, s | more, s | more |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, pair in builds.items():
        plain, fsr = pair["plain"].median, pair["fsr"].median
        more = f"{100 * (fsr / plain - 1):+.0f} %"
        lines.append(f"| {name} | {plain:.3f} | {fsr:.3f} | {fsr - plain:+.3f} | {more} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
