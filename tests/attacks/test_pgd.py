"""FGSM and PGD against plain loops, and everything an attack must leave as it was."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from support.attacked import EPS, labels, loss_of, pixels, rng
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.base import attack_mode, eval_mode, input_gradient, random_in_ball
from timm_fsr.attacks.pgd import FGSM, NFGSM, PGD

NORMS = ("linf", "l2")
RADIUS = {"linf": EPS, "l2": 0.5}


@pytest.fixture
def model() -> nn.Module:
    """A network without kinks, in float64, so that a plain loop agrees to rounding."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()


def distance(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """Per-image distance."""
    return torch.linalg.vector_norm((a - b).flatten(1), ord=float("inf") if norm == "linf" else 2, dim=1)


def reference(
    model: nn.Module, images: Tensor, norm: str, eps: float, steps: int, step: float, start: Tensor
) -> Tensor:
    """PGD as the paper writes it: image by image, step by step."""

    def project(candidate: Tensor, image: Tensor) -> Tensor:
        delta = candidate - image
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif delta.norm() > eps:
            delta = delta / delta.norm() * eps
        return (image + delta).clamp(0, 1)

    results = []
    for image, label, offset in zip(images, labels(len(images)), start, strict=True):
        candidate = project(image + offset, image)
        for _ in range(steps):
            candidate = candidate.detach().requires_grad_()
            loss = F.cross_entropy(model(candidate[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, candidate)
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            candidate = project(candidate.detach() + step * direction, image)
        results.append(candidate)
    return torch.stack(results)


class TestAgainstPlainLoops:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize(("steps", "share"), [(1, 1.0), (7, None), (5, 0.1)])
    def test_pgd(self, model, norm, steps, share):
        eps = RADIUS[norm]
        attack = PGD(
            norm=norm, eps=eps, steps=steps, step_size=None if share is None else share * eps, random_start=False
        )
        step = 2.5 * eps / steps if share is None else share * eps
        expected = reference(model, pixels(), norm, eps, steps, step, torch.zeros_like(pixels()))
        torch.testing.assert_close(attack(loss_of(model), pixels()), expected)
        assert distance(expected, pixels(), norm).min() > eps / 10

    @pytest.mark.parametrize("norm", NORMS)
    def test_pgd_from_a_random_start(self, model, norm):
        eps = RADIUS[norm]
        attack = PGD(norm=norm, eps=eps, steps=3, step_size=0.2 * eps)
        start = random_in_ball(pixels(), norm, eps, rng(7))
        expected = reference(model, pixels(), norm, eps, 3, 0.2 * eps, start)
        torch.testing.assert_close(attack(loss_of(model), pixels(), generator=rng(7)), expected)

    @pytest.mark.parametrize("norm", NORMS)
    def test_fgsm(self, model, norm):
        eps = RADIUS[norm]
        gradient = input_gradient(loss_of(model), pixels())
        step = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = (pixels() + eps * step).clamp(0, 1)
        torch.testing.assert_close(FGSM(norm=norm, eps=eps)(loss_of(model), pixels()), expected)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_loss_may_be_a_sum_or_one_value_per_image(self, model, norm):
        attack = PGD(norm=norm, eps=RADIUS[norm], steps=3, random_start=False)
        each, total = (attack(loss_of(model, reduction), pixels()) for reduction in ("none", "sum"))
        torch.testing.assert_close(each, total)

    def test_it_ascends_the_sum_not_the_mean(self):
        gradient = input_gradient(lambda x: x.square().flatten(1).sum(1), pixels())
        torch.testing.assert_close(gradient, 2 * pixels())

    def test_small_gradients_survive_half_precision(self):
        """The mean over the batch would lose them: 1e-7 is far below half precision's smallest number over 8."""
        images = pixels(8, torch.float16)
        gradient = input_gradient(lambda x: 1e-7 * x.flatten(1).sum(1), images)
        assert (gradient > 0).all()


class TestBall:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("step_size", [None, 10.0])
    def test_the_result_is_in_the_ball_and_in_0_to_1(self, model, norm, step_size):
        eps = RADIUS[norm]
        attack = PGD(norm=norm, eps=eps, steps=5, step_size=step_size)
        adversarial = attack(loss_of(model), pixels(), generator=rng())
        assert distance(adversarial, pixels(), norm).max() <= eps * (1 + 1e-12)
        assert adversarial.min() == 0
        assert adversarial.max() == 1
        assert not adversarial.requires_grad

    @pytest.mark.parametrize("norm", NORMS)
    def test_float32_stays_in_the_ball_up_to_rounding(self, model, norm):
        images = pixels(dtype=torch.float32)
        adversarial = PGD(norm=norm, eps=RADIUS[norm], steps=5)(loss_of(model.float()), images, generator=rng())
        assert adversarial.dtype == torch.float32
        assert distance(adversarial, images, norm).max() <= RADIUS[norm] + 1e-6

    def test_a_linf_start_is_uniform(self):
        like = torch.empty(100, 3, 10, 10)
        offsets = random_in_ball(like, "linf", EPS, rng()).flatten()
        assert offsets.abs().max() <= EPS
        expected = torch.full((20,), len(offsets) / 20)
        deviation = (torch.histc(offsets, 20, -EPS, EPS) - expected) / expected.sqrt()
        assert deviation.abs().max() < 4.5

    def test_an_l2_start_is_uniform_in_the_volume(self):
        """In d dimensions (radius / eps) ** d of a uniform point is uniform in [0, 1], and its direction isotropic."""
        offsets = random_in_ball(torch.empty(20_000, 1, 2, 3), "l2", 0.5, rng()).flatten(1)
        radius = offsets.norm(dim=1)
        assert radius.max() <= 0.5 * (1 + 1e-6)
        deviation = (torch.histc((radius / 0.5) ** 6, 20, 0, 1) - 1000) / 1000**0.5
        assert deviation.abs().max() < 4.5
        directions = offsets / radius[:, None]
        torch.testing.assert_close(directions.mean(0), torch.zeros(6), atol=0.015, rtol=0)
        torch.testing.assert_close(directions.T @ directions / 20_000, torch.eye(6) / 6, atol=0.01, rtol=0)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_start_depends_on_the_generator_alone(self, model, norm):
        attack = PGD(norm=norm, eps=RADIUS[norm], steps=1, step_size=1e-3)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = attack(loss_of(model), pixels(), generator=rng(5))
        assert torch.equal(torch.get_rng_state(), state), "the default generator was used"
        torch.manual_seed(2)
        assert torch.equal(attack(loss_of(model), pixels(), generator=rng(5)), first)
        assert not torch.equal(attack(loss_of(model), pixels(), generator=rng(6)), first)

    def test_without_a_generator_the_default_one_decides(self, model):
        attack = PGD(eps=EPS, steps=1, step_size=1e-3)
        torch.manual_seed(3)
        first = attack(loss_of(model), pixels())
        torch.manual_seed(3)
        assert torch.equal(attack(loss_of(model), pixels()), first)

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_gaussian_start_is_drawn_with_its_deviation_and_projected(self, norm):
        """0.001, as TRADES and MART have it, stays inside the ball; 0.2 does not."""
        noise = torch.randn(pixels().shape, generator=rng(5), dtype=torch.float64)
        for deviation in (0.001, 0.2):
            seen: list[Tensor] = []
            attack = PGD(norm=norm, eps=RADIUS[norm], steps=1, start_noise=deviation)
            attack(
                lambda x, seen=seen: seen.append(x.detach().clone()) or x.flatten(1).sum(1), pixels(), generator=rng(5)
            )
            offset = deviation * noise
            if norm == "linf":
                offset = offset.clamp(-EPS, EPS)
            else:
                lengths = offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                offset = offset * (RADIUS[norm] / lengths).clamp(max=1)
            torch.testing.assert_close(seen[0], (pixels() + offset).clamp(0, 1))

    def test_a_gaussian_start_has_its_own_generator_and_goes_along_into_another_ball(self, model):
        attack = PGD(eps=EPS, steps=1, step_size=1e-3, start_noise=0.01)
        first, again, other = (attack(loss_of(model), pixels(), generator=rng(seed)) for seed in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert attack.with_eps(2 * EPS) == PGD(eps=2 * EPS, steps=1, step_size=2e-3, start_noise=0.01)

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_gradient_that_is_no_number_is_not_hidden(self, norm):
        """torch.sign(NaN) is 0: the image would count as one that resists the attack."""
        attack = PGD(norm=norm, eps=RADIUS[norm], steps=2, random_start=False)
        adversarial = attack(lambda x: (x - x).sqrt().flatten(1).sum(1), pixels())
        assert adversarial.isnan().all()

    def test_images_of_zero_gradient_stay_numbers(self):
        images = pixels()
        for norm in NORMS:
            attack = PGD(norm=norm, eps=RADIUS[norm], steps=2, random_start=False)
            torch.testing.assert_close(attack(lambda x: 0 * x.flatten(1).sum(1), images), images)


class TestRestarts:
    @staticmethod
    def bumpy(images: Tensor) -> Tensor:
        """Many local maxima, so that the runs end differently."""
        return (images * 80).sin().flatten(1).sum(1)

    def test_each_image_keeps_its_best_run(self):
        images = pixels(12)
        once = PGD(eps=EPS, steps=2, step_size=EPS / 10)
        generator = rng(3)
        runs = torch.stack([once(self.bumpy, images, generator=generator) for _ in range(4)])
        losses = torch.stack([self.bumpy(run) for run in runs])
        winner = losses.argmax(dim=0)
        assert len(winner.unique()) > 1, "one run won everywhere: the test would not see a per-batch choice"
        best = PGD(eps=EPS, steps=2, step_size=EPS / 10, restarts=4)(self.bumpy, images, generator=rng(3))
        assert torch.equal(best, runs[winner, torch.arange(12)])

    def test_they_need_a_loss_per_image(self, model):
        with pytest.raises(ValueError, match=r"restarts=2 needs one loss per image.*use reduction='none'"):
            PGD(eps=EPS, restarts=2)(loss_of(model, "sum"), pixels())


class TestInput:
    @pytest.mark.parametrize("attack", [PGD(eps=0.0), PGD(norm="l2", eps=0, restarts=3), FGSM(eps=0.0)], ids=repr)
    def test_eps_0_gives_a_copy_of_the_images(self, model, attack):
        images = pixels()
        adversarial = attack(loss_of(model), images)
        assert torch.equal(adversarial, images)
        adversarial.zero_()
        assert torch.equal(images, pixels())

    @pytest.mark.parametrize("attack", [PGD, FGSM, NFGSM, APGD])
    def test_an_eps_in_255ths_is_noticed_in_linf_alone(self, attack):
        with pytest.raises(ValueError, match=r"eps=8 is more than pixels .* can change by; .* write 8/255"):
            attack(eps=8)
        assert attack(eps=1.0).eps == 1
        if attack is not NFGSM:
            assert attack(norm="l2", eps=8.0).eps == 8

    @pytest.mark.parametrize("attack", [PGD, FGSM])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"norm": "l3"}, r"norm='l3' is unknown; use one of 'linf', 'l2'"),
            ({"eps": -1 / 255}, "must be 0 or more: it is a radius in pixels"),
            ({"eps": float("nan")}, "eps=nan"),
            ({"eps": float("inf")}, "eps=inf"),
        ],
    )
    def test_bad_balls_are_refused(self, attack, arguments, message):
        with pytest.raises(ValueError, match=message):
            attack(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "steps=0 and restarts=1 must be at least 1"),
            ({"restarts": 0}, "restarts=0"),
            ({"step_size": 0.0}, "step_size=0.0 must be positive"),
            ({"step_size": -0.1}, "step_size=-0.1"),
            ({"step_size": float("nan")}, "step_size=nan"),
            ({"step_size": float("inf")}, "step_size=inf"),
            ({"restarts": 2, "random_start": False}, "would repeat the same run"),
            ({"start_noise": 0.0}, "start_noise=0.0 must be a positive standard deviation"),
            ({"start_noise": -0.001}, "start_noise=-0.001"),
            ({"start_noise": float("nan")}, "start_noise=nan"),
            ({"start_noise": float("inf")}, "start_noise=inf"),
            ({"start_noise": 0.001, "random_start": False}, "start_noise=0.001 .*needs random_start"),
        ],
    )
    def test_bad_numbers_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PGD(**arguments)

    @pytest.mark.parametrize("attack", [PGD(), FGSM(), PGD(eps=0)], ids=repr)
    @pytest.mark.parametrize("images", [pixels() * 255, pixels() - 0.5, (pixels() * 255).byte()])
    def test_images_that_are_no_pixels_are_refused(self, model, attack, images):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            attack(loss_of(model), images)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda x: x.flatten(1), r"shape \(4, 90\) for 4 images; return one loss per image"),
            (lambda x: x.detach().sum(), "does not depend on the images"),
        ],
    )
    def test_losses_that_cannot_be_ascended_are_refused(self, loss, message):
        with pytest.raises(ValueError, match=message):
            PGD(eps=EPS, random_start=False)(loss, pixels())

    def test_another_ball_scales_the_step(self):
        assert PGD(eps=0.1, step_size=0.02).with_eps(0.2) == PGD(eps=0.2, step_size=0.04)
        assert PGD(eps=0.1, step_size=0.02).with_eps(0) == PGD(eps=0, step_size=None)
        assert PGD(eps=0.0, step_size=0.02).with_eps(0.1) == PGD(eps=0.1, step_size=0.02)
        assert PGD(eps=0.1).with_eps(0.2) == PGD(eps=0.2)
        assert FGSM(norm="l2", eps=0.1).with_eps(0.2) == FGSM(norm="l2", eps=0.2)

    def test_an_attack_is_its_own_label(self):
        assert repr(FGSM(eps=0.5)) == "FGSM(norm='linf', eps=0.5)"
        assert "norm='l2', eps=0.5, steps=3" in repr(PGD(norm="l2", eps=0.5, steps=3))


