"""GradAlign against hand-written gradients of linear models, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.tiny import images, labels, same_state, state, tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack, random_in_ball
from timm_fsr.attacks.pgd import FGSM, NFGSM
from timm_fsr.training.objectives.at import AT

EPS = 0.3
SHAPE = (3, 2, 2)
CLASSES = torch.tensor([0, 2, 1, 1])
ATTACKS = {"linf": FGSM(eps=EPS), "l2": FGSM(norm="l2", eps=EPS), "n_fgsm": NFGSM(eps=EPS)}


def pixels() -> Tensor:
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def linear(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    with torch.no_grad():
        model[1].weight.mul_(5)  # so that the probabilities, and with them the gradients, differ between points
    return model


def input_gradients(weight: np.ndarray, bias: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Gradients of each image's cross-entropy with respect to the image: W^T (p - y)."""
    scores = points @ weight.T + bias
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return (probabilities - np.eye(len(bias))[CLASSES.numpy()]) @ weight


def misalignment(one: np.ndarray, other: np.ndarray) -> float:
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(one, other, strict=True)]
    return 1 - sum(cosines) / len(cosines)


def by_hand(model: nn.Sequential, noise: Tensor) -> tuple[float, Callable[[np.ndarray, np.ndarray], float]]:
    """The value, and as a function of weight and bias with the gradient at the image held fixed."""
    weight, bias = (parameter.detach().double().numpy() for parameter in model[1].parameters())
    clean, noisy = (points.double().flatten(1).numpy() for points in (pixels(), pixels() + noise))
    fixed = input_gradients(weight, bias, clean)

    def value(weight: np.ndarray, bias: np.ndarray) -> float:
        return misalignment(fixed, input_gradients(weight, bias, noisy))

    return value(weight, bias), value


def aligned_term(model: nn.Module, attack: Attack, weight: float = 0.5) -> Tensor:
    adversarial = pixels()  # what is attacked has no part in the term
    torch.manual_seed(3)
    return AT(grad_align=weight).terms(model, attack, pixels(), adversarial, CLASSES)["grad_align"]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_term_is_1_minus_the_mean_cosine_of_the_gradients_at_the_image_and_at_a_random_point(attack):
    torch.manual_seed(3)
    if ATTACKS["l2"] is attack:
        noise = random_in_ball(pixels(), "l2", EPS)
    else:  # also of N-FGSM, whose own noise is twice as wide: GradAlign's is of the ball
        noise = torch.empty_like(pixels()).uniform_(-EPS, EPS)
    expected, _ = by_hand(linear(), noise)
    assert expected > 1e-3, "there is nothing to see"
    for weight in (0.5, 2.0):
        assert aligned_term(linear(), attack, weight).item() == pytest.approx(weight * expected, rel=1e-4)


def test_its_gradient_is_that_of_the_noisy_point_alone():
    """By central differences of the formula; the gradient at the image counts as constant, as in the original."""
    model = linear()
    aligned_term(model, ATTACKS["linf"], 1.0).backward()
    torch.manual_seed(3)
    _, value = by_hand(model, torch.empty_like(pixels()).uniform_(-EPS, EPS))
    start = [parameter.detach().double().numpy() for parameter in model[1].parameters()]
    for which, parameter in enumerate(model[1].parameters()):
        expected = np.zeros(parameter.shape)
        for index in np.ndindex(parameter.shape):
            sides = []
            for shift in (1e-5, -1e-5):
                moved = [array.copy() for array in start]
                moved[which][index] += shift
                sides.append(value(*moved))
            expected[index] = (sides[0] - sides[1]) / 2e-5
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_a_linear_model_of_two_classes_is_aligned_already():
    """Its input gradients all lie on one line, on the same side for the same label."""
    torch.manual_seed(3)
    classes = CLASSES.clamp(max=1)
    terms = AT(grad_align=1.0).terms(linear(2), ATTACKS["linf"], pixels(), pixels(), classes)
    assert terms["grad_align"].item() == pytest.approx(0, abs=1e-6)
    assert terms["adversarial"].item() > 0.1


def test_weight_0_leaves_it_out():
    terms = AT(grad_align=0.0).terms(linear(), ATTACKS["linf"], pixels(), pixels(), CLASSES)
    assert list(terms) == ["adversarial"]


@pytest.mark.parametrize("kind", ["plain", "fsr"])
class TestManners:
    @pytest.fixture
    def model(self, kind: str) -> nn.Module:
        """In training mode but for one norm layer; its residual branches are no longer zero, as timm begins them."""
        model = tiny_resnet() if kind == "plain" else with_fsr(tiny_resnet())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        model.train().bn1.eval()
        return model

    @staticmethod
    def seeded(model: nn.Module, objective: AT) -> dict[str, Tensor]:
        torch.manual_seed(4)
        return objective(model, FGSM(eps=0.1), images(), labels())

    def test_statistics_flags_and_the_other_terms_are_as_without_it(self, model):
        other, modes = copy.deepcopy(model), [module.training for module in model.modules()]
        before = state(model)
        plain, aligned = self.seeded(other, AT()), self.seeded(model, AT(grad_align=0.2))
        assert list(aligned) == [*plain, "grad_align"]
        assert all(torch.equal(aligned[name], plain[name]) for name in plain)
        assert same_state(model, state(other))
        assert not same_state(model, before), "the main pass left the statistics alone too"
        assert [module.training for module in model.modules()] == modes
        assert len(set(modes)) == 2
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_the_second_derivative_reaches_every_weight_behind_the_logits(self, model, kind):
        """Those of feature layers too, but for their auxiliary heads."""
        self.seeded(model, AT(grad_align=0.2))["grad_align"].backward()
        reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        silent = [name for name, _ in model.named_parameters() if name not in reached]
        assert silent == ([] if kind == "plain" else ["fsr.layer4.head.weight", "fsr.layer4.head.bias"])
        for name, gradient in reached.items():
            assert gradient.isfinite().all(), name
            assert gradient.any(), name


def test_attention_may_be_differentiated_twice():
    """Fused kernels, which timm's attention takes where it can, have no second derivative."""
    model = tiny_vit().train()
    assert model.blocks[0].attn.fused_attn
    AT(grad_align=0.2)(model, FGSM(eps=0.1), images(), labels())["grad_align"].backward()
    weight = model.blocks[0].attn.qkv.weight
    assert weight.grad.isfinite().all()
    assert weight.grad.any()
