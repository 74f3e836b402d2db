"""Surrogates change gradients or leave layers out, and nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from support.tiny import images, tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.hooks.surrogates import BYPASS, IDENTITY, feature_layers, list_surrogates, noisy, plain, surrogate

GRADIENT_ONLY = (IDENTITY, "wide_tau", "straight_through", "detached_mask")


@pytest.fixture
def model() -> nn.Module:
    return with_fsr(tiny_resnet()).eval()


def logits_and_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    given = images().requires_grad_(True)
    logits = model(given)
    (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), given)
    return logits.detach(), gradient


class TestSurrogate:
    @pytest.mark.parametrize("name", GRADIENT_ONLY)
    def test_these_change_the_gradient_alone(self, model, name):
        logits, gradient = logits_and_gradient(model)
        with surrogate(model, name):
            other_logits, other_gradient = logits_and_gradient(model)
        torch.testing.assert_close(other_logits, logits)
        assert not torch.allclose(other_gradient, gradient, rtol=1e-2, atol=0)

    def test_bypass_is_the_base_model(self, model):
        with surrogate(model, BYPASS):
            bypassed = model(images())
        assert torch.equal(bypassed, timm_fsr.detach(model)(images()))

    def test_identity_has_the_base_models_gradient_behind_the_layer(self, model):
        """The gradient with respect to the feature map is that of the head alone."""
        site = model.fsr.sites[0]
        feature = torch.rand(2, site.layout.channels, 4, 4, requires_grad=True)
        with surrogate(model, IDENTITY):
            out = site(feature)
        (gradient,) = torch.autograd.grad(out.sum(), feature)
        assert torch.equal(gradient, torch.ones_like(feature))

    def test_robust_part_gives_out_the_mask_times_the_feature(self, model):
        layer, feature = model.fsr.sites[0].layer, torch.rand(2, model.fsr.sites[0].layout.channels, 4, 4)
        mask = layer(feature)[1]["mask"]
        with surrogate(model, "robust_part"):
            torch.testing.assert_close(layer(feature)[0], mask * feature)

    def test_wide_tau_has_the_gradient_of_a_ten_times_larger_tau(self, model):
        layer = model.fsr.sites[0].layer
        logits = torch.linspace(-2, 2, 9, requires_grad=True)
        layer.surrogate = "wide_tau"
        (gradient,) = torch.autograd.grad(layer._mask(logits).sum(), logits)
        (expected,) = torch.autograd.grad(torch.sigmoid(logits / (10 * layer.tau)).sum(), logits)
        torch.testing.assert_close(gradient, expected)

    def test_straight_through_and_detached(self, model):
        layer = model.fsr.sites[0].layer
        logits = torch.linspace(-2, 2, 9, requires_grad=True)
        layer.surrogate = "straight_through"
        (gradient,) = torch.autograd.grad(layer._mask(logits).sum(), logits)
        assert torch.equal(gradient, torch.ones_like(logits))
        layer.surrogate = "detached_mask"
        assert not layer._mask(logits).requires_grad

    def test_an_unknown_one_is_refused(self, model):
        with (
            pytest.raises(ValueError, match="unknown surrogate 'wide_ta'; did you mean 'wide_tau'"),
            surrogate(model, "wide_ta"),
        ):
            pass

    def test_a_model_without_layers_has_none(self):
        assert list_surrogates(tiny_resnet()) == ()
        with pytest.raises(ValueError, match="unknown surrogate 'identity'"), surrogate(tiny_resnet(), IDENTITY):
            pass

    @pytest.mark.parametrize("name", [*GRADIENT_ONLY, BYPASS, "robust_part"])
    def test_nothing_stays_after_an_exception(self, model, name):
        logits, gradient = logits_and_gradient(model)
        with pytest.raises(KeyError), surrogate(model, name):
            raise KeyError
        after = logits_and_gradient(model)
        assert torch.equal(after[0], logits)
        assert torch.equal(after[1], gradient)


class TestNoisy:
    def test_the_layers_are_random_and_batchnorm_is_not_touched(self, model):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with noisy(model):
            one, two = model(images()), model(images())
            assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert not torch.equal(one, two)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(images()), model(images()))

    def test_plain_undoes_both_inside_them(self, model):
        expected = model(images())
        with surrogate(model, BYPASS), noisy(model):
            with plain(model):
                assert torch.equal(model(images()), expected)
            assert not torch.equal(model(images()), expected)
        assert not any(layer.training for layer in feature_layers(model))
