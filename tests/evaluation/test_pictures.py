"""Pictures of attacks: what they need, and that they show what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import images, labels, tiny_resnet, with_fsr

from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation.examples import attack_picture, laid_over

CLASSES = [f"class {index}" for index in range(10)]
ATTACK = PGD(eps=0.1, steps=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_there_is_a_row_per_image(channels):
    model = with_fsr(tiny_resnet(in_chans=channels))
    heights = []
    for count in (1, 3):
        picture = attack_picture(model, images(count)[:, :channels], labels(count), CLASSES, ATTACK)
        assert picture.mode == "RGB"
        heights.append(picture.height)
    assert heights[1] - heights[0] > 2 * 100


def test_the_first_tile_is_the_clean_image():
    picture = attack_picture(with_fsr(tiny_resnet()), torch.zeros(1, 3, 32, 32), labels(1), CLASSES, ATTACK)
    black = (np.asarray(picture) == 0).all(axis=2)
    rows, columns = black.any(axis=1).nonzero()[0], black[:, :122].any(axis=0).nonzero()[0]
    assert black[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum() >= 112 * 112


def test_masks_are_laid_over_the_image():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1.0
    left, right = (
        np.asarray(laid_over(image, mask)).reshape(112, 2, 56, 3).mean(axis=(0, 2)).T[:, :2].T
        for mask in (torch.zeros(4, 4), torch.ones(4, 4))
    )
    for tile in (left, right):
        assert (tile[1] - tile[0] > 80).all(), "the image shows through"
    assert right[0][0] - left[0][0] > 80, "and the mask has its colour: yellow is high"
    assert right[0][2] < left[0][2], "dark blue is low"


def test_the_seed_decides_the_attack():
    model = with_fsr(tiny_resnet())
    one, same, other = (
        attack_picture(model, images(2), labels(2), CLASSES, ATTACK, seed=seed).tobytes() for seed in (0, 0, 1)
    )
    assert one == same != other


def test_a_model_without_a_mask_is_refused():
    with pytest.raises(KeyError, match="no site of the model has a mask; attach a layer such as 'fsr'"):
        attack_picture(tiny_resnet(), images(2), labels(2), CLASSES, ATTACK)
