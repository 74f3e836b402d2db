"""Pixel-space models and the check of what is handed to them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_fsr.models.pixel import PixelModel, as_pixel_model
from timm_fsr.utils.errors import check_images


class Echo(nn.Module):
    """Returns what it is given, so that a test sees what a pixel model hands on."""

    def __init__(self, channels: int | None = None, **config: Any) -> None:
        super().__init__()
        self.pretrained_cfg = config
        if channels is not None:
            self.in_chans = channels

    def forward(self, images: Tensor) -> Tensor:
        return images


def pixels(batch: int = 2, channels: int = 3, size: int = 4) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


class TestPixelModel:
    def test_a_timm_model_sees_normalised_images(self):
        model = timm.create_model("test_resnet", num_classes=5).eval()
        images = pixels(size=32)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        assert mean.abs().min() > 0
        torch.testing.assert_close(PixelModel(model)(images), model((images - mean) / std))

    def test_each_channel_has_its_own_statistics(self):
        echo = Echo(mean=(0.0, 0.25, 0.5), std=(1.0, 0.5, 0.25))
        seen = PixelModel(echo)(torch.full((1, 3, 2, 2), 0.5))
        assert seen[0, :, 0, 0].tolist() == [0.5, 0.5, 0.0]

    def test_mean_0_and_std_1_hand_the_very_images_on(self):
        images = pixels()
        assert PixelModel(Echo(mean=(0.0,) * 3, std=(1.0,) * 3))(images) is images
        assert PixelModel(nn.Identity())(images) is images, "no pretrained_cfg means pixels"

    def test_grey_images_get_the_average_of_three_channels(self):
        echo = Echo(channels=1, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
        torch.testing.assert_close(PixelModel(echo)(pixels(channels=1)), (pixels(channels=1) - 0.4) / 0.2)

    def test_one_number_serves_every_channel(self):
        echo = Echo(channels=3, mean=(0.5,), std=(0.25,))
        assert PixelModel(echo)(torch.ones(1, 3, 1, 1)).flatten().tolist() == [2.0, 2.0, 2.0]
        equal = Echo(channels=4, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert PixelModel(equal)(torch.ones(1, 4, 1, 1)).flatten().tolist() == [1.0] * 4

    @pytest.mark.parametrize("key", ["mean", "std"])
    def test_statistics_that_do_not_fit_are_refused(self, key):
        config = {"mean": (0.5,) * 4, "std": (0.5,) * 4, key: (0.1, 0.2, 0.3)}
        with pytest.raises(ValueError, match=rf"\['{key}'\] has 3 values but the model takes 4 channels; set"):
            PixelModel(Echo(channels=4, **config))

    @pytest.mark.parametrize("std", [(0.2, 0.0, 0.2), (0.2, -0.1, 0.2), (float("nan"),) * 3])
    def test_a_std_that_cannot_divide_is_refused(self, std):
        with pytest.raises(ValueError, match="std'] must be positive"):
            PixelModel(Echo(channels=3, mean=(0.5,) * 3, std=std))

    def test_statistics_are_no_part_of_the_weights_but_move_with_them(self):
        wrapped = PixelModel(timm.create_model("test_resnet"))
        assert all(key.startswith("model.") for key in wrapped.state_dict())
        assert wrapped.double().mean.dtype == torch.float64
        assert wrapped.to("meta").std.device.type == "meta"


class TestAsPixelModel:
    def test_it_wraps_once(self):
        model = timm.create_model("test_resnet")
        wrapped = as_pixel_model(model)
        assert isinstance(wrapped, PixelModel)
        assert wrapped.model is model
        assert as_pixel_model(wrapped) is wrapped

    def test_a_pixel_model_inside_a_wrapper_counts(self):
        outer = nn.DataParallel(PixelModel(Echo()))
        assert as_pixel_model(outer) is outer

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_stays(self, training):
        model = timm.create_model("test_resnet").train(training)
        assert as_pixel_model(model).training is training
        assert model.training is training

    def test_a_mixed_mode_stays(self):
        model = timm.create_model("test_resnet").train()
        model.bn1.eval()
        as_pixel_model(model)
        assert not model.bn1.training
        assert model.conv1.training

    def test_the_statistics_go_to_the_models_device(self):
        with torch.device("meta"):
            model = timm.create_model("test_resnet")
        wrapped = as_pixel_model(model)
        assert wrapped.mean.device.type == "meta"
        assert as_pixel_model(Echo()).mean.device.type == "cpu"


class TestCheckImages:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_closed_range_passes_in_every_float(self, dtype):
        images = pixels().to(dtype)
        images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
        check_images(images)
        check_images(images, torch.tensor([0, 9]), 10)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (pixels() * 255, r"lie in \[\S+, 2\d\d\S*\] but pixels must lie in \[0, 1\]"),
            (pixels() * 255, "; divide them by 255$"),
            (pixels() - 0.5, "do not normalise them"),
            (pixels() + 1e-3 + 1.0, "must lie in"),
            (pixels().where(pixels() < 0.5, float("nan")), "must lie in"),
            (pixels().where(pixels() < 0.5, float("inf")), "must lie in"),
            ((pixels() * 255).byte(), r"dtype torch.uint8; give a floating-point batch .* images.float\(\) / 255"),
            (pixels()[0], r"shape \(3, 4, 4\)"),
            (pixels()[:0], "is empty; give at least one"),
            (pixels()[..., :0], "is empty"),
        ],
    )
    def test_what_is_no_batch_of_pixels_is_refused(self, images, message):
        with pytest.raises(ValueError, match=message):
            check_images(images)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 3]), r"from 0 to 3, but the model has 3 classes \(0 to 2\); .*num_classes=4"),
            (torch.tensor([-1, 2]), "from -1 to 2"),
            (torch.tensor([0.0, 1.0]), "dtype torch.float32; give one int64 class per image"),
            (torch.tensor([0, 1], dtype=torch.int32), "int64"),
            (torch.tensor([0, 1, 2]), re.escape("shape (3,)")),
            (torch.tensor([[0], [1]]), re.escape("shape (2,)")),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, labels, message):
        with pytest.raises(ValueError, match=message):
            check_images(pixels(), labels, 3)

    def test_without_a_number_of_classes_only_negative_labels_are_refused(self):
        check_images(pixels(), torch.tensor([0, 1000]))
        with pytest.raises(ValueError, match="use labels of 0 or more"):
            check_images(pixels(), torch.tensor([-1, 0]))

    def test_images_that_ask_for_gradients_pass_without_a_warning(self):
        check_images(pixels().requires_grad_())
