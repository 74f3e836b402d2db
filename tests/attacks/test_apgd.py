"""Auto-PGD against its reference implementation, and its manners."""

from __future__ import annotations

import math

import pytest
import torch
from support.attacked import robust
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.base import Judged, attack_mode, judged_loss
from timm_fsr.attacks.losses import cross_entropy, dlr, margin
from timm_fsr.attacks.pgd import PGD

EPS = {"linf": 0.06, "l2": 0.9}


class Slope(nn.Module):
    """The loss is the mean pixel, or a hill over it."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


GREY = torch.full((2, 1, 4, 4), 0.5)


class TestStrength:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("loss", [cross_entropy, dlr], ids=["ce", "dlr"])
    def test_as_strong_as_the_reference(self, trained, batch, norm, loss):
        """The random starts differ, so single images do; of 150 no more than 1 in 25 net."""
        pytest.importorskip("pyautoattack")
        from pyautoattack.autopgd_base import APGDAttack

        images, labels = batch
        name = {"linf": "Linf", "l2": "L2"}[norm]
        kind = "ce" if loss is cross_entropy else "dlr"
        with attack_mode(trained), torch.random.fork_rng(), torch.no_grad():
            reference = APGDAttack(trained, n_iter=50, norm=name, eps=EPS[norm], loss=kind, seed=0, device="cpu")
            theirs = robust(trained, reference.perturb(images, labels), labels)
            generator = torch.Generator().manual_seed(1)
            attack = APGD(norm=norm, eps=EPS[norm], steps=50)
            ours = robust(trained, attack(lambda x: loss(trained(x), labels), images, generator=generator), labels)
        assert 15 <= int(theirs.sum()) <= 135, "the comparison says nothing if all or none withstand"
        assert abs(int(ours.sum()) - int(theirs.sum())) <= 6

    def test_no_weaker_than_pgd(self, trained, batch):
        images, labels = batch
        with attack_mode(trained):
            found = [
                attack(lambda x: cross_entropy(trained(x), labels), images, generator=torch.Generator().manual_seed(0))
                for attack in (APGD(eps=0.06, steps=20), PGD(eps=0.06, steps=20))
            ]
        apgd, pgd = (int(robust(trained, images, labels).sum()) for images in found)
        assert apgd <= pgd + 3


class TestSteps:
    def test_it_climbs_to_the_corner(self):
        attack = APGD(eps=0.1, steps=10)
        torch.testing.assert_close(attack(Slope(), GREY), torch.full_like(GREY, 0.6))

    def test_the_step_is_halved_until_a_narrow_peak_is_found(self):
        """PGD's constant step jumps over it for ever."""

        def peak(images: Tensor) -> Tensor:
            return -(images - 0.513).abs().mean(dim=(1, 2, 3))

        found = APGD(eps=0.1, steps=100)(peak, GREY, generator=torch.Generator().manual_seed(0))
        stuck = PGD(eps=0.1, steps=100, step_size=0.1)(peak, GREY, generator=torch.Generator().manual_seed(0))
        assert (found - 0.513).abs().mean() < 0.004
        assert (found - 0.513).abs().mean() < (stuck - 0.513).abs().mean() / 3

    def test_the_best_iterate_is_kept(self):
        """A loss that is high only where the walk has been once."""
        seen: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            seen.append(images.detach())
            bonus = 100.0 if len(seen) == 3 else 0.0
            return images.mean(dim=(1, 2, 3)) + bonus

        found = APGD(eps=0.1, steps=6)(loss, GREY)
        assert torch.equal(found, seen[2])

    def test_restarts_keep_the_best_of_each_image(self):
        calls: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            calls.append(images.detach())
            lucky = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[(len(calls) - 1) // 3]
            return images.mean(dim=(1, 2, 3)) * 1e-3 + lucky

        found = APGD(eps=0.1, steps=2, restarts=2)(loss, GREY, generator=torch.Generator().manual_seed(0))
        assert any(torch.equal(found[0], point[0]) for point in calls[:3])
        assert any(torch.equal(found[1], point[1]) for point in calls[3:])


class TestSuccesses:
    """The highest cross-entropy need not be a misclassified image's: three even logits have 1.1, two of them 0.7."""

    @staticmethod
    def seen(hits: dict[int, float], **options: int) -> tuple[Tensor, list[Tensor]]:
        """The result for a loss that rises with each pass, and falls in those of `hits`, where it is a success."""
        points: list[Tensor] = []

        def loss(images: Tensor) -> Judged:
            points.append(images.detach())
            value = hits.get(len(points) - 1, float(len(points)))
            fooled = torch.full((len(images),), len(points) - 1 in hits)
            aside = torch.randn(images.shape, generator=torch.Generator().manual_seed(len(points)))
            return Judged((images * aside).mean(dim=(1, 2, 3)) * 1e-6 + value, fooled)  # so that all iterates differ

        generator = torch.Generator().manual_seed(0)
        return APGD(eps=0.1, **options)(loss, GREY, generator=generator), points

    def test_a_misclassified_iterate_is_kept_whatever_its_loss(self):
        found, points = self.seen({3: -5.0}, steps=10)
        assert torch.equal(found, points[3])
        assert not torch.equal(points[3], points[4])

    def test_of_several_that_of_highest_loss(self):
        found, points = self.seen({2: -7.0, 3: -5.0, 6: -6.0}, steps=10)
        assert torch.equal(found, points[3])

    def test_restarts_do_not_give_it_up(self):
        for hit in (1, 6, 10):
            found, points = self.seen({hit: -5.0}, steps=4, restarts=3)
            assert len(points) == 15
            assert torch.equal(found, points[hit])

    @pytest.mark.parametrize("attack", [PGD, APGD])
    def test_more_restarts_never_break_fewer(self, attack):
        """Brighter images are taken for class 1; darker ones confuse more, with 38 classes, and break nothing."""

        def model(images: Tensor) -> Tensor:
            level = 20 * (images.mean(dim=(1, 2, 3)) - 0.5)
            others = (-level).clamp_min(0) - 2.1
            return torch.stack([torch.zeros_like(level), level.clamp_min(0) - 1, *[others] * 38], dim=1)

        images, labels = torch.full((40, 1, 2, 2), 0.5), torch.zeros(40, dtype=torch.int64)
        broken = torch.zeros(40, dtype=torch.bool)
        for restarts in (1, 2, 4):
            run, generator = attack(eps=0.1, steps=5, restarts=restarts), torch.Generator().manual_seed(5)
            found = run(judged_loss(model, cross_entropy, labels), images, generator=generator)
            after = model(found).argmax(1) != labels
            assert not bool((broken & ~after).any())
            assert int(after.sum()) > int(broken.sum())
            broken = after

    def test_no_pass_is_added(self, trained, batch):
        images, labels = batch[0][:4], batch[1][:4]
        calls: list[int] = []
        handle = trained.register_forward_hook(lambda *_: calls.append(1))
        try:
            with attack_mode(trained):
                APGD(eps=0.06, steps=7)(judged_loss(trained, cross_entropy, labels), images)
        finally:
            handle.remove()
        assert len(calls) == 8


class TestJudge:
    def test_the_judge_chooses_and_the_loss_only_steers(self):
        """Steered to brighter images, judged by darkness: the start, which is the darkest seen, is kept."""
        seen: list[Tensor] = []

        def dark(images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            seen.append(images)
            return -images.mean(dim=(1, 2, 3))

        found = APGD(eps=0.1, steps=5)(lambda x: x.sum(), GREY, judge=dark)
        values = torch.stack([image.mean(dim=(1, 2, 3)) for image in seen])
        torch.testing.assert_close(found.mean(dim=(1, 2, 3)), values.min(dim=0).values)

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="judge returned shape"):
            APGD(steps=1)(Slope(), GREY, judge=lambda x: x.mean())
        with pytest.raises(ValueError, match=r"return one loss per image \(N,\)"):
            APGD(steps=1)(lambda x: x.mean(), GREY)
        with pytest.raises(ValueError, match="does not depend on the images"):
            APGD(steps=1)(lambda x: torch.zeros(2), GREY)


class Root(nn.Module):
    """The mean pixel plus a root of zero, whose slope is NaN at images brighter than a border."""

    def __init__(self, border: float) -> None:
        super().__init__()
        self.border = border

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3))
        return level + torch.where(level > self.border, 0 * level, torch.ones_like(level)).sqrt() - 1


