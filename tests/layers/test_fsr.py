"""FSR's formulas against computations of their own in NumPy, and its noise against the paper's two Gumbels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_fsr import FSR
from timm_fsr.layers.common import logistic_noise, strongest_wrong_class

CHANNELS, HIDDEN, CLASSES, BATCH = 3, 4, 5, 2
LABELS = torch.tensor([1, 4])
Array = np.ndarray


def fsr(**args: Any) -> FSR:
    """A layer with random weights, running statistics included, in eval mode."""
    torch.manual_seed(0)
    layer = FSR(CHANNELS, CLASSES, **{"hidden": HIDDEN, **args})
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return layer.eval()


def feature() -> Tensor:
    return torch.randn(BATCH, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(1))


def main_logits() -> Tensor:
    return torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(2))


# The method once more, from the paper, in float64 and without torch.


def numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def conv3x3(x: Array, weight: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(weight), *x.shape[2:]))
    for row, column in itertools.product(range(x.shape[2]), range(x.shape[3])):
        patch = padded[:, :, row : row + 3, column : column + 3]
        out[:, :, row, column] = np.einsum("nchw,ochw->no", patch, weight)
    return out


def batch_norm(x: Array, norm: nn.BatchNorm2d, training: bool) -> Array:
    mean = x.mean((0, 2, 3)) if training else numpy(norm.running_mean)
    variance = x.var((0, 2, 3)) if training else numpy(norm.running_var)
    weight, bias = numpy(norm.weight), numpy(norm.bias)
    scale = (weight / np.sqrt(variance + norm.eps)).reshape(1, -1, 1, 1)
    return (x - mean.reshape(1, -1, 1, 1)) * scale + bias.reshape(1, -1, 1, 1)


def three_convolutions(x: Array, net: nn.Sequential, training: bool) -> Array:
    x = np.maximum(batch_norm(conv3x3(x, numpy(net[0].weight)), net[1], training), 0)
    x = np.maximum(batch_norm(conv3x3(x, numpy(net[3].weight)), net[4], training), 0)
    return conv3x3(x, numpy(net[6].weight))


def paper(layer: FSR, f: Array, training: bool = False) -> dict[str, Array]:
    """Everything FSR computes, without noise."""
    m = sigmoid(three_convolutions(f, layer.separation, training) / layer.tau)
    robust = m * f
    nonrobust = (1 - m) * f
    recalibrated = nonrobust + (1 - m) * three_convolutions(nonrobust, layer.recalibration, training)
    parts = {"robust": robust, "nonrobust": nonrobust, "recalibrated": recalibrated}
    weight, bias = numpy(layer.head.weight), numpy(layer.head.bias)
    logits = {f"{key}_logits": part.mean((2, 3)) @ weight.T + bias for key, part in parts.items()}
    return {"out": robust + recalibrated, "mask": m, **logits}


def cross_entropy(logits: Array, labels: list[int]) -> float:
    rows = [math.log(sum(math.exp(x) for x in row)) - row[y] for row, y in zip(logits, labels, strict=True)]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_the_formulas(training: bool, tau: float) -> None:
    layer = fsr(tau=tau, noise=False)
    expected = paper(layer, numpy(feature()), training)
    out, aux = layer.train(training)(feature())
    assert aux.keys() == expected.keys() - {"out"}
    for key, value in {"out": out, **aux}.items():
        np.testing.assert_allclose(numpy(value), expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_losses() -> None:
    layer = fsr(separation_weight=0.5, recalibration_weight=2.0)
    expected, logits = paper(layer, numpy(feature())), numpy(main_logits())
    wrong = []
    for row, label in zip(logits, LABELS.tolist(), strict=True):
        others = [(score, index) for index, score in enumerate(row) if index != label]
        wrong.append(max(others)[1])
    losses = layer.aux_losses(layer(feature())[1], main_logits(), LABELS)
    separation = cross_entropy(expected["robust_logits"], LABELS.tolist())
    separation += cross_entropy(expected["nonrobust_logits"], wrong)
    recalibration = cross_entropy(expected["recalibrated_logits"], LABELS.tolist())
    assert set(losses) == {"separation", "recalibration"}
    assert losses["separation"].item() == pytest.approx(0.5 * separation, rel=1e-4)
    assert losses["recalibration"].item() == pytest.approx(2.0 * recalibration, rel=1e-4)


def test_a_weight_of_zero_silences_its_loss() -> None:
    layer = fsr(separation_weight=0.0, recalibration_weight=0.0)
    losses = layer.aux_losses(layer(feature())[1], main_logits(), LABELS)
    assert [value.item() for value in losses.values()] == [0.0, 0.0]


def test_the_main_logits_learn_nothing_from_the_auxiliary_losses() -> None:
    layer, logits = fsr(), main_logits().requires_grad_()
    total = sum(layer.aux_losses(layer(feature())[1], logits, LABELS).values())
    assert torch.autograd.grad(total, logits, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("row", "label", "expected"),
    [
        ([3.0, 1.0, 2.0], 0, 2),  # the prediction is right: the runner-up
        ([3.0, 1.0, 2.0], 1, 0),  # it is wrong: the prediction
        ([-5.0, -1.0, -3.0], 1, 2),  # all negative
        ([0.0, -200.0, -1000.0], 0, 1),
        ([2.0, 7.0], 1, 0),
    ],
)
def test_the_strongest_wrong_class(row: list[float], label: int, expected: int) -> None:
    logits = torch.tensor([row], requires_grad=True)
    wrong = strongest_wrong_class(logits, torch.tensor([label]))
    assert wrong.tolist() == [expected]
    assert wrong.dtype == torch.int64


# The noise.


class Constant(nn.Module):
    """In place of S: one logit everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


