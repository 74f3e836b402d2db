"""The recipes that begin with trained weights, on real images at a small size: Fashion-MNIST as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_fsr.data.dataset import load_data
from timm_fsr.hooks.attach import detach
from timm_fsr.models.saving import load, save_pretrained
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train

CLASSES = 3
SMALL = [
    "--data.held_out=6",
    "--optim.batch_size=12",
    "--evaluation.attacks=[fgsm]",
    "--evaluation.validation_steps=1",
    "--attack.steps=1",
    "--mixed_precision=no",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's first three classes as colour PNGs: 30 to train on, 12 to test on."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 30), ("test", 12)):
        data = load_data("fashion_mnist", split, progress=False)
        images, labels = next(data.batches(200))
        chosen = [index for index in range(len(labels)) if labels[index] < CLASSES][:count]
        for index in chosen:
            file = root / split / data.classes[int(labels[index])].replace("/", " ") / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (images[index, 0] * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).convert("RGB").save(file)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain network of other classes, as somebody would have saved it."""
    torch.manual_seed(0)
    model = timm.create_model("resnet_tiny_cifar", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 28, 28)})
    return Path(save_pretrained(model, tmp_path_factory.mktemp("backbone") / "robust"))


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_own_images_on_a_trained_backbone(pictures, backbone, tmp_path):
    """Timm's weights would be downloaded; the trained backbone here is a folder."""
    flags = [
        *SMALL,
        f"--data.source={pictures}",
        f"--model.name={backbone}",
        "--model.pretrained=false",
        "--data.size=28",
        "--data.workers=0",
        "--optim.epochs=2",
        f"--output={tmp_path / 'run'}",
    ]
    train(Recipe.load("finetune_folder", flags))
    found = lines(tmp_path / "run")
    assert len(found) == 2
    assert all(math.isfinite(value) for line in found for value in line.values())
    model = load(str(tmp_path / "run" / "best"), pretrained=True)
    assert model.num_classes == CLASSES
    assert hasattr(model, "fsr")


def test_a_robust_backbone_stays_as_it_is_at_first(pictures, backbone, tmp_path):
    flags = [
        *SMALL,
        f"--data.source={pictures}",
        f"--model.name={backbone}",
        "--optim.freeze=1",
        f"--output={tmp_path / 'run'}",
    ]
    train(Recipe.load("finetune_robust", [*flags, "--optim.epochs=1"]))
    before = load(str(backbone), pretrained=True).state_dict()
    frozen = detach(load(str(tmp_path / "run" / "last"), pretrained=True)).state_dict()
    assert {key for key in before if not torch.equal(before[key], frozen[key])} == {"fc.weight", "fc.bias"} & set(
        before
    )

    train(Recipe.load("finetune_robust", [*flags, "--optim.epochs=2", "--overwrite=true"]))
    trained = detach(load(str(tmp_path / "run" / "last"), pretrained=True)).state_dict()
    moved = {
        key for key in before if before[key].shape == trained[key].shape and not torch.equal(before[key], trained[key])
    }
    assert {key for key in before if key.endswith(("conv1.weight", "running_mean"))} <= moved
