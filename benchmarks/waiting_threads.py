"""What waiting OpenMP threads cost on a quiet and on a busy machine, with and without the bound that timm_fsr sets.

    python benchmarks/waiting_threads.py
    python benchmarks/waiting_threads.py --rounds 3 --steps 2

A training step of the demonstration's network (batch 128, PGD-5) on two threads, in fresh processes that take turns:
libgomp reads its settings once, when torch is loaded. "Busy" is one endless loop on each core beside them. Times are
wall-clock, since what is lost is lost in waiting.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from side_by_side import Timing, parser, table, write

SETTINGS: dict[str, dict[str, str]] = {
    "torch's default": {},
    "timm_fsr's bound": {"GOMP_SPINCOUNT": "20000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}

CHILD = """
import sys, time
import torch, timm
import timm_fsr
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = timm_fsr.PixelModel(timm.create_model("resnet_tiny_cifar_fsr", in_chans=1, fsr_hidden=16)).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
objective, attack = timm_fsr.AT(), timm_fsr.PGD(eps=0.1, steps=5)
images, labels = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
for step in range(1 + int(sys.argv[2])):
    if step == 1:
        started = time.perf_counter()
    adversarial = objective.craft(model, attack, images, labels)
    objective.terms(model, attack, images, adversarial, labels).total().backward()
    optimizer.step()
    optimizer.zero_grad()
print((time.perf_counter() - started) / int(sys.argv[2]))
"""


def main() -> None:
    """Time the settings in turn, quiet first, then with a busy loop on each core."""
    args = parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load, figures = os.getloadavg()[0], {}
    print(f"{cores} cores, {args.threads} threads, load before the first step {load:.1f}")
    for name, loops in (("quiet", 0), ("busy", cores)):
        with busy(loops):
            timings = measure(args.rounds, args.steps, args.threads)
        print(f"\n{name}: {loops} endless loops beside it\n\n{table(timings, ' a step')}", flush=True)
        figures[name] = {"loops": loops, "settings": {key: timing.to_dict() for key, timing in timings.items()}}
    write(args.json, {"cores": cores, "threads": args.threads, "load_before": load, "steps": args.steps, **figures})


def parse_args() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__, "waiting_threads")
    result.set_defaults(threads=2)
    result.add_argument("--rounds", type=int, default=3, help="processes of each setting")
    result.add_argument("--steps", type=int, default=3, help="timed training steps of each process")
    return result.parse_args()


def measure(rounds: int, steps: int, threads: int) -> dict[str, Timing]:
    """Seconds a step under each setting, in turn."""
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(rounds):
        for setting, found in seconds.items():
            found.append(step_seconds(SETTINGS[setting], threads, steps))
    reference = tuple(seconds["torch's default"])
    return {setting: Timing(tuple(found), reference) for setting, found in seconds.items()}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Within it so many processes do nothing but turn."""
    turn = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # ends with this process, however that ends
    processes = [subprocess.Popen([sys.executable, "-c", turn]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step_seconds(setting: dict[str, str], threads: int, steps: int) -> float:
    """Seconds of a training step in a fresh process."""
    told = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in told} | setting
    command = [sys.executable, "-c", CHILD, str(threads), str(steps)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
