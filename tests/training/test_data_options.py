"""The data part of a recipe: extra images, streamed images, and what is refused before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_fsr.data.augment import Augmentation, ResizedCrop
from timm_fsr.data.dataset import ImageData
from timm_fsr.data.policy import Policy
from timm_fsr.data.streaming import StreamedData
from timm_fsr.data.timm_augment import Erasing, Mixing, TimmAugmentation
from timm_fsr.training.options import DataOptions
from timm_fsr.training.parsing import options_parser, read_options, write_options


@dataclass(frozen=True)
class Outer:
    """A recipe of data only."""

    data: DataOptions = field(default_factory=DataOptions)


def read(*flags: str) -> DataOptions:
    arguments = [f"--data.{flag}" for flag in flags]
    return read_options(Outer, arguments, options_parser(Outer, prog="x", description="x")).data


def generated(folder: Path, labels: int = 10) -> str:
    """An archive of 60 images of another size, in colour."""
    images = np.random.default_rng(0).integers(0, 256, (60, 14, 14, 3), np.uint8)
    np.savez(folder / "generated.npz", image=images, label=np.arange(60) % labels)
    return str(folder / "generated.npz")


def test_written_and_read_again():
    flags = ["extra_source=x.npz", "extra_fraction=7/10", "extra_limit=9", "extra_split=test"]
    options = read(*flags)
    assert (options.extra_fraction, options.extra_limit, options.extra_split) == (0.7, 9, "test")
    options = read("streamed=true", "size=8", "workers=1", "crop_scale=['1/4', 1]")
    assert options.augmentation() == ResizedCrop(scale=(0.25, 1.0), flip=True)
    assert "- 0.25" in write_options(options)
    assert read("streamed=true", "size=8").augmentation() == Augmentation(padding=4, flip=True)


class TestExtra:
    def test_gets_the_classes_and_size_of_the_others(self, tmp_path):
        options = DataOptions(extra_source=generated(tmp_path), extra_fraction=0.5, extra_limit=20)
        options.check()
        test = options.build_test(progress=False)
        extra = options.build_extra(test.classes, test.image_size, progress=False)
        assert isinstance(extra, ImageData)
        assert (extra.classes, extra.image_size, len(extra)) == (test.classes, (1, 28, 28), 20)
        assert extra.labels.bincount().tolist() == [2] * 10

    def test_none(self):
        assert DataOptions().build_extra(("a",), (3, 8, 8)) is None

    def test_of_other_classes(self, tmp_path):
        options = DataOptions(extra_source=generated(tmp_path, labels=12), extra_fraction=0.5)
        with pytest.raises(ValueError, match=r"generated\.npz.* labels from 0 to 11 but 10 classes"):
            options.build_extra(tuple("abcdefghij"), (3, 32, 32), progress=False)


class TestStreamed:
    def test_builds_the_same_parts_as_in_memory(self):
        common = {"limit_train": 60, "limit_test": 20, "held_out": 10, "size": 28}
        held, streamed = DataOptions(**common), DataOptions(**common, streamed=True, workers=0)
        streamed.check()
        for expected, data in zip(
            (*held.build(seed=1, progress=False), held.build_test(progress=False)),
            (*streamed.build(seed=1, progress=False), streamed.build_test(progress=False)),
            strict=True,
        ):
            assert isinstance(data, StreamedData)
            assert (data.name, data.workers) == (expected.name, 0)
            assert torch.equal(next(data.batches(60))[0], next(expected.batches(60))[0])


def photographs(folder: Path, count: int) -> str:
    """Two classes of noise."""
    for number in range(count):
        file = folder / ("ant", "owl")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        side = 8 + number % 3
        Image.fromarray(np.full((side, 9, 3), number, np.uint8)).save(file)
    return str(folder)


class TestTimm:
    def test_numbers_go_where_timm_has_them(self):
        options = read("mixup=4/5", "cutmix=1", "cutmix_minmax=[1/4, 0.5]", "mixup_prob=0.9", "mixup_switch_prob=0.3")
        options = replace(options, mixup_mode="elem", mixup_off_epoch=7, random_erasing=0.25, erasing_mode="rand")
        options = replace(options, erasing_count=2, auto_augment="3a")
        options.check()
        found = options.timm_augmentation(num_classes=5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        assert found == TimmAugmentation(
            policy=Policy("3a", fill=(0.1, 0.2, 0.3)),
            mixing=Mixing(5, 0.8, 1.0, (0.25, 0.5), prob=0.9, switch_prob=0.3, mode="elem", off_epoch=7),
            erasing=Erasing(0.25, "rand", 2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        )

    def test_nothing(self):
        assert read("crop_padding=2").timm_augmentation(num_classes=5, mean=(0.5,), std=(0.5,)) is None

    def test_boxes_are_checked_against_the_images(self):
        options = DataOptions(cutmix_minmax=[0.31, 0.39])
        options.check()
        options.check_boxes((3, 32, 32))
        with pytest.raises(ValueError, match=r"^data\.cutmix_minmax=\[0\.31, 0\.39\] leaves no box .* side of 10"):
            options.check_boxes((3, 32, 10))


class TestHeldOut:
    @pytest.mark.parametrize(("images", "held_out"), [(4, 1), (30, 3), (60, 6)])
    def test_is_a_tenth_of_a_small_folder(self, tmp_path, images, held_out):
        options = DataOptions(source=photographs(tmp_path, images), size=8)
        rest, held = options.build(seed=0, progress=False)
        assert (len(rest), len(held)) == (images - held_out, held_out)

    def test_is_what_it_was_where_there_are_plenty(self):
        named, default = (DataOptions(held_out=held).build(seed=3, progress=False) for held in (1000, None))
        assert [part.name for part in named] == [part.name for part in default]
        assert named[1].fingerprint == default[1].fingerprint

    def test_too_few_images(self, tmp_path):
        source = photographs(tmp_path, 5)
        with pytest.raises(ValueError, match=r"hold out 1000 of the 5 images .* lower data\.held_out \(null"):
            DataOptions(source=source, size=8, held_out=1000).build(seed=0, progress=False)
        with pytest.raises(ValueError, match="hold out 1 of the 1 images"):
            DataOptions(source=source, size=8, limit_train=1).build(seed=0, progress=False)


class TestReading:
    def test_test_images_get_the_size_of_the_training_images(self, tmp_path):
        options = DataOptions(source=photographs(tmp_path, 9), test_split="train")
        rest, _ = options.build(seed=0, progress=False, mixed_size=(6, 5))
        assert rest.image_size == (3, 6, 5)
        assert options.build_test(rest.classes, progress=False, image_size=rest.image_size).image_size == (3, 6, 5)
        sized = DataOptions(source=str(tmp_path), test_split="train", size=4)
        assert sized.build_test(rest.classes, progress=False, image_size=(3, 6, 5)).image_size == (3, 4, 4)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_broken_images(self, tmp_path, streamed):
        source = photographs(tmp_path, 9)
        (tmp_path / "ant" / "0.png").write_bytes(b"x")
        options = DataOptions(source=source, size=8, streamed=streamed, workers=0)
        with pytest.raises(ValueError, match=r"ant/0\.png \(not an image\); replace them, or set data\.on_error=skip"):
            options.build(seed=0, progress=False)
        rest, held = replace(options, on_error="skip").build(seed=0, progress=False)
        assert (len(rest) + len(held), rest.skipped) == (8, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["extra_fraction=0.5"], "about data.extra_source, which is not set"),
        (["extra_limit=5"], "about data.extra_source, which is not set"),
        (["extra_source=x"], r"extra_fraction=0\.0 is no share .* such as 0\.7"),
        (["extra_source=x", "extra_fraction=1"], r"extra_fraction=1\.0 is no share"),
        (["streamed=true"], r"set data\.size"),
        (["crop_scale=[0,1]"], r"crop_scale=\[0\.0, 1\.0\] is no range"),
        (["auto_augment=rnd"], r"data\.auto_augment=rnd: unknown auto_augment policy 'rnd'; did you mean 'rand'"),
        (["auto_augment=rand-x5"], r"^data\.auto_augment='rand-x5' has the section 'x5'"),
        (["random_erasing=2"], r"^data\.random_erasing=2\.0 must lie in \[0, 1\]"),
        (
            ["erasing_count=2"],
            r"erasing_count=2 has no meaning without data\.random_erasing; .* --data\.erasing_count=1",
        ),
        (["mixup=-1"], r"^data\.mixup=-1\.0 must be 0 or more"),
        (["mixup_mode=elem"], r"mixup_mode=elem has no meaning without data\.mixup or data\.cutmix"),
        (["mixup=1", "mixup_switch_prob=0.1"], "no meaning unless data.mixup and data.cutmix are both on"),
        (["cutmix_minmax=[0.8,0.2]"], r"^data\.cutmix_minmax=\[0\.8, 0\.2\] is no range of sides"),
        (["streamed=true", "size=8", "crop_scale=[0,1]"], r"crop_scale=\[0\.0, 1\.0\] is no range"),
        (["streamed=true", "size=8", "extra_source=x", "extra_fraction=0.5"], "leave out one of the two"),
        (["workers=-1"], "workers=-1 must be 0 or more"),
        (["held_out=0"], "held_out=0 must be at least 1"),
        (["crop_padding=-1"], "crop_padding=-1 must be 0 or more"),
    ],
)
def test_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        read(*flags).check()