def noisy_masks(logit: float, tau: float, draws: int) -> Array:
    layer = FSR(1, 0, hidden=1, tau=tau).train()
    layer.separation = Constant(logit)
    torch.manual_seed(4)
    return numpy(layer(torch.ones(draws // 100, 1, 10, 10))[1]["mask"]).ravel()


def gumbel_masks(logit: float, tau: float, draws: int) -> Array:
    """First entry of the softmax over {(log s + g1) / tau, (log(1 - s) + g2) / tau}, as in the official code."""
    random = np.random.default_rng(5)
    g1, g2 = (-np.log(-np.log(random.random(draws) + 1e-8) + 1e-8) for _ in range(2))
    s = sigmoid(np.array(logit))
    scores = np.stack([(np.log(s + 1e-8) + g1) / tau, (np.log(1 - s + 1e-8) + g2) / tau])
    powers = np.exp(scores - scores.max(0))
    return powers[0] / powers.sum(0)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("logit", [-3.0, -0.4, 0.0, 1.5])
def test_masks_in_training_follow_the_paper_s_distribution(logit: float, tau: float) -> None:
    draws = 40_000
    # Rounded, as close to 1 float32 has few values left.
    ours, theirs = (masks(logit, tau, draws).round(6) for masks in (noisy_masks, gumbel_masks))
    # Kolmogorov-Smirnov: the largest distance of the two empirical distributions; 1.95 is its quantile at
    # 0.1 %. The limit is 0.0138; normal noise of the same variance is 0.0226 away.
    grid = np.concatenate([ours, theirs])
    distances = [np.searchsorted(np.sort(masks), grid, side="right") / draws for masks in (ours, theirs)]
    assert np.abs(distances[0] - distances[1]).max() < 1.95 * math.sqrt(2 / draws)
    # At any tau the mask is above 1/2 with probability s, and the mean is that of the two Gumbels.
    s = float(sigmoid(np.array(logit)))
    assert (ours > 0.5).mean() == pytest.approx(s, abs=4 * math.sqrt(s * (1 - s) / draws))
    assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * ours.std() * math.sqrt(2 / draws))


def test_each_element_has_noise_of_its_own() -> None:
    torch.manual_seed(6)
    noise = numpy(logistic_noise(torch.empty(2000, 3, 2, 2))).reshape(2000, 12)
    correlations = np.corrcoef(noise.T) - np.eye(12)
    assert np.abs(correlations).max() < 5 / math.sqrt(2000)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_extremes_of_the_generator_stay_finite(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, uniform))
    assert logistic_noise(torch.zeros(3)).isfinite().all()
    out, aux = fsr().train()(feature())
    assert out.isfinite().all()
    assert aux["mask"].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise", [True, False])
def test_noise_exactly_when_training(training: bool, noise: bool) -> None:
    layer = fsr(noise=noise)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # running statistics stay, so that only noise can tell two passes apart
    layer.train(training)
    torch.manual_seed(7)
    first, second = (layer(feature())[1]["mask"] for _ in range(2))
    assert torch.equal(first, second) == (not (training and noise))
    torch.manual_seed(7)
    again = layer(feature())[1]["mask"]
    assert torch.equal(first, again), "the same seed gives another mask"


def test_the_mask_of_eval_mode_is_the_closed_form() -> None:
    layer = fsr()
    expected = torch.sigmoid(layer.separation(feature()) / 0.1)
    torch.testing.assert_close(layer(feature())[1]["mask"], expected)


# The arguments.


@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_hidden_is_the_width_of_both_networks(hidden: int) -> None:
    layer = FSR(CHANNELS, CLASSES, hidden=hidden)
    for net in (layer.separation, layer.recalibration):
        shapes = [tuple(m.weight.shape) for m in net if isinstance(m, nn.Conv2d)]
        assert shapes == [(hidden, CHANNELS, 3, 3), (hidden, hidden, 3, 3), (CHANNELS, hidden, 3, 3)]
        assert all(m.bias is None for m in net if isinstance(m, nn.Conv2d))
    assert layer(feature())[0].shape == feature().shape


def test_the_paper_s_numbers_are_the_defaults() -> None:
    layer = FSR(512, 10)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 1_259_018
    assert layer.resolved_args() == {
        "hidden": 64,
        "tau": 0.1,
        "separation_weight": 1.0,
        "recalibration_weight": 1.0,
        "noise": True,
        "feature_norm": False,
        "mode": "both",
    }


def test_feature_norm_normalises_what_the_networks_see_and_nothing_else() -> None:
    seen: list[Tensor] = []
    layer = fsr(feature_norm=True)
    for net in (layer.separation, layer.recalibration):
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    f = 10 + 5 * feature()
    out, aux = layer(f)
    for x in seen:
        torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(BATCH), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.square().mean((1, 2, 3)), torch.ones(BATCH), rtol=0, atol=1e-3)
    mask = aux["mask"]
    torch.testing.assert_close(out, f + (1 - mask) * layer.recalibration(layer.norm((1 - mask) * f)))


