"""What a feature layer costs on top of the plain network: parameters, FLOPs, a forward pass and a training step.

    python benchmarks/overhead.py                              FSR on four networks, every layer on ResNet-18
    python benchmarks/overhead.py --models resnet18_cifar --batch 64 --rounds 9
    python benchmarks/overhead.py --device cuda --batch 128 --attack-steps 10 --image-size 224

FLOPs are those of convolutions, matrix products and attention in one image's forward pass, a multiplication and its
addition counted as two; what a layer does elementwise is not in them but in the times. The training step is
adversarial training: PGD, the loss with its auxiliary terms, the gradient and SGD. Each layer is at its own default
place, with its default arguments. Times are medians of rounds in which the plain network and the layers take turns.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from side_by_side import Timing, adversarial_step, parser, random_batch, time_in_turn, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_fsr

PLAIN = "plain"
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """What one network is measured with: images per batch, PGD steps, pixels of a side."""

    batch: int
    attack_steps: int
    image_size: int


# Sizes that take seconds a step on one core; the numbers of --batch, --attack-steps and --image-size replace them.
SETTINGS = {
    "resnet18_cifar": Setting(batch=8, attack_steps=10, image_size=32),
    "wrn34_10_cifar": Setting(batch=4, attack_steps=2, image_size=32),
    "convnext_tiny": Setting(batch=2, attack_steps=2, image_size=224),
    "vit_small_patch16_224": Setting(batch=2, attack_steps=2, image_size=224),
}
ALL_LAYERS_ON = "resnet18_cifar"


def main() -> None:
    """Measure network after network."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.models:
        layers = args.layers or (timm_fsr.list_layers() if name == ALL_LAYERS_ON else ["fsr"])
        setting = setting_of(name, args)
        results[name] = measure(name, layers, setting, args)
        print(f"\n{name}, batch {setting.batch}, {setting.image_size} pixels, PGD-{setting.attack_steps}\n")
        print(markdown(results[name]["variants"]), flush=True)
    write(args.json, {"networks": results})


def parse_args() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__, "overhead")
    result.add_argument("--models", nargs="+", default=list(SETTINGS), help="timm architectures")
    result.add_argument("--layers", nargs="+", help=f"feature layers (default fsr; all of them on {ALL_LAYERS_ON})")
    result.add_argument("--rounds", type=int, default=5, help="timed rounds")
    result.add_argument("--batch", type=int, help="images of a batch")
    result.add_argument("--attack-steps", type=int, help="steps of PGD")
    result.add_argument("--image-size", type=int, help="side of the images in pixels")
    result.add_argument("--device", default="cpu", help='such as "cuda"')
    return result.parse_args()


def setting_of(name: str, args: argparse.Namespace) -> Setting:
    """The network's setting with what the command line says; other networks start from that of 32x32 images."""
    given = {key: getattr(args, key) for key in ("batch", "attack_steps", "image_size")}
    start = SETTINGS.get(name, SETTINGS[ALL_LAYERS_ON])
    return replace(start, **{key: value for key, value in given.items() if value is not None})


def measure(name: str, layers: list[str], setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Counts and times of the plain network and of each layer on it, by variant."""
    variants: dict[str, str | None] = {PLAIN: None, **{layer: layer for layer in layers}}
    counts = {key: count(build(name, layer, setting.image_size, "meta"), setting) for key, layer in variants.items()}
    models = {key: build(name, layer, setting.image_size, args.device) for key, layer in variants.items()}
    images, labels = random_batch(setting.batch, (3, setting.image_size, setting.image_size), CLASSES, args.device)

    passes = {key: partial(forward, model.eval(), images) for key, model in models.items()}
    forwards = time_in_turn(passes, rounds=args.rounds, device=args.device)
    training = {
        key: adversarial_step(model, images, labels, attack_steps=setting.attack_steps) for key, model in models.items()
    }
    steps = time_in_turn(training, rounds=args.rounds, device=args.device)
    return {
        "setting": vars(setting) | {"classes": CLASSES, "device": args.device},
        "variants": {
            key: {
                **counts[key],
                **{f"{what}_ratio": counts[key][what] / counts[PLAIN][what] for what in counts[key]},
                "forward": times(forwards[key]),
                "training_step": times(steps[key]),
            }
            for key in variants
        },
    }


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """One pass without gradients."""
    model(images)


def build(name: str, layer: str | None, image_size: int, device: str) -> nn.Module:
    """The network for images of this size, with the layer at its default place, the same weights each time."""
    torch.manual_seed(0)
    variant = f"{name}_{layer}"
    registered = layer is not None and timm.is_model(variant)
    with torch.device(device):
        model = create(variant if registered else name, image_size)
        return model if layer is None or registered else timm_fsr.attach(model, layer)


def create(name: str, image_size: int) -> nn.Module:
    """The timm model; those that are built for one image size are built for this one."""
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.input_size[-1] == image_size:
        return timm.create_model(name, num_classes=CLASSES)
    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=image_size)
    except TypeError:  # a network for any size
        return timm.create_model(name, num_classes=CLASSES)


def count(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Parameters, and FLOPs of one image's forward pass, of a model on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.empty(1, 3, setting.image_size, setting.image_size, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops()}


def times(timing: Timing) -> dict[str, Any]:
    """The timing with its cost relative to the plain network, which is the inverse of its speed-up."""
    low, high = timing.quartiles
    return {**timing.to_dict(), "ratio": 1 / timing.speedup, "ratio_quartiles": [1 / high, 1 / low]}


def markdown(variants: dict[str, dict[str, Any]]) -> str:
    """A table with one row per variant; percentages are what it costs more than the plain network."""
    lines = [
        "| network | parameters | FLOPs per image | forward, ms | training step, s | quartiles of the step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in variants.items():
        forward, step = row["forward"], row["training_step"]
        low, high = step["ratio_quartiles"]
        cells = [
            name if name == PLAIN else f"with {name}",
            f"{row['parameters'] / 1e6:.2f} M ({more(row['parameters_ratio'])})",
            f"{row['flops'] / 1e9:.3f} G ({more(row['flops_ratio'])})",
            f"{1e3 * forward['median_seconds']:.1f} ({more(forward['ratio'])})",
            f"{step['median_seconds']:.3g} ({more(step['ratio'])})",
            f"{more(low)} to {more(high)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def more(ratio: float) -> str:
    """A ratio as what it adds, in percent."""
    return f"{100 * (ratio - 1):+.1f} %"


if __name__ == "__main__":
    main()
