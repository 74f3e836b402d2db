from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import Tensor

import timm_fsr.models.cifar

RESNET18 = ((64, 1), (64, 1), (128, 2), (256, 4), (512, 8))
RESNET18_HALF = ((32, 1), (32, 1), (64, 2), (128, 4), (256, 8))
TINY = ((16, 2), (16, 2), (32, 4), (64, 8), (64, 8))
WIDE = ((16, 1), (160, 1), (320, 2), (640, 4))
VGG16 = ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16), (512, 32))
MOBILENET = ((24, 1), (32, 2), (96, 4), (320, 8))
NARROW = {"channels": (16, 24, 32, 40)}
NARROW_WIDE = {"layers": (1, 1, 1), "channels": (16, 32, 64)}


@dataclass(frozen=True)
class Expected:
    """What must hold of one network.

    `levels` are the (channels, reduction) and `last` the last module of its `feature_info`; `small` are
    arguments that make it quick to run.
    """

    name: str
    parameters: int
    levels: tuple[tuple[int, int], ...]
    last: str
    small: dict[str, Any]


NETWORKS = (
    Expected("resnet18_cifar", 11_173_962, RESNET18, "layer4", NARROW),
    Expected("resnet18_half_cifar", 2_797_610, RESNET18_HALF, "layer4", {"channels": (8, 16, 24, 32)}),
    Expected("resnet_tiny_cifar", 152_026, TINY, "layer4", {}),
    Expected("preact_resnet18_cifar", 11_172_170, RESNET18, "norm", NARROW),
    Expected("wrn28_10_cifar", 36_479_194, WIDE, "norm", NARROW_WIDE),
    Expected("wrn34_10_cifar", 46_160_474, WIDE, "norm", NARROW_WIDE),
    Expected("vgg16_bn_cifar", 15_253_578, VGG16, "features.43", {}),
    Expected("mobilenetv2_cifar", 2_236_682, MOBILENET, "blocks.6", {}),
    Expected("vit_tiny_patch4_32", 5_362_378, ((192, 4),) * 12, "blocks.11", {"depth": 3}),
)


@pytest.fixture(params=NETWORKS, ids=lambda expected: expected.name)
def expected(request: pytest.FixtureRequest) -> Expected:
    return request.param


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def create(expected: Expected, **kwargs: Any) -> Any:
    """A small version in eval mode, with the same weights for the same arguments."""
    torch.manual_seed(0)
    return timm.create_model(expected.name, **{**expected.small, **kwargs}).eval()


