"""Stochastic activation pruning: the distribution it draws from, its scale, its gradient, its silence in eval mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import images, tiny_resnet
from torch import Tensor

import timm_fsr
from timm_fsr.hooks.surrogates import list_surrogates, noisy
from timm_fsr.layers.sap import SAP, drawn


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def chances(feature: np.ndarray, draws: int) -> np.ndarray:
    """The probability of each value of one image to be drawn at least once, value by value, in double precision."""
    total = sum(abs(float(value)) for value in feature.ravel())
    out = np.empty(feature.shape)
    for index in np.ndindex(feature.shape):
        out[index] = 1 - (1 - abs(float(feature[index])) / total) ** draws
    return out


@pytest.mark.parametrize("fraction", [0.3, 1.0, 2.5])
def test_what_is_kept_is_scaled_up_by_its_chance(fraction: float) -> None:
    torch.manual_seed(0)
    feature = features(4, 5, 3, 4)
    out, aux = SAP(5, 10, fraction=fraction)(feature)
    kept = aux["mask"].numpy().astype(bool)
    assert 0 < kept.mean() < 1
    for image, mask, found in zip(feature.numpy(), kept, out.numpy(), strict=True):
        expected = np.where(mask, image / chances(image, int(fraction * image.size)), 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert mask.sum() <= int(fraction * image.size), "more are kept than were drawn"


def test_the_input_is_the_expectation_of_the_output() -> None:
    """With a standard error of each mean: |f| * sqrt((1 / chance - 1) / draws)."""
    torch.manual_seed(0)
    image, passes = features(1, 3, 2, 2), 4000
    out, aux = SAP(3, 10)(image.expand(passes, -1, -1, -1).contiguous())
    chance = torch.from_numpy(chances(image[0].numpy(), 12)).float()
    error = image[0].abs() * ((1 / chance - 1) / passes).sqrt()
    assert ((out.mean(dim=0) - image[0]).abs() < 5 * error).all()
    kept = aux["mask"].mean(dim=0)
    assert ((kept - chance).abs() < 5 * (chance * (1 - chance) / passes).sqrt()).all()


def test_draws_are_made_with_replacement() -> None:
    """Two draws from two equal entries give both of them in half of the cases, one alone in the other half."""
    torch.manual_seed(0)
    both = drawn(torch.ones(4000, 2), 2).all(dim=1).float().mean().item()
    assert abs(both - 0.5) < 5 * (0.25 / 4000) ** 0.5
    assert (drawn(torch.ones(50, 7), 1).sum(dim=1) == 1).all()


def test_zeros_are_never_drawn_and_large_values_almost_always() -> None:
    torch.manual_seed(0)
    size = torch.tensor([[0.0, 1e-9, 5.0, 0.0, 5.0, 0.0]]).expand(200, -1).contiguous()
    kept = drawn(size, 40)
    assert not kept[:, [0, 3, 5]].any()
    assert kept[:, [2, 4]].all()


def test_a_map_of_zeros_stays_one() -> None:
    feature = torch.zeros(2, 3, 2, 2)
    for dtype in (torch.float32, torch.float16):
        out, aux = SAP(3, 10)(feature.to(dtype))
        assert torch.equal(out, feature.to(dtype))
        assert not aux["mask"].any()


def test_the_only_activation_is_kept_as_it_is() -> None:
    feature = torch.tensor([0.0, 3.0, 0.0, 0.0]).view(1, 4, 1, 1)
    assert torch.equal(SAP(4, 10)(feature)[0], feature)
    one = torch.tensor([[[[-2.0]]]])
    assert torch.equal(SAP(1, 10, fraction=0.01)(one)[0], one)


def test_small_chances_are_exact_in_a_large_map() -> None:
    """1 - (1 - p)^r in float32 would be off by percents where p is near its precision."""
    torch.manual_seed(0)
    feature = torch.rand(1, 64, 64, 64) + 0.5
    out, aux = SAP(64, 10)(feature)
    size, count = feature.double(), feature.numel()
    scale = 1 / -np.expm1(count * np.log1p(-(size / size.sum()).numpy()))
    np.testing.assert_allclose(out.numpy(), feature.numpy() * aux["mask"].numpy() * scale, rtol=1e-4)


def test_a_scale_beyond_half_precision_does_not_overflow() -> None:
    torch.manual_seed(0)
    feature = torch.cat([torch.full((64, 1, 1), 2e-4), torch.ones(1, 1, 1)])[None].expand(500, -1, -1, -1)
    out = SAP(65, 10, fraction=0.02)(feature.half())[0]
    assert out.isfinite().all()
    assert (out[:, :64] > 0).any()


def test_the_gradient_is_the_scale_of_what_is_kept() -> None:
    torch.manual_seed(0)
    feature, direction = features(3, 4, 5, 3).requires_grad_(), features(3, 4, 5, 3).flip(0)
    out, aux = SAP(4, 10)(feature)
    (found,) = torch.autograd.grad((out * direction).sum(), feature)
    scale = np.stack([1 / chances(image, image.size) for image in feature.detach().numpy()])
    np.testing.assert_allclose(found.numpy(), direction.numpy() * aux["mask"].numpy() * scale, rtol=1e-5)


def test_in_eval_mode_it_is_its_expectation() -> None:
    feature = features(2, 4, 3, 3)
    state = torch.get_rng_state()
    out, aux = SAP(4, 10).eval()(feature)
    assert torch.equal(out, feature)
    assert aux == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_noisy_makes_the_paper_s_defence_of_it() -> None:
    model = timm_fsr.attach(tiny_resnet(), "sap").eval()
    base = timm_fsr.detach(timm_fsr.attach(tiny_resnet(), "sap")).eval()
    assert torch.equal(model(images()), base(images()))
    with noisy(model):
        one, other = model(images()), model(images())
    assert not torch.equal(one, other)
    assert torch.equal(model(images()), base(images()))
    assert list_surrogates(model) == ("identity", "bypass")


def test_a_seed_repeats_it_and_gradient_checkpointing_draws_the_same_again() -> None:
    found = []
    for checkpointing in (False, True, False):
        model = timm_fsr.attach(tiny_resnet(), "sap").train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_compiled_in_one_graph(training: bool) -> None:
    torch.compiler.reset()
    layer, feature = SAP(4, 10).train(training), features(2, 4, 5, 3)
    compiled, found = torch.compile(layer, backend="aot_eager", fullgraph=True), []
    for runner in (compiled, layer):
        torch.manual_seed(0)
        found.append(runner(feature)[0])
    torch.testing.assert_close(*found)
    torch.compiler.reset()


def test_on_the_meta_device() -> None:
    feature = features(2, 4, 3, 3).to("meta")
    assert SAP(4, 10)(feature)[0].shape == feature.shape


@pytest.mark.parametrize("fraction", [0.0, -1.0, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction=.* must be positive: it is the number of draws per activation"):
        SAP(4, 10, fraction=fraction)
