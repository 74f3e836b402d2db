"""Adversarial weight perturbation: where the weights go, and that they come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.runs import tiny
from torch import Tensor, nn

import timm_fsr.training.step
from timm_fsr.training.awp import kept_buffers, perturbed_weights
from timm_fsr.training.trainer import train

GAMMA = 0.01
LABELS = torch.arange(6) % 3


def small() -> nn.Sequential:
    """A network with BatchNorm, in float64, whose norm and bias are no longer what they begin with."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def images() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), LABELS)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(model: nn.Module, loss_fn: Callable[[], Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
    """The weights while they are perturbed."""
    with perturbed_weights(model, loss_fn or (lambda: loss_of(model)), **{"gamma": GAMMA, **options}):
        return weights_of(model)


def official(model: nn.Module, gamma: float) -> dict[str, Tensor]:
    """The moved weights by the procedure of the authors' code (AdvWeightPerturb of csdongxian/AWP)."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    loss = -loss_of(proxy)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    found = weights_of(model)
    for name, stepped in proxy.named_parameters():
        if found[name].ndim > 1 and "weight" in name:
            diff = stepped.detach() - found[name]
            diff = found[name].norm() / (diff.norm() + 1e-20) * diff
            found[name] = found[name] + gamma * diff
    return found


class TestMove:
    def test_each_weight_moves_along_its_gradient_by_a_share_of_its_own_norm(self):
        model = small()
        before = weights_of(model)
        clone = copy.deepcopy(model)
        loss_of(clone).backward()
        gradients = {name: parameter.grad for name, parameter in clone.named_parameters()}
        for name, value in moved(model).items():
            weight, gradient = before[name], gradients[name]
            if weight.ndim > 1:
                expected = weight + GAMMA * weight.norm() * gradient / gradient.norm()
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
                assert float((value - weight).norm()) == pytest.approx(GAMMA * float(weight.norm()))
            else:
                assert torch.equal(value, weight), f"{name} of one dimension moved"

    def test_it_is_the_move_of_the_official_procedure(self):
        model = small()
        for name, value in moved(model).items():
            torch.testing.assert_close(value, official(model, GAMMA)[name], rtol=1e-9, atol=1e-12)

    def test_the_loss_is_higher_there(self):
        model = small()
        before = loss_of(model).item()
        with perturbed_weights(model, lambda: loss_of(model), gamma=GAMMA):
            inside = loss_of(model).item()
        assert inside > before + 1e-3

    def test_a_move_by_nothing_moves_nothing(self):
        model = small()
        assert same(moved(model, gamma=0.0), weights_of(model))

    def test_a_frozen_weight_stays(self):
        model = small()
        model[0].weight.requires_grad_(False)
        before = weights_of(model)
        after = moved(model)
        assert torch.equal(after["0.weight"], before["0.weight"])
        assert not torch.equal(after["5.weight"], before["5.weight"])

    def test_a_weight_that_the_loss_does_not_use_stays(self):
        model = small()
        model.add_module("unused", nn.Linear(2, 2).double())
        before = weights_of(model)
        after = moved(model, lambda: loss_of(model[:6]))
        assert torch.equal(after["unused.weight"], before["unused.weight"])
        assert not torch.equal(after["0.weight"], before["0.weight"])

    def test_a_weight_with_a_zero_gradient_stays_instead_of_becoming_nan(self):
        model = small()
        assert same(moved(model, lambda: 0 * loss_of(model)), weights_of(model))

    def test_a_weight_of_zeros_stays(self):
        """As the paper has it: the move is relative to the weight's own norm."""
        model = small()
        nn.init.zeros_(model[5].weight)
        assert not moved(model)["5.weight"].any()


