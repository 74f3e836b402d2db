"""Mixup, CutMix and random erasing of pixels, by timm's code."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from timm_fsr.data.timm_augment import Erasing, Mixing, TimmAugmentation

LABELS = torch.arange(8)  # image i is mixed with image 7 - i, of another class


def images(count: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 10, 12, generator=torch.Generator().manual_seed(0))


class TestMixing:
    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    @pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.3, 0.7)}], ids=str)
    def test_pixels_and_labels_are_mixed_in_the_same_proportion(self, mode, kind):
        given = images()
        mixed, shares = Mixing(8, **kind, mode=mode)(given, LABELS, 5)
        assert (shares.shape, shares.dtype) == ((8, 8), torch.float32)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(8))
        own, other = shares[LABELS, LABELS], shares[LABELS, LABELS.flip(0)]
        torch.testing.assert_close(own + other, torch.ones(8))
        if "mixup" in kind:
            weight = own.view(-1, 1, 1, 1)
            torch.testing.assert_close(mixed, weight * given + (1 - weight) * given.flip(0))
        else:
            kept = (mixed == given).all(dim=1)
            assert (kept | (mixed == given.flip(0)).all(dim=1)).all()
            torch.testing.assert_close(kept.float().mean(dim=(1, 2)), own)
        assert len({round(value, 5) for value in own.tolist()}) >= {"batch": 1, "pair": 3, "elem": 5}[mode]

    def test_the_seed_decides_and_nothing_else_changes(self):
        mix, given = Mixing(8, mixup=0.8, cutmix=1.0), images()
        states = random.getstate(), np.random.get_state()[1].tolist()
        one, again, other = (mix(given, LABELS, seed) for seed in (1, 1, 2))
        assert all(map(torch.equal, one, again))
        assert not torch.equal(one[1], other[1])
        assert torch.equal(given, images())
        assert states == (random.getstate(), np.random.get_state()[1].tolist())

    def test_switches(self):
        """By `switch_prob` CutMix or mixup, by `prob` nothing."""
        given = images()

        def changed(**options: float) -> list[Tensor]:
            return [Mixing(8, mixup=1.0, cutmix=1.0, **options)(given, LABELS, seed)[0] for seed in range(20)]

        def is_cut(mixed: Tensor) -> bool:
            return bool(((mixed == given) | (mixed == given.flip(0))).all())

        assert all(is_cut(mixed) for mixed in changed(switch_prob=1.0))
        assert not any(is_cut(mixed) for mixed in changed(switch_prob=0.0))
        assert 0 < sum(is_cut(mixed) for mixed in changed()) < 20
        assert all(torch.equal(mixed, given) for mixed in changed(prob=0.0))

    def test_white_stays_within_the_pixels(self):
        for seed in range(30):
            assert Mixing(8, mixup=1.0)(torch.ones(8, 3, 4, 4), LABELS, seed)[0].max() <= 1

    def test_from_its_last_epoch_on_labels_are_plain_again(self):
        then = TimmAugmentation(mixing=Mixing(8, mixup=1.0, off_epoch=2))
        place = {"keys": LABELS, "seed": 0, "step": 0, "rank": 0}
        assert then(images(), LABELS, epoch=1, **place)[1].shape == (8, 8)
        given, labels = then(images(), LABELS, epoch=2, **place)
        assert torch.equal(labels, LABELS)
        assert torch.equal(given, images())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mixup": -0.1}, "mixup=-0.1 must be 0 or more"),
            ({"cutmix": float("nan")}, "cutmix=nan must be 0 or more"),
            ({"prob": 1.1}, r"mixup_prob=1.1 must lie in \[0, 1\]"),
            ({"switch_prob": -1}, "mixup_switch_prob=-1 must lie"),
            ({"mode": "half"}, "mixup_mode='half' is none of batch"),
            ({"off_epoch": -1}, "mixup_off_epoch=-1 must be"),
            ({"cutmix_minmax": (0.5, 0.2)}, r"cutmix_minmax=\[0.5, 0.2\] is no range"),
            ({"cutmix_minmax": (0.5,)}, "is no range"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            Mixing(3, **{"mixup": 1.0, **options})

    def test_boxes_have_whole_pixels(self):
        Mixing(3, cutmix_minmax=(0.3, 0.5)).check_size(10, 12)
        with pytest.raises(ValueError, match="leaves no box of whole pixels in a side of 10; widen"):
            Mixing(3, cutmix_minmax=(0.31, 0.39)).check_size(30, 10)


class TestErasing:
    MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

    @pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_is_timms_on_the_normalised_image(self, mode, count):
        given, mean, std = images(), *(torch.tensor(values).view(3, 1, 1) for values in (self.MEAN, self.STD))
        found = Erasing(0.7, mode, count, mean=self.MEAN, std=self.STD)(given, list(range(8)))
        for seed in range(8):
            random.seed(seed)
            torch.manual_seed(seed)
            normal = (given[seed] - mean) / std
            erased = RandomErasing(0.7, mode=mode, max_count=count, device="cpu")(normal.clone())
            touched = (erased != normal).any(dim=0)
            torch.testing.assert_close(found[seed], (erased * std + mean).clamp(0, 1))
            assert torch.equal(found[seed][:, ~touched], given[seed][:, ~touched])
        share = (found != given).flatten(1).any(dim=1).float().mean()
        assert 0 < share < 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"probability": 1.5}, r"random_erasing=1.5 must lie in \[0, 1\]"),
            ({"mode": "noise"}, "erasing_mode='noise' is none of const"),
            ({"count": 0}, "erasing_count=0 must be at least 1"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            Erasing(**{"probability": 0.5, **options})