class TestBrokenGradients:
    @pytest.mark.parametrize("border", [0.0, 0.55], ids=["from the start", "on the way"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_such_images_are_nan_as_with_pgd(self, norm, border):
        """The best iterate would be one that the walk never left, or left unhurt, and so look robust."""
        images = torch.cat([GREY[:1], GREY[:1] * 0.2])  # the second one stays below the border
        for attack in (APGD(norm=norm, eps=0.4, steps=8), APGD(norm=norm, eps=0.4, steps=8, restarts=2)):
            found = attack(Root(border), images, generator=torch.Generator().manual_seed(0))
            assert bool(found[0].isnan().all())
            assert bool(found[1].isnan().any()) == (border == 0)
        walked = PGD(norm=norm, eps=0.4, steps=8)(Root(border), images, generator=torch.Generator().manual_seed(0))
        assert bool(walked[0].isnan().any())


class TestManners:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_ball_and_the_pixels(self, norm):
        images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        found = APGD(norm=norm, eps=0.3, steps=7)(lambda x: x.square().sum(dim=(1, 2, 3)), images)
        delta = (found - images).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert float(size.max()) <= 0.3 * (1 + 1e-5)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1

    def test_the_generator_decides_alone(self):
        attack = APGD(norm="l2", eps=0.1, steps=1)
        runs = [
            attack(lambda x: (9 * x).sin().mean(dim=(1, 2, 3)), GREY, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        ]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_inside_no_grad_and_without_parameter_gradients(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        with torch.no_grad():
            APGD(steps=2)(lambda x: margin(model(x), torch.tensor([0, 1])), GREY)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_eps_0_gives_the_images_and_with_eps_another_ball(self):
        assert torch.equal(APGD(eps=0)(Slope(), GREY), GREY)
        assert APGD(eps=0.1, steps=7).with_eps(0.2) == APGD(eps=0.2, steps=7)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"norm": "l1"}, "norm='l1' is unknown"),
            ({"eps": -0.1}, "must be 0 or more"),
            ({"eps": math.nan}, "must be 0 or more"),
            ({"steps": 0}, "must be at least 1"),
            ({"restarts": 0}, "must be at least 1"),
            ({"rho": 1.5}, r"rho=1.5 must lie in \[0, 1\]"),
        ],
    )
    def test_bad_numbers(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            APGD(**arguments)

    def test_images_out_of_range(self):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            APGD()(Slope(), GREY * 3)


class TestStart:
    """A run from given points, such as the best ones of another attack."""

    def test_a_point_that_no_step_improves_is_kept(self):
        """The loss rises with the mean: the start is the ball's highest point already."""
        attack = APGD(eps=0.06, steps=5)
        top = attack(Slope(), GREY)
        found = attack(Slope(), GREY, start=top)
        assert torch.allclose(found, top, atol=1e-6)

    def test_it_never_ends_below_its_start(self, trained, batch):
        images, labels = batch
        loss_fn = lambda x: margin(trained(x), labels)  # noqa: E731
        with attack_mode(trained), torch.no_grad():
            first = APGD(eps=0.06, steps=10)(loss_fn, images, generator=torch.Generator().manual_seed(0))
            before = first.clone()
            again = APGD(eps=0.06, steps=10)(loss_fn, images, start=first)
            assert torch.equal(first, before), "the given points are the caller's"
            assert bool((loss_fn(again) >= loss_fn(first)).all())
            assert bool((loss_fn(again) > loss_fn(first)).any())

    def test_points_outside_the_ball_are_clipped_to_it(self):
        far = torch.ones_like(GREY)
        found = APGD(eps=0.1, steps=2)(lambda x: -x.mean(dim=(1, 2, 3)), GREY, start=far)
        assert float((found - GREY).abs().max()) <= 0.1 + 1e-6


class TestRadii:
    """Each image in a ball of its own."""

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_each_image_stays_in_its_own_ball_and_uses_it(self, norm):
        given, radii = GREY.repeat(3, 1, 1, 1), torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
        attacked = APGD(norm=norm, steps=10)(Slope(), given, radii=radii)
        size = (attacked - given).flatten(1).norm(p={"linf": torch.inf, "l2": 2}[norm], dim=1)
        torch.testing.assert_close(size, radii, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_equal_radii_are_eps(self, trained, batch, norm):
        images, labels = (given[:20] for given in batch)
        loss_fn, attack = judged_loss(trained, margin, labels), APGD(norm=norm, eps=EPS[norm], steps=10)
        found = [
            one(loss_fn, images, generator=torch.Generator().manual_seed(0), radii=radii)
            for one, radii in ((attack, None), (attack.with_eps(0.01), torch.full((20,), EPS[norm])))
        ]
        torch.testing.assert_close(*found)

    def test_others_are_refused(self):
        for radii in (torch.zeros(2), torch.ones(3)):
            with pytest.raises(ValueError, match="one positive radius for each image"):
                APGD()(Slope(), GREY, radii=radii)
