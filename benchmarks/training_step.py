"""One training step of FSR (attack, losses, backward pass, update): ours against the official implementation.

    python benchmarks/training_step.py --official FOLDER              ResNet-18, 32x32, PGD-10, batch 64, float32
    python benchmarks/training_step.py --official FOLDER --batch 128 --rounds 5
    python benchmarks/training_step.py --official FOLDER --device cuda --compile inductor

FOLDER is a checkout of the official repository (github wkim97/FSR); without it ours alone are compared. Its network and
its attack are used as they are, but that on a CPU the attack's `.cuda()` is made to do nothing. The step around them is
what its train.py does. Ours is the step of `Trainer`, checks and metrics included, on a model with the same
weights and the same images. Before anything is timed, attack, loss terms and gradients of the two are compared with
the noise of the mask off (its draws differ: ours needs one where the official code makes two).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from side_by_side import parser, table, time_in_turn, write
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.bn_folding import Folding
from timm_fsr.attacks.pgd import PGD
from timm_fsr.layers.common import strongest_wrong_class
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer

EPS, STEP = 8 / 255, 2 / 255
ARCHITECTURE = "resnet18_cifar"  # the official code's ResNet-18
OFFICIAL, OURS = "official", "ours"

Step = Callable[[Tensor, Tensor], object]


class Official:
    """The official network and attack, and the step that its training script makes of them.

    Args:
        folder: a checkout of the official repository.
        device: "cpu" or "cuda".
        steps: of the attack.
    """

    def __init__(self, folder: Path, device: str, steps: int) -> None:
        if not (folder / "models" / "resnet_fsr.py").exists():
            raise SystemExit(f"{folder} is no checkout of the official FSR repository: it has no models/resnet_fsr.py")
        sys.path.insert(0, str(folder))
        try:
            self.net: nn.Module = importlib.import_module("models.resnet_fsr").ResNet18_FSR().to(device)
            attack = importlib.import_module("attacks.pgd").PGD
        finally:
            sys.path.remove(str(folder))
        self.attack = attack(self.net, EPS, STEP, min_val=0, max_val=1, max_iters=steps, _type="linf")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def craft(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images from a random start."""
        self.net.eval()
        with cuda_does_nothing(images.device.type == "cpu"):
            adversarial: Tensor = self.attack.perturb(images, labels, True)
        self.net.train()
        return adversarial

    def losses(self, adversarial: Tensor, labels: Tensor, *, noise: bool = True) -> dict[str, Tensor]:
        """The three terms of the loss, under our names."""
        logits, (robust,), (nonrobust,), (recalibrated,) = self.net(adversarial, is_eval=not noise)
        separation = F.cross_entropy(robust, labels)
        separation = separation + F.cross_entropy(nonrobust, strongest_wrong_class(logits, labels))
        return {
            "adversarial": F.cross_entropy(logits, labels),
            "fsr.separation": separation,
            "fsr.recalibration": F.cross_entropy(recalibrated, labels),
        }

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Attack, minimise, and look at the losses, as the official script does after each step."""
        terms = self.losses(self.craft(images, labels), labels)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        for value in terms.values():
            value.item()


@contextmanager
def cuda_does_nothing(active: bool) -> Iterator[None]:
    """Within it `tensor.cuda()` returns the tensor: the official attack asks for it on every device."""
    original = torch.Tensor.cuda
    try:
        if active:
            torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign]
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def our_trainer(args: argparse.Namespace, folder: Path, *flags: str) -> Trainer:
    """A trainer that is ready for its first step; its own images do not matter, batches are handed to its steps."""
    source = folder / "train.npz"
    if not source.exists():
        shape = (args.batch + 20, 32, 32, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(source, image=images, label=np.arange(len(images)) % 10)
    recipe = Recipe.load(
        overrides=[
            f"--output={folder / 'run'}",
            f"--model.name={args.model}",
            "--model.layer=fsr",
            f"--data.source={source}",
            "--data.held_out=20",
            f"--attack={{eps: {EPS}, steps: {args.steps}, step_size: {STEP}}}",
            "--optim={optimizer: momentum, lr: 0.1, weight_decay: 5e-4, schedule: constant}",
            f"--optim.batch_size={args.batch}",
            "--evaluation.attacks=[]",
            *flags,
        ]
    )
    recipe.check()
    return Trainer.prepare(recipe, build_accelerator(recipe), Console(quiet=True))


def stepper(trainer: Trainer) -> Step:
    """One step of a trainer, in the memory format that its recipe asks for."""

    def step(images: Tensor, labels: Tensor) -> None:
        if trainer.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        trainer.prepared.train()
        trainer.take_step(images, labels)

    return step


def variants(args: argparse.Namespace, folder: Path) -> dict[str, Step]:
    """What is compared, the reference first. All have the same weights."""
    official = Official(args.official, args.device, args.steps) if args.official else None
    built: dict[str, Trainer] = {
        OURS: our_trainer(args, folder),
        "ours, not folded": our_trainer(args, folder),
        "ours, bf16": our_trainer(args, folder, "--mixed_precision=bf16"),
    }
    built["ours, not folded"].folding = Folding()
    if args.compile:
        built[f"ours, compiled by {args.compile}"] = our_trainer(args, folder, f"--compile={args.compile}")
        name = f"ours, bf16, compiled by {args.compile}"
        built[name] = our_trainer(args, folder, f"--compile={args.compile}", "--mixed_precision=bf16")
    weights = built[OURS].timm_model.state_dict()
    if official is not None:
        weights = timm_fsr.convert_official(official.net.state_dict())
    for trainer in built.values():
        trainer.timm_model.load_state_dict(weights)
    steps = {name: stepper(trainer) for name, trainer in built.items()}
    return steps if official is None else {OFFICIAL: official.step, **steps}


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, 32, 32) in [0, 1] and labels: what is in them does not change the arithmetic."""
    images = torch.rand(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images.to(args.device), (torch.arange(args.batch) % 10).to(args.device)


def compare(args: argparse.Namespace) -> dict[str, float]:
    """How far attack, loss terms and gradients are from the official ones, with the same weights and no noise."""
    torch.manual_seed(0)
    official = Official(args.official, args.device, args.steps)
    ours = timm.create_model(f"{ARCHITECTURE}_fsr", num_classes=10, fsr_noise=False).to(args.device)
    ours.load_state_dict(timm_fsr.convert_official(official.net.state_dict()))
    images, labels = batch_of(args)
    torch.manual_seed(1)
    theirs = official.craft(images.clone(), labels).detach()
    attack = PGD(eps=EPS, steps=args.steps, step_size=STEP)
    torch.manual_seed(1)
    start = torch.FloatTensor(images.shape).uniform_(-EPS, EPS).to(images.device)  # as the official attack draws it
    with attack_mode(ours):
        found = (images + start).clamp(0, 1)
        for _ in range(args.steps):
            gradient = _image_gradient(ours, found, labels)
            found = attack.project(found + STEP * attack.direction(gradient), images)
    terms = official.losses(theirs, labels, noise=False)
    torch.stack(list(terms.values())).sum().backward()
    ours.train()
    with timm_fsr.record(ours, labels) as tape:
        logits = ours(theirs)
    own = {"adversarial": F.cross_entropy(logits, labels), **tape.losses(logits, labels)}
    torch.stack(list(own.values())).sum().backward()
    gradients = {name: parameter.grad for name, parameter in official.net.named_parameters()}
    expected = timm_fsr.convert_official({**official.net.state_dict(), **gradients})
    errors = {
        f"loss {name}": float((own[name] - value).abs().detach() / value.abs().detach())
        for name, value in terms.items()
    }
    squares = [
        ((parameter.grad - expected[name]).square().sum(), expected[name].square().sum())
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    ]
    errors["gradient"] = float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)
    errors["share of attacked pixels that differ"] = float(((found - theirs).abs() > 1e-6).float().mean())
    return errors


