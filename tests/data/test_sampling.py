"""The batches of an epoch: what is in them, that they can be resumed, and how extra images join."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from timm_fsr.data.augment import Augmentation, ResizedCrop, from_pictures, to_pictures
from timm_fsr.data.dataset import ImageData
from timm_fsr.data.decoding import ArrayPictures, Rows
from timm_fsr.data.policy import Policy
from timm_fsr.data.sampling import epoch_batches, epoch_order, epoch_steps, training_batches
from timm_fsr.data.streaming import StreamedData
from timm_fsr.data.timm_augment import Erasing, Mixing, TimmAugmentation
from timm_fsr.utils.random import derive_generator

STILL = Augmentation(padding=0, flip=False)
MOVED = Augmentation(padding=2)


def numbered(count: int, *, start: int = 0, name: str = "own") -> ImageData:
    """Images of one colour each, pixel (start + i) of 255 in image i, and label i % 3."""
    images = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 6).clone()
    images[:, :, 0] //= 2  # so that cropping and mirroring show
    images[:, :, :, 0] //= 3
    return ImageData(images, torch.arange(count) % 3, ("a", "b", "c"), name)


def streamed(data: ImageData) -> StreamedData:
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    rows = Rows(data.name, [], None, ArrayPictures(pixels))
    return StreamedData(rows, torch.arange(len(data)), data.labels, data.classes, data.name, (6, 6), workers=0)


def numbers(images: torch.Tensor) -> list[int]:
    """Which `numbered` images these are, if they were not moved."""
    return (images[:, 0, -1, -1] * 255).round().long().tolist()


CHANGED = TimmAugmentation(policy=Policy("rand-m9-mstd0.5-inc1-p0.9"), erasing=Erasing(0.5))
OWN, EXTRA = numbered(50), numbered(30, start=100, name="more")
KINDS = {
    "plain": {"data": OWN, "augmentation": MOVED},
    "extra": {"data": OWN, "augmentation": MOVED, "extra": EXTRA, "extra_fraction": 0.7},
    "streamed": {"data": streamed(OWN), "augmentation": MOVED},
    "resized crop": {"data": streamed(OWN), "augmentation": ResizedCrop()},
    "resized crop in memory": {"data": OWN, "augmentation": ResizedCrop()},
    "timm": {"data": OWN, "augmentation": MOVED, "then": CHANGED},
    "timm, streamed": {"data": streamed(OWN), "augmentation": ResizedCrop(), "then": CHANGED},
    "timm, extra": {
        "data": OWN,
        "augmentation": ResizedCrop(),
        "then": CHANGED,
        "extra": EXTRA,
        "extra_fraction": 0.7,
    },
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
class TestEveryKind:
    @pytest.mark.parametrize("start_step", [1, 4, 5])
    def test_resuming_gives_the_remaining_batches(self, kind, start_step):
        options = {**kind, "batch_size": 5, "seed": 1, "epoch": 2, "rank": 1, "world_size": 2}
        whole = list(training_batches(**options))
        torch.manual_seed(start_step)
        rest = list(training_batches(**options, start_step=start_step))
        assert len(whole) == 5
        assert len(rest) == 5 - start_step
        for batch, again in zip(whole[start_step:], rest, strict=True):
            assert all(map(torch.equal, batch, again))

    def test_shapes_and_ranges(self, kind):
        for images, labels in training_batches(**kind, batch_size=8, seed=0, epoch=0):
            assert (images.shape, images.dtype) == ((8, 3, 6, 6), torch.float32)
            assert (labels.shape, labels.dtype) == ((8,), torch.int64)
            assert 0 <= images.min() <= images.max() <= 1

    def test_leaves_the_global_generator_alone(self, kind):
        state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        list(training_batches(**kind, batch_size=8, seed=0, epoch=0))
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == python
        assert np.random.get_state()[1].tolist() == numpy

    def test_follows_seed_epoch_and_rank(self, kind):
        def first(**changes: int) -> torch.Tensor:
            options = {"batch_size": 8, "seed": 0, "epoch": 0, "rank": 0, "world_size": 2, **changes}
            return next(training_batches(**kind, **options))[0]

        assert torch.equal(first(), first())
        for changes in ({"seed": 1}, {"epoch": 1}, {"rank": 1}):
            assert not torch.equal(first(), first(**changes))

    def test_refuses_at_once(self, kind):
        with pytest.raises(ValueError, match="50 images do not fill one batch of 60"):
            training_batches(**kind, batch_size=60, seed=0, epoch=0)
        with pytest.raises(ValueError, match="start_step=6 of 5"):
            training_batches(**kind, batch_size=10, seed=0, epoch=0, start_step=6)
        with pytest.raises(ValueError, match="rank=2 of 2"):
            training_batches(**kind, batch_size=10, seed=0, epoch=0, rank=2, world_size=2)


@pytest.mark.parametrize("data", [OWN, streamed(OWN)], ids=["in memory", "streamed"])
@pytest.mark.parametrize("start_step", [0, 2])
def test_plain_batches_by_hand(data, start_step):
    place = {"seed": 3, "epoch": 1, "rank": 1, "world_size": 2}
    given = list(training_batches(data, batch_size=7, **place, augmentation=MOVED, start_step=start_step))
    expected = []
    for step, indices in enumerate(epoch_batches(len(OWN), 7, **place)):
        images = OWN.images[indices].float() / 255
        expected.append((MOVED(images, derive_generator(3, 1, step, 1)), OWN.labels[indices]))
    assert len(given) == 3 - start_step
    for batch, by_hand in zip(given, expected[start_step:], strict=True):
        assert all(map(torch.equal, batch, by_hand))


@pytest.mark.parametrize("kind", ["plain", "streamed"])
def test_ranks_see_each_image_once_in_an_epoch(kind):
    options = {**KINDS[kind], "augmentation": STILL, "batch_size": 5, "seed": 0, "epoch": 0, "world_size": 2}
    ranks = [[numbers(images) for images, _ in training_batches(**options, rank=rank)] for rank in range(2)]
    assert sorted(number for rank in ranks for batch in rank for number in batch) == list(range(50))


class TestExtra:
    def epochs(self, epochs: int, *, fraction: float, batch_size: int = 6, world_size: int = 2, extra=EXTRA):
        """(epoch, step, rank) -> image numbers, and how many of a batch are own ones."""
        found = {}
        for epoch in range(epochs):
            for rank in range(world_size):
                batches = training_batches(
                    OWN,
                    batch_size=batch_size,
                    seed=5,
                    epoch=epoch,
                    rank=rank,
                    world_size=world_size,
                    augmentation=STILL,
                    extra=extra,
                    extra_fraction=fraction,
                )
                for step, (images, labels) in enumerate(batches):
                    which = numbers(images)
                    assert labels.tolist() == [number % 100 % 3 for number in which]
                    found[epoch, step, rank] = which
        return dict(sorted(found.items()))

    @pytest.mark.parametrize(("fraction", "count"), [(0.5, 3), (0.7, 4), (1e-6, 1), (0.999, 5)])
    def test_share_and_length_of_an_epoch(self, fraction, count):
        found = self.epochs(1, fraction=fraction)
        assert len(found) == 2 * epoch_steps(50, 6, world_size=2)
        for which in found.values():
            assert [number >= 100 for number in which] == [False] * (6 - count) + [True] * count

    def test_own_images_are_the_first_of_the_epoch_order(self):
        found = self.epochs(2, fraction=0.5)
        for epoch in range(2):
            own = [number for key, which in found.items() if key[0] == epoch for number in which[:3]]
            assert own == epoch_order(50, seed=5, epoch=epoch)[: len(own)].tolist()

    @pytest.mark.parametrize("count", [30, 7, 2, 1])
    def test_extra_images_go_on_from_epoch_to_epoch(self, count):
        """One after the other over steps and ranks, each once before any comes again, in ever new order."""
        found = self.epochs(4, fraction=0.7, extra=EXTRA.head(count))
        order = [number - 100 for which in found.values() for number in which[2:]]
        assert len(order) == 4 * 4 * 2 * 4
        rounds = [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
        assert all(sorted(part) == list(range(count)) for part in rounds)
        assert count < 7 or rounds[0] != rounds[1]

    def test_does_not_touch_what_one_process_would_see(self):
        one = self.epochs(1, fraction=0.5, batch_size=12, world_size=1)
        two = self.epochs(1, fraction=0.5, batch_size=6, world_size=2)
        for step in range(4):
            own, more = one[0, step, 0][:6], one[0, step, 0][6:]
            assert own == two[0, step, 0][:3] + two[0, step, 1][:3]
            assert more == two[0, step, 0][3:] + two[0, step, 1][3:]

    def test_both_kinds_are_augmented(self):
        place = {"batch_size": 6, "seed": 0, "epoch": 1, "extra": EXTRA, "extra_fraction": 0.5}
        still = list(training_batches(OWN, **place, augmentation=STILL))
        moved = list(training_batches(OWN, **place, augmentation=MOVED))
        for step, (images, _) in enumerate(moved):
            assert torch.equal(images, MOVED(still[step][0], derive_generator(0, 1, step, 0)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"extra_fraction": 0.0}, "extra_fraction=0.0 is no share"),
            ({"extra_fraction": 1.0}, "extra_fraction=1.0 is no share"),
            ({"extra": None}, "extra_fraction=0.5 is a share of no images"),
            ({"batch_size": 1}, "a batch of 1 has no place for two kinds"),
            ({"extra": dataclasses.replace(EXTRA, classes=("a", "c", "b"))}, "more has 3 classes .* load it with the"),
            ({"extra": dataclasses.replace(EXTRA, images=EXTRA.images[:, :1])}, r"images of \(1, 6, 6\), but own"),
            ({"data": streamed(OWN)}, "own is streamed and takes no extra images; .* leave out more"),
        ],
    )
    def test_refuses(self, changes, message):
        options = {"data": OWN, "batch_size": 6, "augmentation": STILL, "extra": EXTRA, "extra_fraction": 0.5}
        with pytest.raises(ValueError, match=message):
            training_batches(**{**options, **changes}, seed=0, epoch=0)


class TestByTimm:
    """Policy, erasing, mixing, and the resized crop of images in memory."""

    def test_the_order_by_hand(self):
        """Crop and flip, policy, mixing, erasing, each by the seeds that its position gives."""
        then = dataclasses.replace(CHANGED, mixing=Mixing(3, mixup=0.8, cutmix=1.0))
        place = {"seed": 3, "epoch": 1, "rank": 1, "world_size": 2}
        given = list(training_batches(OWN, batch_size=6, **place, augmentation=MOVED, then=then))
        for step, indices in enumerate(epoch_batches(len(OWN), 6, **place)):
            moved = MOVED(OWN.images[indices].float() / 255, derive_generator(3, 1, step, 1))

            def seeds(stream: str, indices: torch.Tensor = indices) -> list[int]:
                return [derive_generator(3, 1, i, 0, stream=stream).initial_seed() for i in indices.tolist()]

            changed = from_pictures(then.policy.over(to_pictures(moved), seeds("policy")))
            mixing = derive_generator(3, 1, step, 1, stream="mixing").initial_seed()
            mixed, shares = then.mixing(changed, OWN.labels[indices], mixing)
            assert torch.equal(given[step][0], then.erasing(mixed, seeds("erasing")))
            assert torch.equal(given[step][1], shares)
            assert not torch.equal(changed, moved)
            assert not torch.equal(mixed, changed)

    def test_resumed_mixing(self):
        then = TimmAugmentation(mixing=Mixing(3, mixup=0.5, cutmix=0.5, mode="elem"))
        options = {"batch_size": 8, "seed": 1, "epoch": 0, "augmentation": MOVED, "then": then}
        whole = list(training_batches(OWN, **options))
        for one, other in zip(whole[4:], training_batches(OWN, **options, start_step=4), strict=True):
            assert all(map(torch.equal, one, other))
        assert whole[0][1].shape == (8, 3)

    @pytest.mark.parametrize("kind", ["in memory", "with extra", "streamed", "as decoded"])
    def test_each_image_is_changed_alike_on_one_process_and_on_two(self, kind):
        more = {"extra": EXTRA, "extra_fraction": 0.5} if kind == "with extra" else {}
        data = streamed(OWN) if kind in ("streamed", "as decoded") else OWN
        crop = STILL if kind == "streamed" else ResizedCrop()

        def epoch(world_size: int) -> list[list[float]]:
            options = {"seed": 5, "epoch": 1, "augmentation": crop, "then": CHANGED, **more}
            ranks = [
                list(training_batches(data, batch_size=12 // world_size, world_size=world_size, rank=rank, **options))
                for rank in range(world_size)
            ]
            # In order of content: with extra images the two kinds alternate differently.
            return sorted(image.flatten().tolist() for step in zip(*ranks, strict=True) for b, _ in step for image in b)

        one = epoch(1)
        assert one == epoch(2)
        assert len(one) == 48

    def test_a_resized_crop_of_images_in_memory_is_that_of_the_same_streamed_ones(self):
        options = {"batch_size": 8, "seed": 0, "epoch": 2, "augmentation": ResizedCrop()}
        for data, then in ((OWN, None), (OWN, CHANGED)):
            held = list(training_batches(data, **options, then=then))
            decoded = list(training_batches(streamed(data), **options, then=then))
            assert all(torch.equal(one[0], other[0]) for one, other in zip(held, decoded, strict=True))
        assert held[0][0].shape == (8, 3, 6, 6)

    def test_grey_images(self):
        grey = dataclasses.replace(OWN, images=OWN.images[:, :1])
        then = TimmAugmentation(policy=Policy("rand-p1", fill=(0.5,)), erasing=Erasing(1.0, mean=(0.5,), std=(0.5,)))
        for data in (grey, dataclasses.replace(streamed(grey), mode="L")):
            images, _ = next(training_batches(data, batch_size=8, seed=0, epoch=0, augmentation=MOVED, then=then))
            assert images.shape == (8, 1, 6, 6)
