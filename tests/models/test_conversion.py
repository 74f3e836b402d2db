from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.official import NETWORKS, OFFICIAL, official_keys, official_weights
from torch import Tensor

import timm_fsr.models.cifar
from timm_fsr.models.conversion import convert_official

BRANCH = {f"{index}.weight" for index in (0, 1, 3, 4, 6)} | {
    f"{index}.{name}" for index in (1, 4) for name in ("bias", "running_mean", "running_var", "num_batches_tracked")
}


def official_shapes(network: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in official_keys(network).items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plain_network_has_the_official_logits(network: str) -> None:
    model = timm.create_model(NETWORKS[network][0]).eval()
    converted = convert_official(official_weights(network))
    model.load_state_dict({key: value for key, value in converted.items() if not key.startswith("fsr.")})
    images = load_file(OFFICIAL / "resnet18.safetensors")["images"]
    expected = load_file(OFFICIAL / "without_fsr.safetensors")[f"{network}.logits_without_fsr"]
    with torch.no_grad():
        error = (model(images) - expected).norm() / expected.norm()
    assert error < 2e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_every_used_weight_arrives_once_and_unchanged(network: str) -> None:
    official = {
        key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(official_keys(network).items())
    }
    used = {value.flatten()[0].item() for key, value in official.items() if not key.startswith("sub_block1.")}
    arrived = [value.flatten()[0].item() for value in convert_official(official).values()]
    assert sorted(arrived) == sorted(used)


@pytest.mark.parametrize("network", NETWORKS)
def test_fsr_keys_follow_the_site(network: str) -> None:
    backbone, site = NETWORKS[network]
    converted = convert_official(official_shapes(network))
    with torch.device("meta"):
        plain = timm.create_model(backbone).state_dict()
    expected = {f"fsr.{site}.{branch}.{key}" for branch in ("separation", "recalibration") for key in BRANCH}
    expected |= {f"fsr.{site}.head.weight", f"fsr.{site}.head.bias"}
    assert converted.keys() == plain.keys() | expected
    assert all(converted[key].shape == plain[key].shape for key in plain)


def test_the_site_of_vgg_is_its_fourth_block() -> None:
    with torch.device("meta"):
        info = timm_fsr.models.cifar.vgg16_bn_cifar().feature_info[3]
    assert info["module"].replace(".", "_") == NETWORKS["vgg16"][1]


@pytest.mark.parametrize("wrapper", ["state_dict", "net", "model"])
def test_a_wrapped_parallel_checkpoint_is_unwrapped(wrapper: str) -> None:
    official = official_shapes("resnet18")
    parallel = {f"module.{key}": value for key, value in official.items()}
    assert convert_official({wrapper: parallel, "epoch": 3}).keys() == convert_official(official).keys()


def test_another_number_of_classes_is_followed() -> None:
    official = official_shapes("vgg16")
    for key in ("classifier.4", "aux.0"):
        official[f"{key}.weight"] = torch.empty(100, 512, device="meta")
        official[f"{key}.bias"] = torch.empty(100, device="meta")
    converted = convert_official(official)
    assert converted["head.fc.weight"].shape == converted["fsr.features_32.head.weight"].shape == (100, 512)


@pytest.mark.parametrize("key", ["layer3.0.shortcut.0.weight", "separation.sep_net.6.weight", "aux.0.weight"])
def test_a_missing_key_is_named(key: str) -> None:
    official = official_shapes("resnet18")
    del official[key]
    with pytest.raises(ValueError, match=f"ResNet18_FSR.*missing: {key}"):
        convert_official(official)


@pytest.mark.parametrize(("network", "key"), [("resnet18", "sub_block1.x"), ("wrn34_10", "block4.layer.0.bn1.bias")])
def test_an_unknown_key_is_named(network: str, key: str) -> None:
    official = {**official_shapes(network), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"unknown: {key}"):
        convert_official(official)


def test_many_differing_keys_are_counted() -> None:
    official = {key: value for key, value in official_shapes("resnet18").items() if not key.startswith("layer4.")}
    with pytest.raises(ValueError, match=r"missing: layer4\.0\.conv1\.weight, .* and \d+ more"):
        convert_official(official)


def test_another_width_is_refused() -> None:
    official = {**official_shapes("resnet18"), "bn1.weight": torch.zeros(16)}
    with pytest.raises(ValueError, match=r"'bn1\.weight' has the shape \(16,\).*needs \(64,\)"):
        convert_official(official)


@pytest.mark.parametrize("state_dict", [{}, {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}])
def test_other_networks_are_refused(state_dict: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="none of the official FSR networks ResNet18_FSR, vgg16_FSR"):
        convert_official(state_dict)
