"""What a saved model says of its classes and images, and what timm makes of it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support.tiny import tiny_resnet, tiny_vit
from timm.data import create_transform, resolve_data_config
from torch import nn

import timm_fsr
from timm_fsr.data.streaming import stream_data
from timm_fsr.models.description import check_runs, class_names, describe, input_size, own_crop
from timm_fsr.models.pixel import as_pixel_model
from timm_fsr.models.saving import load, save_pretrained
from timm_fsr.utils.errors import ImageSizeError

TAG = "resnet_tiny_cifar_fsr.at_fashion_mnist"


def named(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def described(name: str, count: int, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, num_classes=count, **kwargs)
    describe(model, classes=named(count), image_size=(3, 32, 32))
    return model


class TestNames:
    @pytest.mark.parametrize("count", [3, 4, 10, 100, 1000])
    @pytest.mark.parametrize("name", ["resnet_tiny_cifar", "resnet_tiny_cifar_fsr", "vit_tiny_patch4_32", "resnet10t"])
    def test_survive_any_number_of_classes(self, tmp_path, name, count):
        save_pretrained(described(name, count), tmp_path)
        for again in (load(str(tmp_path)), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
            assert class_names(again) == tuple(named(count))
        save_pretrained(load(str(tmp_path)), tmp_path / "again")
        assert class_names(load(str(tmp_path / "again"))) == tuple(named(count))
        assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["label_names"] == named(count)

    def test_survive_where_only_the_names_were_written(self, tmp_path):
        """As who trains by a loop of their own may write them, on a network whose own count is another one."""
        model = tiny_resnet(num_classes=3)
        model.pretrained_cfg["label_names"] = ["a", "b", "c"]
        assert class_names(load(str(save_pretrained(model, tmp_path)))) == ("a", "b", "c")

    @pytest.mark.parametrize("name", ["resnet_tiny_cifar", "resnet_tiny_cifar_fsr"])
    def test_of_other_classes_are_forgotten(self, tmp_path, name):
        save_pretrained(described(name, 4), tmp_path)
        other = load(str(tmp_path), num_classes=3)
        assert class_names(other) is None
        save_pretrained(other, tmp_path / "other")
        assert "label_names" not in (tmp_path / "other" / "config.json").read_text()
        other.reset_classifier(4)
        assert class_names(other) is None, "they are other four"
        again = load(str(tmp_path))
        again.reset_classifier(4)
        assert class_names(again) is None

    def test_a_tag_for_other_classes(self):
        assert class_names(timm.create_model(TAG, pretrained=True))[1] == "Trouser"
        for create in (partial(timm.create_model, pretrained=True), timm_fsr.from_pretrained):
            model = create(TAG, num_classes=3)
            assert class_names(model) is None
            model.reset_classifier(10)
            assert class_names(model) is None

    @pytest.mark.parametrize(
        ("names", "found"),
        [
            ({"1": "b", "0": "a", "2": "c"}, ("a", "b", "c")),
            ({0: "a", 1: "b", 5: "c"}, None),
            (["a", "b"], None),
            (["a", "a", "c"], None),
            ([7, 3, 5], ("7", "3", "5")),
            ("abc", None),
            ([], None),
        ],
    )
    def test_only_names_that_fit(self, names, found):
        model = tiny_resnet(num_classes=3)
        model.pretrained_cfg["label_names"] = names
        assert class_names(timm_fsr.PixelModel(model)) == found
        assert class_names(nn.Linear(2, 2)) is None


class TestPixels:
    def test_nothing_of_the_source_stays(self, tmp_path):
        model = timm.create_model("resnet18", num_classes=3)
        assert model.pretrained_cfg["test_input_size"] == (3, 288, 288)
        describe(model, classes=["a", "b", "c"], image_size=(3, 48, 48))
        assert input_size(model) == (3, 48, 48)
        model.pretrained_cfg |= {"interpolation": "bilinear", "test_crop_pct": 1.0, "label_descriptions": {"a": "x"}}
        describe(model, classes=["a", "b", "c"], image_size=(3, 40, 40))
        save_pretrained(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        assert config["input_size"] == [3, 40, 40]
        assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (1.0, "center", "bicubic")
        assert not {"test_input_size", "test_crop_pct", "test_pool_size", "label_descriptions"} & set(config)
        assert config["mean"] == [0.485, 0.456, 0.406]

    @pytest.mark.parametrize("mean", [(0.5, 0.4, 0.3), (0.5,), (0.5, 0.5, 0.5)])
    def test_mean_and_std_are_those_that_are_used(self, tmp_path, mean):
        model = tiny_resnet(num_classes=3, in_chans=1)
        model.pretrained_cfg |= {"mean": mean, "std": (0.2,)}
        before = timm_fsr.PixelModel(model)
        describe(model, classes=["a", "b", "c"], image_size=(1, 20, 20))
        after = timm_fsr.PixelModel(load(str(save_pretrained(model, tmp_path))))
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.std, after.std)

    @pytest.mark.parametrize("size", [20, 48])
    @pytest.mark.parametrize("stored", [(64, 64), (37, 37), (20, 20), (60, 45), (31, 77)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_timm_prepares_the_same_images(self, tmp_path, size, stored, channels):
        """The same pixels, whatever the shape of the pictures; float32 rounds when the mean is added again."""
        mode, generator = {1: "L", 3: "RGB"}[channels], torch.Generator().manual_seed(0)
        values = torch.nn.functional.interpolate(
            torch.rand(1, channels, 9, 9, generator=generator), stored, mode="bilinear"
        )
        pixels = (255 * values[0]).byte().permute(1, 2, 0).squeeze(-1).numpy()
        (tmp_path / "data" / "a").mkdir(parents=True)
        Image.fromarray(pixels, mode).save(tmp_path / "data" / "a" / "0.png")
        model = tiny_resnet(num_classes=3, in_chans=channels)
        model.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3)[:channels], "std": (0.3, 0.2, 0.1)[:channels]}
        describe(model, classes=["a", "b", "c"], image_size=(channels, size, size))
        model = load(str(save_pretrained(model, tmp_path / "model"))).eval()
        config = resolve_data_config({}, model=model)
        transform = create_transform(**config, is_training=False)
        theirs = transform(Image.open(tmp_path / "data" / "a" / "0.png"))[None]
        data = timm_fsr.load_data(tmp_path / "data", size=input_size(model)[1:], channels=channels)
        ours = next(data.batches(1))[0]
        with torch.no_grad():
            logits = as_pixel_model(model)(ours), model(theirs)
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        restored = theirs * torch.tensor(config["std"]).view(-1, 1, 1) + torch.tensor(config["mean"]).view(-1, 1, 1)
        torch.testing.assert_close(restored, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet_tiny_cifar", "resnet18"])
def test_names_go_with_the_classifier_of_a_plain_model_that_timm_alone_has_loaded(tmp_path, name):
    model = timm.create_model(name, num_classes=3)
    describe(model, classes=["a", "b", "c"], image_size=(3, 32, 32))
    save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert class_names(again) == ("a", "b", "c")
    again.reset_classifier(3)
    assert class_names(again) is None
    assert class_names(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)) == ("a", "b", "c")


class TestOwnCrop:
    """Weights of timm are shown the pixels of timm's own scripts."""

    @pytest.mark.parametrize("stored", [(64, 64), (60, 45), (31, 77), (20, 20)])
    @pytest.mark.parametrize("config", [{"crop_pct": 0.875}, {"crop_pct": 0.9, "interpolation": "bilinear"}])
    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_to_the_bit(self, tmp_path, stored, config, mode, channels):
        size = (channels, *stored) if channels > 1 else stored
        pixels = torch.randint(256, size, generator=torch.Generator().manual_seed(0)).byte()
        (tmp_path / "a").mkdir()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy() if channels > 1 else pixels.numpy())
        picture.save(tmp_path / "a" / "0.png")
        model = tiny_resnet(num_classes=3, in_chans=channels)
        model.pretrained_cfg |= {
            "input_size": (channels, 24, 24),
            "crop_mode": mode,
            "mean": (0.5,) * channels,
            **config,
        }
        transform = create_transform(**resolve_data_config({}, model=model), is_training=False, normalize=False)
        data = timm_fsr.load_data(tmp_path, size=24, crop=own_crop(model))
        streamed = stream_data(tmp_path, size=24, crop=own_crop(model), workers=0)
        assert torch.equal(data.images[0], transform(picture))
        assert torch.equal(next(streamed.batches(1))[0], next(data.batches(1))[0])
        assert streamed.fingerprint != stream_data(tmp_path, size=24, workers=0).fingerprint

    def test_images_of_that_size_are_left_alone(self, tmp_path):
        (tmp_path / "a").mkdir()
        Image.new("RGB", (24, 24), (9, 8, 7)).save(tmp_path / "a" / "0.png")
        model = tiny_resnet()
        model.pretrained_cfg |= {"crop_pct": 0.5}
        data = timm_fsr.load_data(tmp_path, size=24, crop=own_crop(model))
        assert data.fingerprint == timm_fsr.load_data(tmp_path).fingerprint

    def test_models_that_were_trained_here_have_none(self):
        model = tiny_resnet(num_classes=3)
        model.pretrained_cfg |= {"crop_pct": 0.875, "interpolation": "bilinear"}
        assert own_crop(model).share == 0.875
        describe(model, classes=["a", "b", "c"], image_size=(3, 40, 40))
        assert own_crop(model) is None
        assert own_crop(nn.Linear(2, 2)) is None
        assert own_crop(load("resnet_tiny_cifar_fsr.at_fashion_mnist", pretrained=True)) is None


class TestSizes:
    @pytest.mark.parametrize("build", [tiny_vit, lambda: timm.create_model("vgg11", num_classes=2)])
    def test_one_that_a_model_does_not_take(self, build):
        model = build()
        model.train()
        with pytest.raises(ImageSizeError, match="does not take images of 3x16x16"):
            check_runs(model, (3, 16, 16))
        assert model.training

    def test_one_that_it_takes_leaves_no_trace(self):
        model = tiny_resnet()
        state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
        check_runs(timm_fsr.PixelModel(model), (3, 20, 20))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
        assert torch.equal(random, torch.random.get_rng_state())
        assert all(module.training for module in model.modules())

    def test_a_model_that_does_not_say(self):
        assert input_size(nn.Linear(2, 2)) is None
        assert input_size(tiny_vit(img_size=64)) == (3, 64, 64)


def test_a_file_of_the_source_is_not_touched():
    """timm hands out one configuration a model; describing one must not describe the next."""
    describe(timm.create_model("resnet18", num_classes=3), classes=["a", "b", "c"], image_size=(3, 40, 40))
    assert timm.create_model("resnet18").pretrained_cfg["input_size"] == (3, 224, 224)
