"""`python recipes/cost.py recipes/*.yaml`: how much arithmetic each recipe asks for, counted without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from timm_fsr.training.recipe import Recipe

# Training images, classes and image size of each data set that a recipe names.
DATA = {
    "fashion_mnist": (10_000, 10, (1, 28, 28)),
    "zalando-datasets/fashion_mnist": (60_000, 10, (1, 28, 28)),
    "uoft-cs/cifar10": (50_000, 10, (3, 32, 32)),
    "uoft-cs/cifar100": (50_000, 100, (3, 32, 32)),
    "ufldl-stanford/svhn": (73_257, 10, (3, 32, 32)),
    "zh-plus/tiny-imagenet": (100_000, 200, (3, 64, 64)),
    "ILSVRC/imagenet-1k": (1_281_167, 1000, (3, 224, 224)),
}


def forward_flops(recipe: Recipe, classes: int, image_size: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass, a multiplication and its addition counted as two."""
    with torch.device("meta"):
        model: Any = recipe.model.build(num_classes=classes, image_size=image_size).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.empty(1, *image_size))
    return counter.get_total_flops()


def passes(recipe: Recipe) -> int:
    """Forward passes that training on one image costs as much as; a backward pass counts as two.

    An attack step needs the gradient of the image alone, so that its backward pass counts as one. Training passes see
    the adversarial image in AT, it and the clean one in the others, and the attack of TRADES the clean one once more.
    """
    steps = {"pgd": 10 if recipe.attack.steps is None else recipe.attack.steps}.get(recipe.attack.name, 1)
    name = recipe.objective.name
    return 3 if name == "natural" else 2 * steps + (3 if name == "at" else 6) + (name == "trades")


def training_flops(recipe: Recipe) -> float:
    """Of the whole training; validation and the final evaluation come on top."""
    images, classes, image_size = DATA[recipe.data.source]
    images = min(images, recipe.data.limit_train or images)
    images -= min(1000, images // 10) if recipe.data.held_out is None else recipe.data.held_out
    return images * recipe.optim.epochs * passes(recipe) * forward_flops(recipe, classes, image_size)


def main(paths: list[str]) -> int:
    """Print one line per recipe."""
    for path in paths:
        if "model" not in yaml.safe_load(Path(path).read_text()):
            print(f"{Path(path).name:36} changes what another recipe before it says")
            continue
        flops = training_flops(Recipe.load(path, ["--model.pretrained=false"]))
        print(f"{Path(path).name:36} {flops:.1e} FLOP, {flops / 3.6e16:7.2f} h at 10 TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
