"""Masks laid over images: a panel for each site, in colours that follow the mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from timm_fsr.reports.overlays import draw_overlays


def drawn(path, image, masks) -> np.ndarray:
    draw_overlays("a $title with 100 % of 'signs'", image, masks, path / "x.png")
    with Image.open(path / "x.png") as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_high_is_bright_and_low_is_dark(tmp_path, channels):
    pixels = drawn(tmp_path, torch.full((channels, 16, 16), 0.5), {"layer4": torch.tensor([[0.0, 1.0]])})
    height, width = pixels.shape[:2]
    middle = pixels[height // 2]
    left, right = middle[int(0.53 * width)].astype(int), middle[int(0.82 * width)].astype(int)
    assert right.sum() > left.sum() + 100
    assert right[0] > right[2] + 50, "the top of the colours is yellow"
    image = middle[int(0.25 * width)]
    assert image.tolist() == pytest.approx([128] * 3, abs=2)


def test_each_site_has_a_panel_and_rows_are_filled(tmp_path):
    image, mask = torch.rand(3, 8, 8), torch.rand(2, 2)
    shapes = {
        count: drawn(tmp_path, image, {f"stages.{index}": mask for index in range(count)}).shape for count in (1, 3, 4)
    }
    assert shapes[1][1] < shapes[3][1]
    assert shapes[4][0] > shapes[3][0]
    assert shapes[4][1] < shapes[3][1], "three and two panels, not four and one"


def test_a_mask_that_is_the_same_everywhere_and_an_image_that_is_no_square(tmp_path):
    pixels = drawn(tmp_path, torch.rand(3, 8, 24), {"layer4": torch.full((1, 3), 0.5)})
    assert pixels.shape[0] < pixels.shape[1]
