"""Rows: what is decoded, by which way, and how labels are encoded."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_fsr.data.decoding import ArrayPictures, Rows, TablePictures

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 6, 4, 3), np.uint8)


def rows_of(pixels: np.ndarray) -> Rows:
    return Rows("array", [0] * len(pixels), None, ArrayPictures(pixels))


class TestArrays:
    @pytest.mark.parametrize("depth", [1, 3])
    def test_equal_pictures_decoded_one_by_one(self, depth):
        pixels = PIXELS[..., :depth]
        rows = rows_of(pixels)
        slow = Rows("list", rows.labels, None, lambda indices: rows.pictures(indices))
        indices = [299, 3, *range(0, 280, 2)]
        for size, channels in ((None, None), ((6, 4), depth), ((5, 5), 1), (None, 3)):
            options = {"size": size, "channels": channels, "progress": False}
            assert torch.equal(rows.decode(indices, **options).images, slow.decode(indices, **options).images)

    def test_go_without_pictures_where_nothing_changes(self, monkeypatch):
        monkeypatch.setattr(ArrayPictures, "__call__", lambda *_: pytest.fail("a picture was made"))
        images = rows_of(PIXELS).decode([1, 0], size=(6, 4), channels=3, progress=False).images
        assert torch.equal(images, torch.from_numpy(PIXELS[[1, 0]]).permute(0, 3, 1, 2))

    def test_a_read_only_array(self):
        pixels = np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape)
        images = rows_of(pixels).decode([0], size=None, channels=None, progress=False).images
        images += 1  # a copy, and no warning
        assert pixels[0, 0, 0, 0] == PIXELS[0, 0, 0, 0]


def test_pictures_can_be_sent_to_a_process():
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(PIXELS[0])]})
    for pictures in (ArrayPictures(PIXELS), TablePictures.of(table, "image")):
        again = pickle.loads(pickle.dumps(Rows("x", [0], None, pictures)))
        assert np.array_equal(np.asarray(again.read([0])[0]), PIXELS[0])


def test_errors_name_the_row():
    def broken(indices: list[int]) -> list[Image.Image]:
        raise OSError("truncated")

    rows = Rows("x[train]", [0] * 9, None, broken)
    with pytest.raises(ValueError, match=r"x\[train\] has 1 image that cannot be used: row 7 \(OSError: truncated\)"):
        rows.read([7])
    with pytest.raises(ValueError, match=r"3 images that cannot be used: row 2 \(OSE.*\), row 3 \(.*\), row 5 \("):
        rows.read([2, 3, 5])


def test_labels_are_encoded_by_name_or_number():
    words = Rows("x", ["owl", "ant", "owl"], None, ArrayPictures(PIXELS[:3]))
    numbers = Rows("x", [2, 0, 2], None, ArrayPictures(PIXELS[:3]))
    named = Rows("x", [1, 0, 1], ("ant", "owl"), ArrayPictures(PIXELS[:3]))
    assert words.encode(None)[0].tolist() == [1, 0, 1]
    assert numbers.encode(None)[1] == ("0", "1", "2")
    assert numbers.encode(("a", "b", "c"))[0].tolist() == [2, 0, 2]
    assert named.encode(("owl", "bee", "ant"))[0].tolist() == [0, 2, 0]
