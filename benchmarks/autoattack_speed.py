"""AutoAttack `standard`: our evaluation against the reference package on the same images, outcome by outcome.

    python benchmarks/autoattack_speed.py                          the checkpoint in the package, 64 of its test images
    python benchmarks/autoattack_speed.py --model FOLDER --data FOLDER --eps 8/255 --images 250 --device cuda

Both run the same attacks with the same seed on the same batch. The reference gets the model as people hand it over, in
eval mode; ours runs it frozen and with BatchNorm folded into the convolutions. What counts first is the number of
images on which the two disagree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import timm
import torch
from pyautoattack import AutoAttack
from side_by_side import parser, table, time_in_turn, write
from torch import Tensor, nn

import timm_fsr
from timm_fsr.models.pixel import PixelModel
from timm_fsr.training.parsing import parse_number

REFERENCE, OURS = "reference package", "ours"
NORMS = {"linf": "Linf", "l2": "L2"}

Evaluate = Callable[[], Tensor]


def reference(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """(N,) bool: which images the reference implementation calls robust."""
    attack = AutoAttack(model, norm=NORMS[args.norm], eps=args.eps, version=args.version, device=args.device, seed=0)
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    with torch.no_grad():
        return model(found).argmax(dim=1) == labels


def ours(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """(N,) bool: which images our evaluation calls robust."""
    report = timm_fsr.evaluate(model, [(images, labels)], norm=args.norm, eps=args.eps, attacks=[args.version], seed=0)
    return list(report.correct.values())[-1]


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, "autoattack_speed")
    options.add_argument(
        "--model", default="resnet_tiny_cifar_fsr.at_fashion_mnist", help="what timm.create_model takes"
    )
    options.add_argument("--data", default="fashion_mnist", help="what timm_fsr.load_data takes")
    options.add_argument("--images", type=int, default=64, help="test images, in one batch")
    options.add_argument("--norm", default="linf", choices=tuple(NORMS))
    options.add_argument("--eps", type=parse_number, default=0.1)
    options.add_argument("--version", default="standard", choices=("standard", "plus", "rand"))
    options.add_argument("--rounds", type=int, default=1, help="timed rounds")
    options.add_argument("--device", default="cpu")
    return options.parse_args()


def main() -> None:
    """Time both in turn, compare their outcomes, print and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    data = timm_fsr.load_data(args.data, "test", limit=args.images)
    images, labels = next(data.batches(args.images))
    images, labels = images.to(args.device), labels.to(args.device)
    model = PixelModel(timm.create_model(args.model, pretrained=True)).eval().to(args.device)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    outcomes: dict[str, Tensor] = {}
    variants: dict[str, Evaluate] = {
        REFERENCE: lambda: reference(model, images, labels, args),
        OURS: lambda: ours(model, images, labels, args),
        "ours, channels_last": lambda: ours(last, images, labels, args),
    }

    def keep(name: str) -> Callable[[], object]:
        return lambda: outcomes.update({name: variants[name]().cpu()})

    timings = time_in_turn({name: keep(name) for name in variants}, rounds=args.rounds, device=args.device, warmup=0)
    print(table(timings))
    expected = outcomes[REFERENCE]
    differences = {name: int((found != expected).sum()) for name, found in outcomes.items()}
    print(f"\nrobust: {int(expected.sum())} of {len(expected)} images; outcomes that differ from the reference's:")
    print("\n".join(f"  {name}: {count}" for name, count in differences.items()))
    settings = {key: getattr(args, key) for key in ("model", "data", "images", "norm", "eps", "version", "device")}
    robust = {name: int(found.sum()) for name, found in outcomes.items()}
    timed = {name: timing.to_dict() for name, timing in timings.items()}
    write(args.json, {**settings, "robust_images": robust, "different_outcomes": differences, "timings": timed})


if __name__ == "__main__":
    main()