def test_without_feature_norm_there_is_no_such_weight() -> None:
    assert not any(key.startswith("norm") for key in fsr().state_dict())
    assert any(key.startswith("norm") for key in fsr(feature_norm=True).state_dict())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"hidden": 0}, "hidden=0 must be at least 1"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"tau": -0.1}, "tau=-0.1 must be positive"),
        ({"tau": float("nan")}, "tau=nan must be positive"),
        ({"separation_weight": -1.0}, "loss weights must be 0 or more"),
        ({"recalibration_weight": -1.0}, "loss weights must be 0 or more"),
    ],
)
def test_bad_arguments_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSR(CHANNELS, CLASSES, **args)


def test_losses_without_classes_are_refused() -> None:
    layer = FSR(CHANNELS, 0)
    aux = layer(feature())[1]
    assert set(aux) == {"mask"}
    with pytest.raises(ValueError, match=r"num_classes=0; call model\.reset_classifier"):
        layer.aux_losses(aux, main_logits(), LABELS)


def test_losses_of_another_width_are_refused() -> None:
    layer = fsr()
    with pytest.raises(ValueError, match="the model gives 7 logits but FSR's auxiliary head 5"):
        layer.aux_losses(layer(feature())[1], torch.zeros(BATCH, 7), LABELS)


def test_a_fresh_head_keeps_dtype_and_training_mode() -> None:
    layer = fsr().to(torch.bfloat16)
    layer.reset_classifier(9)
    assert layer.head.weight.shape == (9, CHANNELS)
    assert layer.head.weight.dtype == torch.bfloat16


# Mixed precision.


@pytest.mark.parametrize("training", [True, False])
def test_mask_and_auxiliary_logits_are_float32_under_autocast(training: bool) -> None:
    layer = fsr().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        out, aux = layer(feature())
        losses = layer.aux_losses(aux, main_logits(), LABELS)
    assert out.dtype == torch.float32
    assert {key: value.dtype for key, value in aux.items()} == dict.fromkeys(aux, torch.float32)
    assert all(value.dtype == torch.float32 for value in losses.values())
    # Not only the type: a mask computed in bfloat16 would have no more than eight significant bits.
    assert not torch.equal(aux["mask"], aux["mask"].bfloat16().float())


def test_half_precision_weights_give_float32_masks_and_losses() -> None:
    layer = fsr().bfloat16()
    out, aux = layer(feature().bfloat16())
    assert out.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in aux.values())