def _image_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
    return gradient


def peak_memory(name: str) -> float:
    """Megabytes that a step of one variant needs beyond what there was before it, in a process of its own."""
    command = [sys.executable, *sys.argv, f"--peak={name}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return float(json.loads(lines[-1]))


def measure_peak(args: argparse.Namespace, step: Step) -> float:
    """Largest amount of memory in use over two steps beyond that before them, in megabytes; NaN if it cannot be told.

    Gradients and the optimizer's momentum are in it, the weights are not.
    """
    images, labels = batch_of(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
        except OSError:
            return float("nan")
        before = _status("VmRSS")
    for _ in range(2):
        step(images, labels)
    after = torch.cuda.max_memory_allocated() if args.device == "cuda" else _status("VmHWM")
    return (after - before) / 1e6


def _status(key: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, "training_step")
    options.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of the official repository")
    options.add_argument("--model", default=ARCHITECTURE, help="another network, if ours alone are compared")
    options.add_argument("--batch", type=int, default=64, help="images of a step")
    options.add_argument("--steps", type=int, default=10, help="steps of the attack")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--compile", metavar="BACKEND", help="add compiled variants, such as by inductor")
    options.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory, a process a variant"
    )
    options.add_argument("--peak", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.official and args.model != ARCHITECTURE:
        options.error(f"the official code is compared on {ARCHITECTURE}; leave out --model")
    return args


def main() -> None:
    """Compare, time in turn, measure memory, print and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "model": args.model,
        "batch": args.batch,
        "attack_steps": args.steps,
        "device": args.device,
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.peak is None and args.official:
            results["relative_errors"] = errors = compare(args)
            print("ours against the official code, relative errors:")
            print("\n".join(f"  {name:40} {value:.1e}" for name, value in errors.items()), flush=True)
        steps = variants(args, Path(folder))
        if args.peak is not None:
            print(json.dumps(measure_peak(args, steps[args.peak])))
            return
        images, labels = batch_of(args)
        calls = {name: (lambda step=step: step(images, labels)) for name, step in steps.items()}
        timings = time_in_turn(calls, rounds=args.rounds, device=args.device)
        memory = {name: peak_memory(name) for name in steps} if args.memory else {}
    print("\n" + table(timings, per=" a step"))
    if memory:
        reference = next(iter(memory.values()))
        print("\n| variant | peak memory of a step, MB | share of the first |\n| --- | --- | --- |")
        print("\n".join(f"| {name} | {value:.0f} | {value / reference:.2f} |" for name, value in memory.items()))
    images_per_second = {name: args.batch / timing.median for name, timing in timings.items()}
    results["timings"] = {name: timing.to_dict() for name, timing in timings.items()}
    write(args.json, {**results, "images_per_second": images_per_second, "peak_memory_mb": memory})


if __name__ == "__main__":
    main()
