"""Data in memory: batches, splits, the order of an epoch and augmentation."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch
from torch.nn import functional as F

import timm_fsr.data.dataset
import timm_fsr.data.decoding
import timm_fsr.data.folders
import timm_fsr.data.sampling
import timm_fsr.data.sources
import timm_fsr.data.streaming
from timm_fsr.data.augment import Augmentation, random_crop_flip
from timm_fsr.data.dataset import ImageData
from timm_fsr.data.sampling import epoch_batches, epoch_order, epoch_steps
from timm_fsr.utils.random import derive_generator


def make_data(counts: tuple[int, ...], size: tuple[int, int, int] = (1, 2, 2)) -> ImageData:
    """Random images, `counts[i]` of class i, shuffled."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(256, (len(labels), *size), dtype=torch.uint8, generator=generator)
    return ImageData(images, labels, tuple(f"class {i}" for i in range(len(counts))), "random")


class TestImageData:
    def test_batches_are_pixels_over_255_in_natural_order(self):
        data = make_data((4, 3))
        batches = list(data.batches(3))
        images = torch.cat([images for images, _ in batches])
        assert [len(labels) for _, labels in batches] == [3, 3, 1]
        assert torch.equal(images, data.images / 255)
        assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)

    def test_batch_at_indices(self):
        data = make_data((4, 3))
        images, labels = data.batch(torch.tensor([5, 0]))
        assert images.dtype == torch.float32
        assert torch.equal(images, data.images[[5, 0]] / 255)
        assert torch.equal(labels, data.labels[[5, 0]])

    def test_properties(self):
        data = make_data((4, 3), (3, 5, 7))
        assert (len(data), data.num_classes, data.image_size) == (7, 2, (3, 5, 7))
        assert len(data.head(2)) == 2
        assert data.to("cpu").fingerprint == data.fingerprint

    def test_it_prints_as_one_line(self):
        data = make_data((2, 1), size=(3, 4, 5))
        assert str(data) == f"{data.name}: 3 images of 3 x 4 x 5 pixels, 2 classes"
        assert repr(data) == f"<ImageData: {data}>"

    def test_fingerprint_follows_pixels_labels_and_order(self):
        data = make_data((4, 3))
        flipped = ImageData(data.images, 1 - data.labels, data.classes, data.name)
        brighter = ImageData(data.images ^ 1, data.labels, data.classes, data.name)
        backwards = data.take(torch.arange(7).flip(0))
        prints = {other.fingerprint for other in (data, flipped, brighter, backwards, data.head(6))}
        assert len(prints) == 5
        assert data.take(torch.arange(7)).fingerprint == data.fingerprint
        assert re.fullmatch("[0-9a-f]{16}", data.fingerprint)

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), "uint8"),
            (torch.zeros(2, 3, 3).byte(), torch.zeros(2).long(), "N, C, H, W"),
            (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2), "int64"),
            (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(3).long(), "one label for each of 2"),
            (torch.zeros(0, 1, 3, 3).byte(), torch.zeros(0).long(), "no images"),
            (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 2]), "from 0 to 2 but 2 classes"),
            (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([-1, 0]), "use a split with labels"),
        ],
    )
    def test_refuses(self, images, labels, message):
        with pytest.raises(ValueError, match=message):
            ImageData(images, labels, ("a", "b"), "x")


class TestSplit:
    def test_is_disjoint_complete_and_stratified(self):
        data = make_data((50, 30, 20))
        indexed = ImageData(data.images, data.labels, data.classes, "x")
        indexed.images[:, 0, 0, 0] = torch.arange(100)
        rest, held_out = indexed.split(0.3, seed=1)
        assert held_out.labels.bincount().tolist() == [15, 9, 6]
        positions = torch.cat([part.images[:, 0, 0, 0] for part in (rest, held_out)])
        assert positions.sort().values.tolist() == list(range(100))
        for part in (rest, held_out):
            assert part.images[:, 0, 0, 0].long().diff().min() > 0
            assert "seed 1" in part.name

    def test_depends_on_seed_only(self):
        data = make_data((50, 30, 20))
        first = data.split(40, seed=3)[1].fingerprint
        torch.manual_seed(99)
        assert data.split(40, seed=3)[1].fingerprint == first
        assert data.split(40, seed=4)[1].fingerprint != first

    def test_count_is_exact_where_shares_are_not_whole(self):
        drawn = make_data((7, 5, 3, 1)).subset(9, seed=0).labels.bincount(minlength=4)
        assert drawn.sum() == 9
        assert (drawn - torch.tensor([7, 5, 3, 1]) * 9 / 16).abs().max() < 1

    def test_balanced_data_gives_a_balanced_subset(self):
        assert make_data((20, 20, 20)).subset(12).labels.bincount().tolist() == [4, 4, 4]

    @pytest.mark.parametrize("held_out", [0, 10, -1, 0.0, 1.0, 0.01])
    def test_refuses_an_empty_part(self, held_out):
        with pytest.raises(ValueError, match="use a count from 1 to 9"):
            make_data((5, 5)).split(held_out)


