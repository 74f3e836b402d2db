"""Examples: which images are chosen, and that their pictures open."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image
from support.tiny import images, labels, tiny_resnet, with_fsr

from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation.examples import _choose, draw_examples

NAMES = [f"class {index}" for index in range(10)]


def opened(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_open_in_their_own_size(channels):
    model = with_fsr(tiny_resnet(in_chans=channels)).eval()
    given = images(8)[:, :channels]
    found = draw_examples(model, given, labels(8), NAMES, PGD(eps=0.1, steps=2))
    assert json.loads(json.dumps(found)) == found
    assert len(found["images"]) == 6
    for image in found["images"]:
        assert {image["truth"], image["clean_class"], image["attacked_class"]} <= set(NAMES)
        for key in ("clean", "perturbation", "attacked"):
            assert opened(image[key]).size == (32, 32)
        (mask,) = image["masks"]
        assert mask["site"] == "layer4"
        assert all(opened(mask[key]).size == (4, 4) for key in ("clean", "attacked", "difference"))
    clean = opened(found["images"][0]["clean"])
    assert clean.getpixel((0, 0))[0] == round(255 * float(given[0, 0, 0, 0]))


def test_a_model_without_masks():
    found = draw_examples(tiny_resnet().eval(), images(2), labels(2), NAMES, PGD(eps=0.1, steps=1))
    assert [image["masks"] for image in found["images"]] == [[], []]


def test_the_perturbation_is_magnified_to_the_full_range():
    found = draw_examples(tiny_resnet().eval(), images(2), labels(2), NAMES, PGD(eps=0.1, steps=3))
    assert found["magnification"] == pytest.approx(5, rel=1e-3)
    values = [opened(image["perturbation"]).getextrema() for image in found["images"]]
    assert max(high for bands in values for _, high in bands) >= 254


@pytest.mark.parametrize(
    ("right", "withstood", "chosen"),
    [
        ("11111111", "10101010", [0, 1, 2, 3, 4, 5]),
        ("11111111", "11111111", [0, 1, 2, 3, 4, 5]),
        ("11111111", "00000000", [0, 1, 2, 3, 4, 5]),
        ("11111111", "11111110", [0, 1, 2, 3, 4, 7]),
        ("00000011", "00000001", [0, 1, 2, 3, 6, 7]),
        ("00", "00", [0, 1]),
    ],
)
def test_half_are_lost_and_half_withstand(right, withstood, chosen):
    flags = [torch.tensor([flag == "1" for flag in text]) for text in (right, withstood)]
    assert _choose(*flags) == chosen
