"""What a run starts from: what cannot work with these images, this model and this machine is refused at the start."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from support.runs import metrics, tiny

from timm_fsr.hooks.site import layer_groups
from timm_fsr.models.saving import load
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.prepare import cautions, read_images
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer, train
from timm_fsr.utils import memory

ONE_PIXEL = [
    "--data.size=1",
    "--data.crop_padding=0",
]  # each BatchNorm sees one value of a channel and image


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("the training has started"))


def prepared(output: Path, *flags: str) -> Trainer:
    recipe = tiny(output, *flags)
    recipe.check()
    return Trainer.prepare(recipe, build_accelerator(recipe), Console(quiet=True))


@pytest.mark.usefixtures("no_training")
class TestRefused:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--data.test_split=train"], r"test_split=train holds the training images.*evaluation\.attacks=\[\]"),
            (["--data.test_split=validation"], "no split 'validation'; use one of: train, test"),
            (["--data.crop_padding=28"], "crop_padding=28 is no less than the side of the images, 28 pixels"),
            (["--data.size=100000"], r"120 images of 1x100000x100000 pixels .* need [\d,.]+ GiB .* smaller size"),
            (
                [*ONE_PIXEL, "--optim.batch_size=1"],
                "one image at a time, .* one value for each channel.*raise optim",
            ),
            ([*ONE_PIXEL, "--optim.batch_size=4", "--optim.accumulate=4"], r"one image at a time.* lower optim\.accum"),
            (
                ["--model.args.in_chans=3", "--data.channels=1"],
                r"in_chans=3 and data\.channels=1 contradict",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_data_and_model_tell_together(self, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            train(tiny(tmp_path / "new", *flags))
        assert not (tmp_path / "new").exists()

    def test_first_weights_that_are_nan(self, tmp_path, monkeypatch):
        def broken(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            with torch.no_grad():
                model.get_parameter("layer2.0.conv1.weight")[0] = torch.nan
            return model

        monkeypatch.setattr("timm_fsr.models.saving.load", broken)
        message = r"first weights of resnet_tiny_cifar hold NaN or infinite numbers \(in layer2\.0\.conv1\.weight; 1 of"
        with pytest.raises(ValueError, match=message):
            train(tiny(tmp_path))

    def test_a_model_that_returns_no_logits(self, tmp_path, monkeypatch):
        def headless(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            model.fc = torch.nn.Identity()
            return model

        monkeypatch.setattr("timm_fsr.models.saving.load", headless)
        with pytest.raises(ValueError, match=r"returns shape \(1, 64\) for one image, not a logit for each of 10"):
            train(tiny(tmp_path, "--model.layer=null"))

    def test_more_memory_than_there_is(self, tmp_path, monkeypatch):
        """On a machine of 60 MiB the images fit, and so do the weights, but not the feature maps of a step."""
        monkeypatch.setattr(memory, "total_memory", lambda _="cpu": 60 * 2**20)
        flags = ["--data.size=128", "--optim.epochs=1"]
        message = r"passes over 32 images of 1x128x128 need 0\.\d GiB .* has 0\.1 GiB; lower optim\.batch_size"
        with pytest.raises(ValueError, match=message):
            train(tiny(tmp_path, *flags))
        prepared(tmp_path, *flags, "--optim.accumulate=32")


@pytest.mark.parametrize(
    "flags",
    [
        [*ONE_PIXEL, "--optim.batch_size=2"],
        [*ONE_PIXEL, "--optim.batch_size=1", "--objective.name=trades"],  # its pass has the clean image too
        ["--optim.batch_size=1"],
        ["--data.test_split=train", "--evaluation.attacks=[]"],
        ["--data.crop_padding=27"],
    ],
    ids=" ".join,
)
def test_what_can_work_is_prepared(tmp_path, flags):
    prepared(tmp_path, *flags)


@pytest.mark.parametrize(("side", "said"), [(12, True), (16, False)])
def test_test_images_of_another_size_are_scaled_and_it_is_said(tmp_path, side, said):
    for split, pixels in (("train", 16), ("test", side)):
        for label in ("ant", "owl"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(20):
                Image.new("L", (pixels, pixels), number).save(tmp_path / split / label / f"{number}.png")
    flags = [f"--data.source={tmp_path}", "--data.limit_train=null", "--data.held_out=4", "--optim.batch_size=8"]
    recipe, printed = tiny(tmp_path / "out", *flags), io.StringIO()
    data, _, _ = read_images(recipe, build_accelerator(recipe), Console(file=printed, width=200))
    test = recipe.data.build_test(data.classes, progress=False, image_size=data.image_size)
    assert test.image_size == data.image_size == (1, 16, 16)
    sentence = "the first test image is 1x12x12 but the first training image 1x16x16: test images are scaled"
    assert (sentence in printed.getvalue()) is said


def test_looking_changes_nothing(tmp_path):
    """The passes on trial leave random numbers and BatchNorm statistics alone."""
    recipe = tiny(tmp_path, "--optim.batch_size=1")
    trainer = prepared(tmp_path, "--optim.batch_size=1")
    torch.manual_seed(recipe.seed)
    fresh = recipe.model.build(num_classes=10, image_size=(1, 28, 28))
    after = torch.get_rng_state()
    assert layer_groups(trainer.timm_model)
    expected = fresh.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trainer.timm_model.state_dict().items())
    prepared(tmp_path, "--optim.batch_size=1")
    assert torch.equal(torch.get_rng_state(), after)


class TestCautions:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["optim.ema_decay=0.999"], r"slow for 300 steps: at the end 74 % .*optim\.ema_warmup=true"),
            (["attack.warmup_epochs=3"], "warmup_epochs=3 of 3 epochs: the full eps is never trained at"),
            (["optim.schedule=step"], r"milestones=\[75\.0, 90\.0\] lie beyond the last of 3 epochs"),
        ],
    )
    def test_what_a_short_run_does_not_reach(self, flags, message):
        recipe = Recipe.load(overrides=["--optim.epochs=3", "--optim.schedule=constant", *(f"--{f}" for f in flags)])
        (found,) = cautions(recipe, 100)
        assert re.search(message, found), found
        assert cautions(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, epochs=100)), 100) == []

    @pytest.mark.parametrize(
        "flags",
        [
            ["--optim.ema_decay=0.999", "--optim.ema_warmup=true"],
            ["--optim.ema_decay=0.99"],
            ["--optim.schedule=step", "--optim.milestones=[2, 90]"],
            ["--attack.warmup_epochs=2.5"],
            ["--attack.warmup_epochs=3", "--objective.name=natural"],
        ],
        ids=" ".join,
    )
    def test_nothing_is_said_of_others(self, flags):
        recipe = Recipe.load(overrides=["--optim.epochs=3", "--optim.schedule=constant", *flags])
        assert cautions(recipe, 100) == []

    def test_it_is_printed_before_the_first_step(self, tmp_path, capsys):
        flags = ["--data.limit_train=60", "--optim.epochs=1", "--evaluation.attacks=[]", "--optim.ema_decay=0.999"]
        train(tiny(tmp_path, *flags))
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith("warning: optim.ema_decay=0.999 is slow for 1 steps")
        assert lines[2].startswith("epoch 1/1")
        assert len(metrics(tmp_path)) == 1