@pytest.mark.parametrize(
    "module",
    [
        timm_fsr.data.sampling,
        timm_fsr.data.dataset,
        timm_fsr.data.decoding,
        timm_fsr.data.folders,
        timm_fsr.data.sources,
        timm_fsr.data.streaming,
    ],
)
def test_heavy_packages_are_imported_when_needed(module, monkeypatch):
    for name in ("datasets", "pyarrow", "pandas", "accelerate", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)  # so that importing it raises
    runpy.run_path(module.__file__)


class TestGenerator:
    def test_depends_on_each_argument_and_on_nothing_else(self):
        places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        states = [derive_generator(*place).initial_seed() for place in places]
        states += [derive_generator(0, 0, 0, 0, stream=stream).initial_seed() for stream in ("attack", "model")]
        assert len(set(states)) == len(states)
        torch.manual_seed(5)
        assert derive_generator(0, 0, 0, 0).initial_seed() == states[0]

    def test_is_the_same_everywhere(self):
        # Fixed by SHA-256 alone: another value means that no earlier run can be resumed or repeated.
        assert derive_generator(1, 2, 3, 4).initial_seed() == 9496999786477100588


class TestEpochBatches:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_ranks_share_each_global_batch(self, world_size):
        order = epoch_order(50, seed=1, epoch=2)
        ranks = [
            list(epoch_batches(50, 4, seed=1, epoch=2, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        steps = epoch_steps(50, 4, world_size=world_size)
        assert [len(rank) for rank in ranks] == [steps] * world_size
        together = torch.cat([torch.cat(parts) for parts in zip(*ranks, strict=True)])
        assert torch.equal(together, order[: steps * 4 * world_size])

    def test_order_is_a_permutation_from_seed_and_epoch(self):
        order = epoch_order(50, seed=1, epoch=2)
        assert order.sort().values.tolist() == list(range(50))
        torch.manual_seed(5)
        assert torch.equal(order, epoch_order(50, seed=1, epoch=2))
        assert not torch.equal(order, epoch_order(50, seed=1, epoch=3))
        assert not torch.equal(order, epoch_order(50, seed=2, epoch=2))

    @pytest.mark.parametrize("start_step", [0, 3, 12])
    def test_start_step_skips(self, start_step):
        whole = list(epoch_batches(50, 4, seed=0, epoch=0))
        resumed = list(epoch_batches(50, 4, seed=0, epoch=0, start_step=start_step))
        assert len(resumed) == len(whole) - start_step
        assert all(map(torch.equal, resumed, whole[start_step:]))

    def test_last_batch_is_shared(self):
        ranks = [
            list(epoch_batches(21, 4, seed=0, epoch=0, rank=rank, world_size=2, drop_last=False)) for rank in range(2)
        ]
        assert [[len(batch) for batch in rank] for rank in ranks] == [[4, 4, 3], [4, 4, 2]]
        assert len(set(torch.cat([*ranks[0], *ranks[1]]).tolist())) == 21
        assert epoch_steps(17, 4, world_size=2, drop_last=False) == 2  # one image cannot feed two ranks

    def test_refuses(self):
        with pytest.raises(ValueError, match="3 images do not fill one batch of 4"):
            epoch_batches(3, 4, seed=0, epoch=0)
        with pytest.raises(ValueError, match="start_step=3 of 2"):
            epoch_batches(8, 4, seed=0, epoch=0, start_step=3)
        with pytest.raises(ValueError, match="rank=2 of 2"):
            epoch_batches(8, 4, seed=0, epoch=0, rank=2, world_size=2)


class TestAugmentation:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize("flip", [True, False])
    @pytest.mark.parametrize("padding", [0, 2])
    def test_equals_a_loop_over_images(self, dtype, flip, padding):
        images = torch.randint(1, 256, (40, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
        augmented = random_crop_flip(images, padding=padding, flip=flip, generator=derive_generator(0, 0, 0, 0))
        generator = derive_generator(0, 0, 0, 0)
        tops, lefts = torch.randint(2 * padding + 1, (2, 40, 1), generator=generator)
        mirrored = torch.rand(40, generator=generator) < 0.5
        expected = []
        for image, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
            crop = F.pad(image, (padding,) * 4)[:, int(top) : int(top) + 5, int(left) : int(left) + 7]
            expected.append(crop.flip(-1) if flip and mirror else crop)
        assert augmented.dtype == dtype
        assert torch.equal(augmented, torch.stack(expected))

    def test_draws_every_offset_and_both_directions(self):
        image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
        image[..., 2, 1:3] = torch.tensor([1, 2], dtype=torch.uint8)
        augmented = random_crop_flip(image.expand(2000, 1, 5, 5), padding=1, generator=derive_generator(0, 0, 0, 0))
        patterns, counts = augmented.flatten(1).unique(dim=0, return_counts=True)
        assert len(patterns) == 18  # nine offsets, each mirrored or not
        assert counts.min() > 2000 / 18 / 2

    def test_depends_on_its_generator_only(self):
        images = make_data((30,), (3, 8, 8)).images
        augment = Augmentation(padding=2)
        first = augment(images, derive_generator(0, 1, 2, 3))
        torch.manual_seed(7)
        assert torch.equal(first, augment(images, derive_generator(0, 1, 2, 3)))
        assert not torch.equal(first, augment(images, derive_generator(0, 1, 3, 3)))
        assert not torch.equal(first, augment(images, derive_generator(0, 1, 2, 0)))
        assert repr(augment) == "Augmentation(padding=2, flip=True)"
