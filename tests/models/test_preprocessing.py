"""Preprocessing: pictures as timm's validation sees them, or as this package trains on them."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.tiny import tiny_resnet

import timm_fsr
from timm_fsr.models.description import describe
from timm_fsr.models.preprocessing import output_names, preprocessing


def picture(width: int = 70, height: int = 50, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "convnext_atto"])
def test_a_model_of_timm_gets_what_timm_gives_it(name):
    model = timm.create_model(name)
    prepare, channels = preprocessing(timm_fsr.PixelModel(model))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = prepare(picture()).float()[None] / 255
    pixel_model = timm_fsr.PixelModel(model)
    assert channels == 3
    torch.testing.assert_close((pixels - pixel_model.mean) / pixel_model.std, transform(picture())[None])


def test_a_model_trained_here_sees_pictures_as_in_training(tmp_path):
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "x.png")
    model = tiny_resnet()
    describe(model, classes=[f"c{index}" for index in range(10)], image_size=(3, 24, 24))
    data = timm_fsr.load_data(str(tmp_path), "train", size=24, progress=False)
    prepare, _ = preprocessing(model)
    assert torch.equal(prepare(picture()).float() / 255, next(data.batches(1))[0][0])


def test_grey_models_get_grey_pictures_and_another_size_if_asked():
    prepare, channels = preprocessing(tiny_resnet(in_chans=1), size=20)
    assert channels == 1
    assert prepare(picture(mode="L")).shape == (1, 20, 20)


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(ValueError, match="images of 4 channels"):
        preprocessing(tiny_resnet(in_chans=4))
    with pytest.raises(ValueError, match="does not say the size"):
        preprocessing(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="size=0 must be 1 or more"):
        preprocessing(tiny_resnet(), size=0)


class TestNames:
    def test_of_imagenet(self):
        names = output_names(timm_fsr.PixelModel(timm.create_model("resnet18")))
        assert names is not None
        assert (len(names), names[0], names[999][:13]) == (1000, "tench, Tinca tinca", "toilet tissue")

    def test_of_the_model(self):
        model = tiny_resnet()
        describe(model, classes=[f"c{index}" for index in range(10)], image_size=(3, 32, 32))
        assert output_names(model) == tuple(f"c{index}" for index in range(10))

    def test_descriptions_in_the_place_of_codes(self):
        model = tiny_resnet(num_classes=2)
        model.pretrained_cfg.update(label_names=["n1", "n2"], label_descriptions={"n1": "cat"})
        assert output_names(model) == ("cat", "n2")

    def test_none_where_nobody_knows_them(self):
        assert output_names(tiny_resnet()) is None
        assert output_names(timm.create_model("resnet18", num_classes=7)) is None
