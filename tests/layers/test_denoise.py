"""Feature denoising against naive loops over positions, from the paper's formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import tiny_resnet
from torch import Tensor, nn

import timm_fsr
from timm_fsr.hooks.surrogates import IDENTITY, list_surrogates
from timm_fsr.layers.denoise import Denoise

KINDS = ("softmax", "dot", "bilateral", "bilateral_dot", "mean", "median")
SHAPES = [(3, 6, 4, 5), (2, 6, 1, 1), (2, 3, 1, 4), (2, 9, 2, 2)]


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def denoiser(channels: int, kind: str) -> Denoise:
    """With weights, scales and statistics away from where they start."""
    torch.manual_seed(0)
    layer = Denoise(channels, 10, kind=kind).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    nn.init.normal_(layer.norm.running_mean)
    nn.init.uniform_(layer.norm.running_var, 0.5, 2.0)
    return layer.eval()


def filtered(layer: Denoise, image: np.ndarray) -> np.ndarray:
    """y of one image (C, H, W): one position, one neighbour and one product at a time."""
    channels, height, width = image.shape
    embed = [np.eye(channels)] * 2
    if layer.kind in ("softmax", "bilateral"):
        embed = [m.weight.detach().numpy()[:, :, 0, 0] for m in (layer.theta, layer.phi)]
    everywhere = [(row, column) for row in range(height) for column in range(width)]
    out = np.zeros_like(image)
    for row, column in everywhere:
        around = [(r, c) for r, c in everywhere if abs(r - row) <= 1 and abs(c - column) <= 1]
        if layer.kind == "mean":
            out[:, row, column] = sum(image[:, r, c] for r, c in around) / len(around)
        elif layer.kind == "median":
            rows = [min(max(row + i, 0), height - 1) for i in (-1, 0, 1)]
            columns = [min(max(column + j, 0), width - 1) for j in (-1, 0, 1)]
            out[:, row, column] = np.median([image[:, r, c] for r in rows for c in columns], axis=0)
        else:
            members = everywhere if layer.kind in ("softmax", "dot") else around
            query = embed[0] @ image[:, row, column]
            scores = np.array([query @ (embed[1] @ image[:, r, c]) for r, c in members])
            if layer.kind in ("softmax", "bilateral"):
                scores = np.exp(scores / np.sqrt(len(query)))
                weights = scores / scores.sum()
            else:
                weights = scores / len(members)
            out[:, row, column] = sum(w * image[:, r, c] for w, (r, c) in zip(weights, members, strict=True))
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_paper_s_in_eval_mode(kind: str, shape: tuple[int, ...]) -> None:
    layer, feature = denoiser(shape[1], kind), features(*shape)
    weight = layer.conv.weight.detach().numpy()[:, :, 0, 0]
    scale, shift, mean, var = (
        t.detach().numpy()[:, None, None]
        for t in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean, layer.norm.running_var)
    )
    for image, found in zip(feature.numpy(), layer(feature)[0].detach().numpy(), strict=True):
        branch = np.einsum("oc,chw->ohw", weight, filtered(layer, image))
        expected = image + scale * (branch - mean) / np.sqrt(var + layer.norm.eps) + shift
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # the softmax is float32


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_mode_the_branch_is_normalised_over_the_batch(kind: str) -> None:
    layer, feature = denoiser(6, kind).train(), features(3, 6, 4, 5)
    smooth = np.stack([filtered(layer, image) for image in feature.numpy()])
    branch = np.einsum("oc,nchw->nohw", layer.conv.weight.detach().numpy()[:, :, 0, 0], smooth)
    branch = branch - branch.mean(axis=(0, 2, 3), keepdims=True)
    branch /= np.sqrt(np.square(branch).mean(axis=(0, 2, 3), keepdims=True) + layer.norm.eps)
    scale, shift = (t.detach().numpy()[None, :, None, None] for t in (layer.norm.weight, layer.norm.bias))
    expected = feature.numpy() + scale * branch + shift
    np.testing.assert_allclose(layer(feature)[0].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("softmax", "bilateral")])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    layer, feature = denoiser(3, kind), features(2, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: layer(f)[0], feature)


@pytest.mark.parametrize("kind", ["softmax", "bilateral"])
def test_the_gradient_of_the_softmax_is_that_of_a_plain_attention(kind: str) -> None:
    layer, feature = denoiser(4, kind), features(2, 4, 3, 3).requires_grad_()
    query, key, value = (m(feature).flatten(2) for m in (layer.theta, layer.phi, nn.Identity()))
    scores = torch.einsum("ndi,ndj->nij", query, key) / 2**0.5
    if kind == "bilateral":
        place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        far = (place[:, None] - place[None]).abs().amax(dim=2) > 1
        scores = scores.masked_fill(far, float("-inf"))
    smooth = torch.einsum("nij,ncj->nci", scores.softmax(dim=2), value).view(feature.shape)
    direction = features(2, 4, 3, 3).flip(0)
    expected = torch.autograd.grad((feature + layer.norm(layer.conv(smooth))).mul(direction).sum(), feature)
    found = torch.autograd.grad(layer(feature)[0].mul(direction).sum(), feature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_orders_of_the_dot_product_agree() -> None:
    for shape in ((2, 3, 4, 4), (2, 20, 2, 2)):
        layer, feature = denoiser(shape[1], "dot"), features(*shape)
        expected = np.stack([filtered(layer, image) for image in feature.numpy()])
        direct = layer.norm(layer.conv(torch.from_numpy(expected))) + feature
        torch.testing.assert_close(layer(feature)[0], direct)


def test_half_precision_does_not_overflow() -> None:
    """f_i . f_j, summed over the positions before it is divided by their number, is beyond float16 here."""
    feature = torch.full((1, 64, 16, 16), 8.0)
    layer = Denoise(64, 10, kind="dot").eval().half()
    nn.init.ones_(layer.norm.weight)
    nn.init.constant_(layer.conv.weight, 1e-3)
    assert layer(feature.half())[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_changes_nothing(kind: str) -> None:
    layer, feature = Denoise(6, 10, kind=kind), features(3, 6, 4, 5).float()
    for training in (True, False):
        assert torch.equal(layer.train(training)(feature)[0], feature)
    embeddings = [m for m in (layer.theta, layer.phi) if isinstance(m, nn.Conv2d)]
    assert len(embeddings) == (2 if kind in ("softmax", "bilateral") else 0)
    assert all(m.out_channels == 3 and m.bias is None for m in embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_the_contract_holds_for_every_kind(kind: str) -> None:
    layer = denoiser(8, kind).float().train()
    feature = features(4, 8, 5, 3).float().requires_grad_()
    (layer(feature)[0] * features(4, 8, 5, 3).flip(0).float()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    layer.eval()
    last = feature.detach().to(memory_format=torch.channels_last)
    out = copy.deepcopy(layer).to(memory_format=torch.channels_last)(last)[0]
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(feature)[0], rtol=1e-4, atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(feature.to(dtype))[0].dtype == dtype
    assert layer.bfloat16()(feature.bfloat16())[0].dtype == torch.bfloat16
    assert layer.to("meta")(feature.to("meta"))[0].shape == feature.shape


def test_the_median_s_gradient_is_one_value_s_and_its_surrogate_s_the_mean_s() -> None:
    layer, feature = denoiser(1, "median"), features(1, 1, 5, 5).requires_grad_()
    nn.init.zeros_(layer.norm.bias)
    plain = layer(feature)[0]
    (one,) = torch.autograd.grad(plain[0, 0, 2, 2], feature)
    one[0, 0, 2, 2] -= 1  # the residual's
    assert one.count_nonzero() == 1
    layer.surrogate = "mean_filter"
    smoothed = layer(feature)[0]
    torch.testing.assert_close(smoothed, plain)
    (nine,) = torch.autograd.grad(smoothed[0, 0, 2, 2], feature)
    slope = (
        layer.conv.weight.item() * layer.norm.weight.item() / (layer.norm.running_var.item() + layer.norm.eps) ** 0.5
    )
    expected = F.pad(torch.full((1, 1, 3, 3), slope / 9, dtype=torch.float64), (1, 1, 1, 1))
    expected[0, 0, 2, 2] += 1
    torch.testing.assert_close(nine, expected)


def test_only_the_median_has_a_surrogate_of_its_own() -> None:
    for kind in KINDS:
        model = timm_fsr.attach(tiny_resnet(), "denoise", layer_args={"kind": kind})
        own = ("mean_filter",) if kind == "median" else ()
        assert list_surrogates(model) == (IDENTITY, *own, "bypass")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_compiled_and_exported_in_one_graph(kind: str) -> None:
    torch.compiler.reset()
    layer, feature = denoiser(6, kind), features(3, 6, 4, 5)
    expected = layer(feature)[0]
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(feature)[0], expected)
    torch.testing.assert_close(torch.export.export(layer, (feature,)).module()(feature)[0], expected)
    torch.compiler.reset()


def test_its_place_is_behind_each_stage() -> None:
    model = timm_fsr.attach(tiny_resnet(), "denoise")
    assert [site.name for site in model.denoise.sites] == ["layer1", "layer2", "layer3", "layer4"]


def test_an_unknown_kind_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="unknown kind of the feature layer 'denoise' 'medain'; did you mean 'median'"):
        Denoise(8, 10, kind="medain")
    with pytest.raises(ValueError, match=r"known: softmax, dot, bilateral, bilateral_dot, mean, median"):
        timm_fsr.attach(tiny_resnet(), "denoise", layer_args={"kind": ""})