class TestAverage:
    def test_it_is_given_the_gradients_and_its_result_is_what_counts(self):
        model = small()
        clone = copy.deepcopy(model)
        loss_of(clone).backward()
        seen: list[Tensor] = []

        def ones(gradients: list[Tensor]) -> list[Tensor]:
            seen.extend(gradients)
            return [torch.ones_like(gradient) for gradient in gradients]

        before, after = weights_of(model), moved(model, average=ones)
        for given, layer in zip(seen, (clone[0], clone[5]), strict=True):
            torch.testing.assert_close(given, layer.weight.grad)
        for name in ("0.weight", "5.weight"):
            step = GAMMA * before[name].norm() / before[name].numel() ** 0.5
            torch.testing.assert_close(after[name], before[name] + step)

    def test_the_length_of_the_gradients_is_of_no_account(self):
        """So neither the loss scale of fp16 nor a sum in place of a mean changes the move."""
        model = small()
        assert same(moved(model, average=lambda found: [2 * gradient for gradient in found]), moved(model))


class TestAfterwards:
    def test_all_is_again_what_it_was_to_the_bit(self):
        model = small()
        before = state_of(model)
        inside = moved(model)
        assert not torch.equal(inside["0.weight"], before["0.weight"])
        assert same(state_of(model), before)

    def test_also_after_an_exception_inside(self):
        model = small()
        before = state_of(model)
        with pytest.raises(KeyError), perturbed_weights(model, lambda: loss_of(model), gamma=GAMMA):
            raise KeyError
        assert same(state_of(model), before)

    def test_also_after_an_exception_in_the_loss(self):
        model = small()
        before = state_of(model)

        def failing() -> Tensor:
            loss_of(model)
            raise KeyError

        with pytest.raises(KeyError):
            moved(model, failing)
        assert same(state_of(model), before)

    def test_also_after_a_gradient_of_nan_which_moves_nothing(self):
        model = small()
        before = state_of(model)
        assert torch.equal(moved(model, lambda: loss_of(model) * torch.nan)["0.weight"], before["0.weight"])
        assert same(state_of(model), before)

    def test_the_pass_that_finds_the_move_leaves_batchnorms_statistics_alone(self):
        model = small()
        before = state_of(model)
        with perturbed_weights(model, lambda: loss_of(model), gamma=GAMMA):
            for name, buffer in model.named_buffers():
                assert torch.equal(buffer, before[name]), name
            loss_of(model)
        assert int(model[1].num_batches_tracked) == 1, "the pass inside the block counts"

    def test_no_gradient_is_accumulated(self):
        model = small()
        moved(model)
        assert all(parameter.grad is None for parameter in model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        moved(model)
        assert all((parameter.grad == 1).all() for parameter in model.parameters())

    def test_the_gradient_taken_inside_is_that_at_the_moved_weights(self):
        model, other = small(), small()
        for name, value in official(other, GAMMA).items():
            other.get_parameter(name).data.copy_(value)
        loss_of(other).backward()
        with perturbed_weights(model, lambda: loss_of(model), gamma=GAMMA):
            loss_of(model).backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-9)


def test_kept_buffers_restores_also_after_an_exception():
    model = small()
    before = state_of(model)

    def fail() -> None:
        loss_of(model)
        assert not same(state_of(model), before)
        raise KeyError

    with pytest.raises(KeyError), kept_buffers(model):
        fail()
    assert same(state_of(model), before)


def test_training_perturbs_from_the_given_epoch_on_by_the_given_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[float] = []
    weight_of_step: list[Tensor] = []
    original = timm_fsr.training.step.perturbed_weights

    def spy(model: nn.Module, *args: Any, gamma: float, **kwargs: Any) -> Any:
        sizes.append(gamma)
        weight_of_step.append(next(model.parameters()).detach().clone())
        return original(model, *args, gamma=gamma, **kwargs)

    monkeypatch.setattr(timm_fsr.training.step, "perturbed_weights", spy)
    flags = [
        "--data.limit_train=84",
        "--model.layer=null",
        "--evaluation.attacks=[]",
        "--evaluation.validation_steps=1",
    ]
    train(tiny(tmp_path, *flags, "--optim.awp_gamma=0.005", "--optim.awp_start=1"))
    assert sizes == [0.005, 0.005], "two epochs of two steps each"
    assert not torch.equal(*weight_of_step)