def on_meta(expected: Expected, **kwargs: Any) -> Any:
    """The network itself, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(expected.name, **kwargs)


def levels_seen(model: Any, batch: Tensor) -> list[Tensor]:
    """What the modules of `feature_info` put out in one forward pass."""
    seen: dict[str, Tensor] = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda _m, _args, output, name=info["module"]: seen.update({name: output}))
    model(batch)
    return [seen[info["module"]] for info in model.feature_info]


def test_timm_lists_them() -> None:
    names = sorted(expected.name for expected in NETWORKS)
    assert timm.list_models(module="cifar") == names
    assert sorted(timm_fsr.models.cifar.__all__) == names


def test_parameters_and_levels(expected: Expected) -> None:
    model = on_meta(expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected.parameters
    assert tuple((info["num_chs"], info["reduction"]) for info in model.feature_info) == expected.levels
    assert model.feature_info[-1]["module"] == expected.last


def test_the_configuration_names_the_right_layers(expected: Expected) -> None:
    model, config = on_meta(expected), on_meta(expected).pretrained_cfg
    assert config["architecture"] == expected.name
    assert (config["mean"], config["std"], config["num_classes"]) == ((0, 0, 0), (1, 1, 1), 10)
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    if config["pool_size"]:
        last = model.forward_features(torch.empty(1, 3, 32, 32, device="meta"))
        assert tuple(last.shape[2:]) == config["pool_size"]


@pytest.mark.parametrize("size", [32, 64])
def test_levels_have_the_size_their_reduction_says(expected: Expected, size: int) -> None:
    model = create(expected, **({"img_size": size} if "vit" in expected.name else {}))
    sides = [size // info["reduction"] for info in model.feature_info]
    shapes = [(2, info["num_chs"], side, side) for info, side in zip(model.feature_info, sides, strict=True)]
    batch = images(size=size)
    logits, seen = model(batch), levels_seen(model, batch)
    intermediates = model.forward_intermediates(batch, norm=expected.last == "norm", intermediates_only=True)
    assert logits.shape == (2, 10)
    assert [tuple(level.shape) for level in intermediates] == shapes
    for level, intermediate in zip(seen, intermediates, strict=True):
        flat = level if level.ndim == 4 else level.mT
        assert torch.equal(flat.flatten(), intermediate.flatten())


def test_features_only_gives_the_levels(expected: Expected) -> None:
    seen = levels_seen(create(expected), images())
    extractor = create(expected, features_only=True)
    info = extractor.feature_info
    features = extractor(images())
    assert len(features) == (3 if "vit" in expected.name else len(seen))
    for feature, level, channels, reduction in zip(
        features, seen[-len(features) :], info.channels(), info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, 32 // reduction, 32 // reduction)
        assert torch.equal(feature.flatten(), (level if level.ndim == 4 else level.mT).flatten())


def test_features_only_takes_out_indices(expected: Expected) -> None:
    extractor = create(expected, features_only=True, out_indices=(0, 2))
    assert extractor.feature_info.channels() == [create(expected).feature_info[i]["num_chs"] for i in (0, 2)]
    assert [feature.shape[1] for feature in extractor(images())] == extractor.feature_info.channels()


def test_checkpointing_equals_eager(expected: Expected) -> None:
    model = create(expected)
    if expected.name == "vgg16_bn_cifar":  # as every timm VGG
        with pytest.raises(AssertionError, match="not supported"):
            model.set_grad_checkpointing()
        return
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        batch = images().requires_grad_()
        logits = model(batch)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [batch, *model.parameters()])])
    assert all(torch.equal(eager, checkpointed) for eager, checkpointed in zip(*results, strict=True))


def test_other_classes_channels_and_pooling(expected: Expected) -> None:
    model = create(expected, num_classes=7, in_chans=1, global_pool="max")
    assert model(images(channels=1)).shape == (2, 7)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(images(channels=1)).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images(channels=1)).shape == (2, model.head_hidden_size)


def test_dropout_reaches_the_head(expected: Expected) -> None:
    model = create(expected, drop_rate=0.5)
    state = torch.get_rng_state()
    assert torch.equal(model(images()), model(images()))
    model.train()
    torch.set_rng_state(state)
    first = model(images())
    assert not torch.equal(first, model(images()))


def test_weights_of_other_channels_and_classes_are_adapted(expected: Expected) -> None:
    source = create(expected)
    model = create(
        expected,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": source.state_dict()},
        in_chans=1,
        num_classes=5,
    )
    first, head = source.pretrained_cfg["first_conv"], source.pretrained_cfg["classifier"]
    before, after = source.state_dict(), model.state_dict()
    torch.testing.assert_close(after.pop(f"{first}.weight"), before[f"{first}.weight"].sum(1, keepdim=True))
    assert after.pop(f"{head}.weight").shape[0] == after.pop(f"{head}.bias").shape[0] == 5
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_there_are_no_weights_to_download(expected: Expected) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        on_meta(expected, pretrained=True)


def test_device_and_dtype_reach_every_weight(expected: Expected) -> None:
    model = timm.create_model(expected.name, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.bfloat16)}


def test_an_export_rebuilds_bit_for_bit(expected: Expected, tmp_path: Path) -> None:
    model = create(expected, num_classes=7, in_chans=1)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(channels=1)), model(images(channels=1)))


@pytest.mark.parametrize("size", [28, 32, 40])
def test_the_tiny_network_takes_any_image(size: int) -> None:
    model = timm.create_model("resnet_tiny_cifar", in_chans=1).eval()
    assert model.forward_features(images(channels=1, size=size)).shape == (
        2,
        64,
        -(-size // 8),
        -(-size // 8),
    )