class TestManners:
    @pytest.mark.parametrize("attack", [PGD(eps=EPS, steps=2, restarts=2), FGSM(eps=EPS)], ids=repr)
    def test_nothing_is_left_behind(self, model, attack):
        images = pixels().requires_grad_()
        attack(loss_of(model), images, generator=rng())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert images.grad is None
        assert torch.equal(images, pixels())

    def test_it_works_inside_no_grad(self, model):
        attack = PGD(eps=EPS, steps=2)
        outside = attack(loss_of(model), pixels(), generator=rng())
        with torch.no_grad():
            assert torch.equal(attack(loss_of(model), pixels(), generator=rng()), outside)
            assert not torch.is_grad_enabled()

    def test_it_raises_the_loss_of_an_fsr_model_for_every_image(self):
        torch.manual_seed(0)
        model = timm.create_model("resnet_tiny_cifar_fsr", fsr_hidden=8).eval()
        images = pixels(dtype=torch.float32)
        images = F.interpolate(images, 32)
        with attack_mode(model), torch.no_grad():
            adversarial = PGD(eps=EPS, steps=5)(loss_of(model), images, generator=rng())
            assert (loss_of(model)(adversarial) > loss_of(model)(images)).all()


class TestAttackMode:
    @pytest.fixture
    def mixed(self) -> nn.Module:
        """In training mode but for one norm layer, with one parameter frozen."""
        torch.manual_seed(0)
        model = timm.create_model("resnet_tiny_cifar_fsr", fsr_hidden=8).train()
        model.bn1.eval()
        model.conv1.weight.requires_grad_(False)
        return model

    @staticmethod
    def flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
        return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    def test_inside_everything_is_in_eval_mode_and_frozen(self, mixed):
        with attack_mode(mixed) as inside:
            assert inside is mixed
            assert not any(self.flags(mixed)[0])
            assert not any(self.flags(mixed)[1])

    def test_afterwards_every_flag_is_as_before(self, mixed):
        before = self.flags(mixed)
        with attack_mode(mixed):
            pass
        assert self.flags(mixed) == before
        assert len(set(before[0])) == len(set(before[1])) == 2

    def test_also_after_an_exception(self, mixed):
        before = self.flags(mixed)
        with pytest.raises(KeyError), attack_mode(mixed):
            raise KeyError
        assert self.flags(mixed) == before

    @pytest.mark.parametrize("fails", [False, True])
    def test_eval_mode_alone_leaves_parameters_trainable_and_restores_mixed_flags(self, mixed, fails):
        modes, trainable = self.flags(mixed)
        with pytest.raises(KeyError) if fails else contextlib.nullcontext(), eval_mode(mixed) as inside:
            assert inside is mixed
            assert self.flags(mixed) == ([False] * len(modes), trainable)
            if fails:
                raise KeyError
        assert self.flags(mixed) == (modes, trainable)

    def test_an_attack_in_it_leaves_every_tensor_alone(self, mixed):
        before = {key: value.clone() for key, value in mixed.state_dict().items()}
        with attack_mode(mixed):
            PGD(eps=EPS, steps=2)(loss_of(mixed), torch.rand(2, 3, 32, 32, generator=rng()))
        assert all(torch.equal(value, before[key]) for key, value in mixed.state_dict().items())
        assert all(parameter.grad is None for parameter in mixed.parameters())
