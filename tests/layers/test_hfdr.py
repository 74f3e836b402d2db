"""HFDR against its formula, with the high-pass filters written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from support.tiny import images, tiny_resnet
from torch import Tensor

import timm_fsr
from timm_fsr.layers.hfdr import HFDR

CHANNELS = 3


@pytest.fixture
def layer() -> HFDR:
    torch.manual_seed(0)
    layer = HFDR(CHANNELS, 10, hidden=4)
    with torch.no_grad():
        layer.separation[2].weight.mul_(0.3)  # masks between 0 and 1
    return layer


def features(batch: int = 4) -> Tensor:
    return torch.randn(batch, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(1))


def second_difference() -> np.ndarray:
    return np.array([1.0, -2.0, 1.0])


def filtered(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (3 C, H, W): the three filters of each channel in turn, with zeros around the image.

    They are the second difference along both axes, the square of the steganalysis rich model, and the second
    difference along rows.
    """
    both = np.pad(-np.outer(second_difference(), second_difference()), 1) / 4
    corner = np.array([[-1, 2, -2], [2, -6, 8], [-2, 8, -12]])
    square = np.block([[corner, corner[:, 1::-1]], [corner[1::-1], corner[1::-1, 1::-1]]]) / 12
    rows = np.zeros((5, 5))
    rows[2, 1:4] = second_difference() / 2
    channels, height, width = image.shape
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
    out = np.zeros((3 * channels, height, width))
    for c in range(channels):
        for j, kernel in enumerate((both, square, rows)):
            for y in range(height):
                for x in range(width):
                    out[3 * c + j, y, x] = (kernel * padded[c, y : y + 5, x : x + 5]).sum()
    return out


def test_the_mask_comes_from_three_fixed_high_pass_filters(layer):
    """And the output is m * R(m * f) + (1 - m) * f, without noise in eval mode."""
    layer(features())  # moves the running statistics
    layer.eval()
    out, aux = layer(features())
    norm, _, mix = layer.separation
    for n, image in enumerate(features().numpy().astype(np.float64)):
        high = filtered(image)
        mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
        scaled = np.maximum((high - mean[:, None, None]) / np.sqrt(var + norm.eps)[:, None, None], 0)
        weight, bias = mix.weight[:, :, 0, 0].detach().double().numpy(), mix.bias.detach().double().numpy()
        logits = np.einsum("ck,khw->chw", weight, scaled) + bias[:, None, None]
        mask = 1 / (1 + np.exp(-logits / 0.1))
        assert ((mask > 0.05) & (mask < 0.95)).mean() > 0.05, "the case shows nothing"
        np.testing.assert_allclose(aux["mask"][n].detach().numpy(), mask, rtol=1e-3, atol=1e-5)
        kept = torch.tensor(mask * image, dtype=torch.float32)
        recalibrated = layer.recalibration(kept[None])[0].detach().double().numpy()
        np.testing.assert_allclose(
            out[n].detach().numpy(), mask * recalibrated + (1 - mask) * image, rtol=1e-3, atol=1e-5
        )


def test_filters_do_not_see_what_is_constant_and_are_no_weights(layer):
    assert "kernels" not in layer.state_dict()
    assert not any("kernels" in name for name, _ in layer.named_parameters())
    seen = []
    layer.separation[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layer.eval()(torch.full((1, CHANNELS, 9, 9), 3.0))
    torch.testing.assert_close(seen[0][..., 2:-2, 2:-2], torch.zeros(1, 3 * CHANNELS, 5, 5))


def test_noise_is_drawn_exactly_in_training(layer):
    silent = HFDR(CHANNELS, 10, hidden=4, noise=False)
    assert torch.equal(silent.train()(features())[0], silent(features())[0])
    assert not torch.equal(layer.train()(features())[0], layer(features())[0])
    assert torch.equal(layer.eval()(features())[0], layer(features())[0])


def test_the_regularisation_is_the_released_one():
    layer = HFDR(CHANNELS, 10, ratio=0.2, weight=0.5)
    mask = torch.rand(4, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(3))
    ones = sum(mask.double().flatten().tolist())
    zeros = mask.numel() - ones
    expected = 0.5 * (ones / zeros - 0.2 / 0.8) ** 2 / (4 * CHANNELS)
    found = layer.aux_losses({"mask": mask}, torch.zeros(4, 10), torch.zeros(4).long())
    assert found["frequency"].item() == pytest.approx(expected, rel=1e-5)
    full = layer.aux_losses({"mask": torch.ones(4, CHANNELS, 5, 6)}, torch.zeros(4, 10), torch.zeros(4).long())
    assert math.isfinite(full["frequency"].item())


@pytest.mark.parametrize("name", ["wide_tau", "straight_through", "detached_mask"])
def test_surrogates_change_the_mask_s_gradient_alone(layer, name):
    layer.eval()
    feature = features().requires_grad_()
    expected, _ = layer(feature)
    (plain,) = torch.autograd.grad(expected.sum(), feature)
    layer.surrogate = name
    out, aux = layer(feature)
    torch.testing.assert_close(out, expected)
    (other,) = torch.autograd.grad(out.sum(), feature)
    assert not torch.allclose(other, plain, atol=1e-3)
    assert aux["mask"].requires_grad == (name != "detached_mask")


@pytest.mark.parametrize(
    ("model", "place"),
    [("resnet_tiny_cifar", "act1"), ("resnet18", "act1"), ("preact_resnet18_cifar", "stem.conv")],
)
def test_it_sits_after_the_stem(model, place):
    with torch.device("meta"):
        found = timm_fsr.attach(timm.create_model(model), "hfdr")
    assert [site.name for site in found.hfdr.sites] == [place]


def test_a_model_with_it_trains_and_is_deterministic_in_eval_mode():
    model = timm_fsr.attach(tiny_resnet(), "hfdr").train()
    with timm_fsr.record(model, torch.arange(4)) as tape:
        logits = model(images())
    losses = tape.losses(logits)
    assert list(losses) == ["hfdr.frequency"]
    (logits.sum() + losses["hfdr.frequency"]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize(
    "args", [{"hidden": 0}, {"tau": 0.0}, {"ratio": 0.0}, {"ratio": 1.0}, {"weight": -1.0}], ids=repr
)
def test_what_cannot_work_is_refused(args):
    with pytest.raises(ValueError, match="=".join(map(str, *args.items()))):
        HFDR(CHANNELS, 10, **args)
