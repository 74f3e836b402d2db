"""The one-step attacks of fast adversarial training: N-FGSM and FGSM-RS against their formulas."""

from __future__ import annotations

import pytest
import torch
from support.attacked import EPS, labels, loss_of, pixels, rng
from torch import Tensor, nn

from timm_fsr.attacks.base import is_one_step
from timm_fsr.attacks.pgd import FGSM, NFGSM, PGD

# Per-pixel slopes of a linear loss; some are 0, where a sign step stands still.
SLOPES = torch.randn(3, 5, 6, generator=rng(9), dtype=torch.float64) * (torch.arange(90).view(3, 5, 6) % 7 > 0)


def linear_loss(images: Tensor) -> Tensor:
    return (SLOPES * images).flatten(1).sum(1)


def uniform(half_width: float, seed: int = 3) -> Tensor:
    """What a generator of that seed draws first."""
    return torch.empty_like(pixels()).uniform_(-half_width, half_width, generator=rng(seed))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()


class TestNFGSM:
    @pytest.mark.parametrize(
        ("options", "half_width", "step"),
        [({}, 2 * EPS, EPS), ({"noise": 0.5}, 0.5 * EPS, EPS), ({"step_size": 0.03}, 2 * EPS, 0.03)],
        ids=repr,
    )
    def test_it_steps_from_a_noisy_image_and_clips_to_pixels_alone(self, options, half_width, step):
        noisy = (pixels() + uniform(half_width)).clamp(0, 1)
        expected = (noisy + step * SLOPES.sign()).clamp(0, 1)
        adversarial = NFGSM(eps=EPS, **options)(linear_loss, pixels(), generator=rng(3))
        torch.testing.assert_close(adversarial, expected)
        assert (adversarial.min(), adversarial.max()) == (0, 1)

    def test_it_leaves_the_ball_but_not_three_times_the_ball(self):
        distance = (NFGSM(eps=EPS)(linear_loss, pixels(), generator=rng(3)) - pixels()).abs()
        assert distance.max() > 2 * EPS
        assert (distance > EPS).float().mean() > 0.2
        assert distance.max() <= 3 * EPS * (1 + 1e-12)

    def test_the_gradient_is_that_at_the_noisy_image(self, model):
        noisy = (pixels() + uniform(2 * EPS)).clamp(0, 1).requires_grad_()
        nn.functional.cross_entropy(model(noisy), labels(), reduction="sum").backward()
        expected = (noisy.detach() + EPS * noisy.grad.sign()).clamp(0, 1)
        model.zero_grad()
        adversarial = NFGSM(eps=EPS)(loss_of(model), pixels(), generator=rng(3))
        torch.testing.assert_close(adversarial, expected)
        assert not torch.allclose(adversarial - noisy.detach(), FGSM(eps=EPS)(loss_of(model), pixels()) - pixels())

    def test_without_noise_it_is_fgsm(self, model):
        attack = NFGSM(eps=EPS, noise=0.0)
        torch.testing.assert_close(attack(loss_of(model), pixels()), FGSM(eps=EPS)(loss_of(model), pixels()))

    def test_the_noise_depends_on_the_generator_alone(self, model):
        state = torch.get_rng_state()
        first, again, other = (NFGSM(eps=EPS)(loss_of(model), pixels(), generator=rng(seed)) for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), state), "the default generator was used"
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_nothing_is_left_behind(self, model):
        images = pixels().requires_grad_()
        with torch.no_grad():
            adversarial = NFGSM(eps=EPS)(loss_of(model), images, generator=rng())
        assert not adversarial.requires_grad
        assert images.grad is None
        assert torch.equal(images, pixels())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_eps_0_gives_a_copy_of_the_images(self):
        images = pixels()
        adversarial = NFGSM(eps=0.0)(linear_loss, images)
        assert torch.equal(adversarial, images)
        adversarial.zero_()
        assert torch.equal(images, pixels())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": -0.1}, r"eps=-0.1 must be 0 or more: it is a radius in pixels"),
            ({"eps": float("nan")}, "eps=nan"),
            ({"eps": float("inf")}, "eps=inf"),
            ({"noise": -1.0}, r"noise=-1.0 must be 0 or more: it is a width in multiples of eps"),
            ({"noise": float("nan")}, "noise=nan"),
            ({"step_size": 0.0}, "step_size=0.0 must be positive"),
            ({"step_size": float("nan")}, "step_size=nan"),
            ({"step_size": float("inf")}, "step_size=inf"),
        ],
    )
    def test_bad_numbers_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            NFGSM(**options)

    @pytest.mark.parametrize("eps", [0.0, EPS])
    @pytest.mark.parametrize("images", [pixels() * 255, pixels() - 0.5, (pixels() * 255).byte()])
    def test_images_that_are_no_pixels_are_refused(self, eps, images):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            NFGSM(eps=eps)(linear_loss, images)

    def test_another_radius_scales_the_step(self):
        assert NFGSM(eps=0.1, noise=1.5, step_size=0.02).with_eps(0.2) == NFGSM(eps=0.2, noise=1.5, step_size=0.04)
        assert NFGSM(eps=0.1).with_eps(0.2) == NFGSM(eps=0.2)
        assert NFGSM(eps=0.1, step_size=0.02).with_eps(0) == NFGSM(eps=0)


class TestFGSMRS:
    ATTACK = PGD(eps=EPS, steps=1, step_size=1.25 * EPS)

    def test_it_steps_from_a_random_point_and_is_clipped_to_the_ball(self):
        start = (pixels() + uniform(EPS)).clamp(0, 1)
        moved = start + 1.25 * EPS * SLOPES.sign()
        expected = torch.minimum(torch.maximum(moved, pixels() - EPS), pixels() + EPS).clamp(0, 1)
        adversarial = self.ATTACK(linear_loss, pixels(), generator=rng(3))
        torch.testing.assert_close(adversarial, expected)
        assert ((moved - pixels()).abs() > EPS).any(), "nothing had to be clipped"

    def test_it_stays_in_the_ball(self, model):
        adversarial = self.ATTACK(loss_of(model), pixels(), generator=rng(3))
        distance = (adversarial - pixels()).abs()
        assert 0.9 * EPS < distance.max() <= EPS * (1 + 1e-12)
        assert (adversarial.min(), adversarial.max()) == (0, 1)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [(PGD(steps=1), True), (PGD(steps=2), False), (PGD(), False), (FGSM(), True), (NFGSM(), True)],
    ids=repr,
)
def test_attacks_of_one_step_are_known_as_such(attack, expected):
    assert is_one_step(attack) is expected
