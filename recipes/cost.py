"""`python recipes/cost.py recipes/*.yaml`: how much arithmetic each recipe asks for, counted without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from timm_fsr.training.pace import training_passes
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
    "data/images": (10_100, 10, (3, 224, 224)),  # a folder of somebody's own: as if it were of this size
}


def forward_flops(recipe: Recipe, classes: int, image_size: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass, a multiplication and its addition counted as two."""
    with torch.device("meta"):
        model: Any = recipe.model.build(num_classes=classes, image_size=image_size).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.empty(1, *image_size))
    return counter.get_total_flops()


def training_flops(recipe: Recipe) -> float:
    """Of the whole training; validation and the final evaluation come on top."""
    images, classes, image_size = DATA[recipe.data.source]
    images = min(images, recipe.data.limit_train or images)
    images -= min(1000, images // 10) if recipe.data.held_out is None else recipe.data.held_out
    return images * recipe.optim.epochs * training_passes(recipe) * forward_flops(recipe, classes, image_size)


def main(paths: list[str]) -> int:
    """Print one line per recipe."""
    for path in paths:
        model = yaml.safe_load(Path(path).read_text()).get("model")
        if model is None or model["name"].startswith("data/"):
            print(f"{Path(path).name:36} takes its network from elsewhere: a recipe before it, or a saved model")
            continue
        flops = training_flops(Recipe.load(path, ["--model.pretrained=false"]))
        print(f"{Path(path).name:36} {flops:.1e} FLOP, {flops / 3.6e16:7.2f} h at 10 TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
