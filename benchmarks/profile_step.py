"""Where the time of a training step goes, and how far each part is from what the arithmetic allows.

    python benchmarks/profile_step.py                           resnet18_cifar_fsr, 32x32, PGD-10, batch 16
    python benchmarks/profile_step.py --model resnet_tiny_cifar --batch 128 --precision bf16
    python benchmarks/profile_step.py --device cuda --batch 128 --compile inductor --precision bf16

The bound of a part is its floating-point operations (convolutions and matrix products, an addition and a
multiplication counted as two; an attack step is one forward pass and one as expensive backward pass to the image, the
training pass has a backward pass of two) over the peak of this machine, which is measured beside it as the fastest of
some large matrix products and convolutions of the same precision.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import clock, parser, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_step import our_trainer

from timm_fsr.training.objectives.base import LossTerms
from timm_fsr.training.trainer import Trainer

_MATRICES = (1024, 2048, 4096)
_CONVOLUTIONS = ((64, 32), (256, 8))  # channels and side of a map, with a 3x3 kernel and 64 images


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward pass of the whole batch, in eval mode."""
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), counter:
        model(images)
    return counter.get_total_flops()


def peak_flops(device: str, dtype: torch.dtype, rounds: int = 3) -> float:
    """Operations a second of the fastest of several large matrix products and convolutions."""
    best = 0.0
    for size in _MATRICES if device == "cpu" else (*_MATRICES, 8192):
        left = torch.randn(size, size, device=device, dtype=dtype)
        best = max(best, 2 * size**3 / _fastest(partial(torch.mm, left, left), device, rounds))
    for channels, side in _CONVOLUTIONS:
        feature = torch.randn(64, channels, side, side, device=device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        flops = 2 * 9 * channels**2 * 64 * side**2
        best = max(best, flops / _fastest(partial(F.conv2d, feature, weight, padding=1), device, rounds))
    return best


def _fastest(run: Callable[[], object], device: str, rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        started = clock(device)
        run()
        seconds.append(clock(device) - started)
    return min(seconds)


def parts(trainer: Trainer, images: Tensor, labels: Tensor, device: str) -> dict[str, float]:
    """Seconds of the parts of one step, each waited for, and of a whole step as training takes it."""
    accelerator, seconds = trainer.accelerator, {}
    started = clock(device)

    def passed(name: str) -> None:
        nonlocal started
        now = clock(device)
        seconds[name] = now - started
        started = now

    trainer.prepared.train()
    with trainer.folding.applied():
        adversarial = trainer.objective.craft(trainer.prepared, trainer.attack, images, labels)
    passed("attack")
    terms: LossTerms = trainer.objective.terms(trainer.prepared, trainer.attack, images, adversarial, labels)
    total = terms.total()
    passed("training pass, forward")
    accelerator.backward(total)
    passed("training pass, backward")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    passed("optimizer")
    trainer.take_step(images, labels)
    passed("whole step of the engine")
    return seconds


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, "profile_step")
    options.add_argument("--model", default="resnet18_cifar", help="a CIFAR-size network of this package")
    options.add_argument("--batch", type=int, default=16, help="images of a step")
    options.add_argument("--steps", type=int, default=10, help="steps of the attack")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are shown")
    options.add_argument("--precision", default="no", choices=("no", "bf16"))
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--compile", metavar="BACKEND", help="torch.compile backend")
    return options.parse_args()


def main() -> None:
    """Measure the peak, then the parts; print and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    flags = [f"--mixed_precision={args.precision}", *([f"--compile={args.compile}"] if args.compile else [])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(args, Path(folder), *flags)
        images = torch.rand(args.batch, 3, 32, 32).to(args.device, memory_format=torch.channels_last)
        labels = (torch.arange(args.batch) % 10).to(args.device)
        forward = forward_flops(trainer.timm_model, images)
        measured = [parts(trainer, images, labels, args.device) for _ in range(args.rounds + 1)][1:]
    peak = peak_flops(args.device, dtype, min(args.rounds, 3))
    seconds = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
    seconds["rest: checks, metrics, schedule"] = seconds["whole step of the engine"] - sum(list(seconds.values())[:4])
    flops = {
        "attack": 2 * args.steps * forward,
        "training pass, forward": forward,
        "training pass, backward": 2 * forward,
        "whole step of the engine": (2 * args.steps + 3) * forward,
    }
    print(f"peak of this machine in {dtype}: {peak / 1e9:.0f} GFLOP/s; one forward pass: {forward / 1e9:.2f} GFLOP\n")
    print("| part | seconds | share of the step | bound by arithmetic, seconds | of the peak |")
    print("| --- | --- | --- | --- | --- |")
    whole, rows = seconds["whole step of the engine"], {}
    for name, value in seconds.items():
        bound = flops.get(name, 0) / peak
        reached = f"{100 * bound / value:.0f} %" if bound else ""
        print(f"| {name} | {value:.4f} | {100 * value / whole:.1f} % | {bound:.4f} | {reached} |")
        rows[name] = {"seconds": value, "flops": flops.get(name, 0), "bound_seconds": bound}
    settings = {key: getattr(args, key) for key in ("model", "batch", "steps", "precision", "device", "compile")}
    write(args.json, {**settings, "peak_flops": peak, "forward_flops": forward, "parts": rows})


if __name__ == "__main__":
    main()
