"""Policies by timm's configuration strings: the same draws as timm's, in any mode, and no string misunderstood."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from timm_fsr.data.policy import Policy

NAMES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m0-n4-p1",  # posterizes to 0 bits, which Pillow 13 refuses
    "rand-m10-n4-p1-inc1",
    "rand-m15-mmax20-mstd101",
    "rand-tweights-n4-p1",
    "rand-t3aw-m5",
    "augmix-m5-w2-d2",
    "augmix-b1-a0.5",
    "original-mstd0.5",
    "originalr",
    "v0",
    "v0r",
    "3a",
]


def picture(mode: str = "RGB") -> Image.Image:
    shape = (20, 28, 3) if mode == "RGB" else (20, 28)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def by_timm(name: str, seed: int) -> Image.Image:
    """What timm's own training transform makes of `picture()`: the arguments are those of its factory."""
    params = {"translate_const": int(20 * 0.45), "img_mean": (124, 116, 104)}
    if name.startswith("augmix"):
        transform = augment_and_mix_transform(name, {**params, "translate_pct": 0.3})
    else:
        transform = (rand_augment_transform if name.startswith("rand") else auto_augment_transform)(name, params)
    random.seed(seed)
    np.random.seed(seed)
    return transform(picture())


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "augmix-m5-w2-d2", "original-mstd0.5", "3a"])
def test_draws_as_timm(name):
    policy, seeds = Policy(name, fill=(0.485, 0.456, 0.406)), range(20)
    found = policy.over([picture()] * 20, seeds)
    expected = [by_timm(name, seed) for seed in seeds]
    assert [np.asarray(image).tolist() for image in found] == [np.asarray(image).tolist() for image in expected]
    assert len({image.tobytes() for image in found}) > 2


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_keeps_size_and_mode_and_global_generators(name, mode):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    policy = Policy(name, fill=(0.5,) * (3 if mode == "RGB" else 1))
    found = policy.over([picture(mode)] * 60, range(60))
    assert {(image.mode, image.size) for image in found} == {(mode, (28, 20))}
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert found[7].tobytes() == policy.over([picture(mode)], [7])[0].tobytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rnd-m9", "unknown auto_augment policy 'rnd'; did you mean 'rand'"),
        ("", "unknown auto_augment policy ''"),
        ("rand-x5", "section 'x5', which 'rand' does not know; .* keys are m "),
        ("rand-mstd", "section 'mstd', which 'rand' does not know"),  # timm would leave it out
        ("rand-m", "section 'm', which 'rand' does not know"),
        ("original-m9", "section 'm9', which 'original' does not know; .* mstd"),
        ("augmix-n3", "section 'n3', which 'augmix' does not know"),
        ("rand-m9.5", "m=9.5, the magnitude, which must be a whole number"),
        ("rand-p1.5", "p=1.5, .* at least 0 and at most 1"),
        ("rand-n0", "n=0, .* at least 1"),
        ("rand-inc2", "inc=2"),
        ("augmix-a0", "a=0, .* above 0"),
        ("rand-m9-m8", "two sections 'm'"),
        ("rand-tweight", "unknown set of operations .* did you mean 'weights'"),
        ("rand-t3aw-n15", "draws 15 different operations .* t3aw has 14; lower n"),
    ],
)
def test_refuses_what_timm_would_misunderstand(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        Policy(name)
    assert "\n" not in str(caught.value)
