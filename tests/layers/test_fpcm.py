"""The frequency preference control module against a discrete Fourier transform written as sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from timm_fsr.layers.fpcm import FPCM

SHAPES = [(3, 4, 4, 5), (2, 3, 3, 3), (2, 4, 1, 1), (2, 2, 1, 2), (2, 4, 8, 8)]


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def low_pass(channel: np.ndarray, cutoff: float) -> np.ndarray:
    """One channel (H, W), row by row as one sequence: a sum over all frequencies, each as often as it passes."""
    values = channel.ravel()
    count = len(values)
    low = np.zeros(count, dtype=complex)
    for k in range(count):
        coefficient = sum(values[n] * np.exp(-2j * np.pi * k * n / count) for n in range(count))
        frequency = min(k, count - k)  # those above the middle are the negative ones
        coefficient *= np.exp(-0.5 * (frequency / (cutoff * count)) ** 2)
        low += coefficient * np.exp(2j * np.pi * k * np.arange(count) / count) / count
    assert abs(low.imag).max() < 1e-9
    return low.real.reshape(channel.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cutoff", [0.125, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_paper_s(shape: tuple[int, ...], cutoff: float, training: bool) -> None:
    torch.manual_seed(0)
    layer, feature = FPCM(shape[1], 10, cutoff=cutoff).train(training), features(*shape)
    out, aux = layer(feature)
    weight, bias = (t.detach().double().numpy().ravel() for t in (layer.projection.weight, layer.projection.bias))
    for n in range(shape[0]):
        for c in range(shape[1]):
            channel = feature[n, c].double().numpy()
            logit = np.mean([weight[c] * value + bias[c] for value in channel.ravel()])
            alpha = 0.5 + 0.5 / (1 + np.exp(-logit))
            low = low_pass(channel, cutoff)
            expected = alpha * low + (1 - alpha) * (channel - low)
            np.testing.assert_allclose(out[n, c].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(aux["alpha"][n, c].item(), alpha, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8, 8), (6, 4, 4), (5, 2, 2)])
def test_it_is_what_the_released_code_computes(shape: tuple[int, int, int]) -> None:
    """A transform along positions and channels, and a filter of two halves, for even numbers of positions."""
    torch.manual_seed(0)
    channels, count = shape[0], shape[1] * shape[2]
    layer, feature = FPCM(channels, 10, cutoff=(count // 8 or 0.5) / count).double(), features(2, *shape).double()
    tokens = feature.flatten(2).transpose(1, 2).numpy()
    width = count // 8 or 0.5
    half = [np.exp(-0.5 * (k / width) ** 2) for k in range(count // 2 + 1)]
    gauss = np.array(half[:-1] + half[1:][::-1])
    low = np.fft.ifft2(np.fft.fft2(tokens, axes=(1, 2)) * gauss[None, :, None], axes=(1, 2)).real
    projected = tokens * layer.projection.weight.detach().numpy().ravel() + layer.projection.bias.detach().numpy()
    alpha = 0.5 / (1 + np.exp(-projected.mean(axis=1, keepdims=True))) + 0.5
    expected = (alpha * low + (1 - alpha) * (tokens - low)).transpose(0, 2, 1).reshape(feature.shape)
    np.testing.assert_allclose(layer(feature)[0].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_channel_is_low_and_a_chessboard_is_high() -> None:
    layer = FPCM(1, 10)
    constant = torch.ones(1, 1, 4, 4)
    alternating = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 4, 4)
    for feature, low_share in ((constant, 1.0), (alternating, float(np.exp(-0.5 * 4.0**2)))):
        out, aux = layer(feature)
        alpha = aux["alpha"].item()
        torch.testing.assert_close(out, feature * (alpha * low_share + (1 - alpha) * (1 - low_share)))


def test_a_wide_filter_lets_everything_pass() -> None:
    layer, feature = FPCM(4, 10, cutoff=1e6), features(2, 4, 5, 3)
    out, aux = layer(feature)
    torch.testing.assert_close(out, aux["alpha"][:, :, None, None] * feature, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_same_filter() -> None:
    """The filter is symmetric, so its gradient is itself; alpha adds its own part through the mean."""
    torch.manual_seed(0)
    layer, feature = FPCM(1, 10), features(1, 1, 3, 4).requires_grad_()
    torch.nn.init.zeros_(layer.projection.weight)
    direction = features(1, 1, 3, 4).flip(2)
    out, aux = layer(feature)
    (found,) = torch.autograd.grad((out * direction).sum(), feature)
    alpha, low = aux["alpha"].item(), low_pass(direction[0, 0].double().numpy(), 0.125)
    expected = alpha * low + (1 - alpha) * (direction[0, 0].numpy() - low)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_alpha_favours_the_low_frequencies_and_is_left_out_when_nobody_asks() -> None:
    layer, feature = FPCM(4, 10), 100 * features(3, 4, 5, 3)
    alpha = layer(feature)[1]["alpha"]
    assert alpha.shape == (3, 4)
    assert alpha.dtype == torch.float32
    assert ((alpha >= 0.5) & (alpha <= 1)).all()
    layer.wants_aux = False
    assert layer(feature)[1] == {}


def test_it_has_two_weights_per_channel() -> None:
    assert sum(parameter.numel() for parameter in FPCM(512, 10).parameters()) == 2 * 512


def test_half_precision_filters_in_full() -> None:
    torch.manual_seed(0)
    layer, feature = FPCM(4, 10), features(2, 4, 6, 6)
    expected = layer(feature.bfloat16().float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(feature.bfloat16())[0].float(), expected, rtol=2e-2, atol=2e-2)
    assert layer.half()(feature.half())[0].dtype == torch.float16
    assert layer.to("meta")(feature.half().to("meta"))[0].shape == feature.shape


def test_it_is_compiled_and_exported_in_one_graph() -> None:
    torch.compiler.reset()
    layer, feature = FPCM(4, 10), features(2, 4, 5, 3)
    expected = layer(feature)[0]
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(feature)[0], expected)
    torch.testing.assert_close(torch.export.export(layer, (feature,)).module()(feature)[0], expected)
    torch.compiler.reset()


@pytest.mark.parametrize("cutoff", [0.0, -0.1, float("nan"), float("inf")])
def test_a_cutoff_out_of_range_is_refused(cutoff: float) -> None:
    with pytest.raises(ValueError, match=r"cutoff=.* must be positive: it is the width of a filter"):
        FPCM(4, 10, cutoff=cutoff)
