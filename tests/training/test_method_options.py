"""The method part of a recipe: what each key builds, which keys are refused, and schedules step by step."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from support.tiny import tiny_resnet, tiny_vit, with_fsr

from timm_fsr.attacks.pgd import FGSM, FGSMRS, NFGSM, PGD
from timm_fsr.training.objectives.afd import AFD
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.mart import MART
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.trades import TRADES
from timm_fsr.training.options import (
    AttackOptions,
    CheckpointOptions,
    EvaluationOptions,
    ObjectiveOptions,
    OptimOptions,
)

NAMES = ("pgd", "fgsm", "fgsm_rs", "n_fgsm")
NAN = float("nan")


class TestAttack:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, PGD(norm="linf", eps=8 / 255, steps=10)),
            (
                {"norm": "l2", "eps": 0.5, "steps": 3, "step_size": 0.2, "random_start": False},
                PGD(norm="l2", eps=0.5, steps=3, step_size=0.2, random_start=False),
            ),
            ({"steps": 1, "start_noise": 0.001}, PGD(eps=8 / 255, steps=1, start_noise=0.001)),
            ({"name": "fgsm", "norm": "l2", "eps": 0.5}, FGSM(norm="l2", eps=0.5)),
            ({"name": "fgsm_rs", "eps": 0.1}, FGSMRS(eps=0.1)),
            (
                {"name": "fgsm_rs", "norm": "l2", "eps": 0.1, "step_size": 0.05},
                FGSMRS(norm="l2", eps=0.1, step_size=0.05),
            ),
            ({"name": "n_fgsm", "eps": 0.1}, NFGSM(eps=0.1, noise=2.0, step_size=None)),
            ({"name": "n_fgsm", "eps": 0.1, "step_size": 0.05}, NFGSM(eps=0.1, step_size=0.05)),
        ],
        ids=repr,
    )
    def test_each_name_builds_its_attack(self, options, expected):
        assert AttackOptions(**options).build() == expected

    @pytest.mark.parametrize("name", NAMES)
    def test_each_name_takes_eps_0_and_one_step(self, name):
        images = torch.rand(2, 3, 4, 4)
        attack = AttackOptions(name=name, eps=0.0, steps=1).build()
        assert torch.equal(attack(lambda x: x.flatten(1).sum(1), images), images)

    @pytest.mark.parametrize("name", NAMES[1:])
    @pytest.mark.parametrize(
        ("key", "value"), [("steps", 10), ("steps", 0), ("start_noise", 0.001), ("random_start", False)]
    )
    def test_keys_without_meaning_for_one_step_are_refused(self, name, key, value):
        with pytest.raises(ValueError, match=rf"attack.{key}={value} has no meaning for .*{name!r}; leave it out"):
            AttackOptions(name=name, **{key: value}).check()

    def test_other_keys_without_meaning_are_refused(self):
        with pytest.raises(ValueError, match=r"attack.norm=l2 has no meaning for the one-step attack 'n_fgsm'"):
            AttackOptions(name="n_fgsm", norm="l2").check()
        with pytest.raises(ValueError, match=r"attack.step_size=0.1 has no meaning for the one-step attack 'fgsm'"):
            AttackOptions(name="fgsm", step_size=0.1).check()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("eps", [-0.1, NAN])
    def test_a_bad_radius_is_refused_under_each_name(self, name, eps):
        with pytest.raises(ValueError, match=f"eps={eps}"):
            AttackOptions(name=name, eps=eps).check()

    def test_eps_rises_linearly_from_0_over_the_warm_up(self):
        options = AttackOptions(eps=0.2, warmup_epochs=4)
        epochs = {0: 0.0, 0.5: 0.025, 1: 0.05, 3: 0.15, 4: 0.2, 4.01: 0.2, 100: 0.2}
        assert {epoch: options.eps_at(epoch) for epoch in epochs} == pytest.approx(epochs)
        assert options.build().eps == 0.2, "validation is at the full eps"

    def test_without_a_warm_up_eps_is_full_from_the_start(self):
        assert AttackOptions(eps=0.2).eps_at(0) == AttackOptions(eps=0.2).eps_at(7.5) == 0.2

    @pytest.mark.parametrize("epochs", [-1, NAN, math.inf])
    def test_a_warm_up_that_is_no_length_is_refused(self, epochs):
        with pytest.raises(ValueError, match=f"attack.warmup_epochs={epochs} must be 0 or more"):
            AttackOptions(warmup_epochs=epochs).check()


class TestObjective:
    ARGS: ClassVar[dict[str, dict[str, Any]]] = {
        "at": {"grad_align": 0.2},
        "trades": {"beta": 3, "label_smoothing": 0.1},
        "mart": {"beta": 4.0},
        "afd": {"alignment": 3.0},
    }

    @pytest.mark.parametrize(
        ("name", "plain", "configured"),
        [
            ("at", AT(), AT(grad_align=0.2)),
            ("trades", TRADES(beta=6), TRADES(beta=3, label_smoothing=0.1)),
            ("mart", MART(beta=5), MART(beta=4)),
            ("natural", Natural(), Natural()),
            ("afd", AFD(alignment=25), AFD(alignment=3)),
        ],
    )
    def test_one_line_changes_the_method_and_finds_its_own_arguments(self, name, plain, configured):
        assert ObjectiveOptions(name=name).build() == plain
        assert ObjectiveOptions(name=name, args=self.ARGS).build() == configured

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"trades": {"betta": 6}}, r"unknown argument of the objective 'trades' 'betta'; did you mean 'beta'"),
            ({"at": {"beta": 6}}, r"unknown argument of the objective 'at' 'beta'"),
            ({"mart": {"beta": -1}}, "beta=-1 must be 0 or more"),
            ({"tardes": {"beta": 6}}, "unknown objective 'tardes'; did you mean 'trades'"),
            ({"trades": 6}, r"objective.args.trades is 6; write .* such as args: \{trades: \{beta: 6\}\}"),
            ({"label_smoothing": 0.1}, "unknown objective 'label_smoothing'"),
            ({"trades": {"beta": "six"}}, r"objective.args.trades=\{'beta': 'six'\} has a value of another type"),
            ({"trades": {"beta": None}}, "has a value of another type"),
        ],
        ids=repr,
    )
    def test_arguments_of_a_method_that_is_not_used_are_checked_too(self, args, message):
        for name in ("natural", *(key for key in args if key in ("at", "trades", "mart"))):
            with pytest.raises(ValueError, match=message):
                ObjectiveOptions(name=name, args=args).build()

    def test_an_unknown_name_names_the_nearest(self):
        with pytest.raises(ValueError, match="unknown objective 'trade'; did you mean 'trades'"):
            ObjectiveOptions(name="trade").build()


class TestOptimCheck:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optimizer": "adamq"}, "unknown optim.optimizer 'adamq'; did you mean 'adam"),
            ({"epochs": 0}, "optim.epochs=0 must be at least 1"),
            ({"batch_size": 0}, "optim.batch_size=0 must be at least 1"),
            ({"accumulate": 0}, "optim.accumulate=0 must be at least 1"),
            (
                {"batch_size": 128, "accumulate": 3},
                "optim.batch_size=128 does not divide into optim.accumulate=3 equal",
            ),
            ({"lr": 0}, "optim.lr=0 must be positive"),
            ({"lr": NAN}, "optim.lr=nan must be positive"),
            ({"lr": math.inf}, "optim.lr=inf must be positive"),
            ({"weight_decay": -1e-4}, "optim.weight_decay=-0.0001 0 or more"),
            ({"weight_decay": NAN}, "optim.weight_decay=nan"),
            *(({key: -0.1}, rf"optim.{key}=-0.1 must lie in \[0, 1\)") for key in ("momentum", "ema_decay", "warmup")),
            *(({key: 1.0}, rf"optim.{key}=1.0 must lie in \[0, 1\)") for key in ("momentum", "ema_decay", "warmup")),
            ({"awp_gamma": -0.01}, "optim.awp_gamma=-0.01 must be 0 or more"),
            ({"awp_gamma": NAN}, "optim.awp_gamma=nan"),
            ({"awp_start": -1}, "optim.awp_start=-1 must be 0 or more"),
            ({"gamma": -0.1}, "optim.gamma=-0.1 must be 0 or more"),
            ({"clip_grad": 0.0}, "optim.clip_grad=0.0 must be positive; null is none"),
            ({"clip_grad": NAN}, "optim.clip_grad=nan must be positive"),
            ({"layer_decay": 0.0}, "optim.layer_decay=0.0 must be positive; null is none"),
            ({"layer_decay": -0.5}, "optim.layer_decay=-0.5"),
            ({"ema_warmup": True}, "optim.ema_warmup has no meaning without an average; set optim.ema_decay"),
        ],
        ids=repr,
    )
    def test_what_cannot_work_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            OptimOptions(**options).check()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"batch_size": 128, "accumulate": 128},
            {"ema_decay": 0.999, "ema_warmup": True},
            {"clip_grad": 1e-9, "layer_decay": 1.0, "awp_gamma": 0.005, "awp_start": 3.5},
            {"gamma": 0, "momentum": 0, "weight_decay": 0, "warmup": 0.99},
        ],
        ids=repr,
    )
    def test_what_can_work_passes(self, options):
        OptimOptions(**options).check()


class TestOptimBuild:
    @pytest.mark.parametrize("layer_decay", [None, 0.5])
    @pytest.mark.parametrize("decay_all", [True, False])
    def test_everything_is_decayed_or_matrices_alone(self, decay_all, layer_decay):
        """In both cases without what the model itself exempts, here the position embedding."""
        model = tiny_vit()
        options = OptimOptions(weight_decay=0.01, decay_all=decay_all, layer_decay=layer_decay)
        decays = {id(p): group["weight_decay"] for group in options.build(model).param_groups for p in group["params"]}
        expected = {
            name: 0.01 if name != "pos_embed" and (decay_all or parameter.ndim > 1) else 0.0
            for name, parameter in model.named_parameters()
        }
        assert {name: decays[id(parameter)] for name, parameter in model.named_parameters()} == expected
        assert set(expected.values()) == {0.0, 0.01}

    def test_momentum_is_that_of_the_recipe(self):
        for name, nesterov in (("momentum", False), ("sgd", True)):
            optimizer = OptimOptions(optimizer=name, momentum=0.8, lr=0.2).build(tiny_resnet())
            assert type(optimizer) is torch.optim.SGD
            assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.8, nesterov)
            assert optimizer.param_groups[0]["lr"] == 0.2
        assert OptimOptions(optimizer="adamw").build(tiny_resnet()).defaults["betas"] == (0.9, 0.999)

    def test_layer_decay_slows_each_layer_below_the_head_and_the_schedule_keeps_to_it(self):
        """Feature layers are new, as the head is: they learn at the full rate."""
        model = with_fsr(tiny_vit())
        options = OptimOptions(lr=0.1, layer_decay=0.5, epochs=4, schedule="cosine", warmup=0.25)
        optimizer = options.build(model)
        schedule = options.build_schedule(optimizer, 2)
        scales = {"patch_embed.": 0.125, "pos_embed": 0.125, "blocks.0.": 0.25, "blocks.1.": 0.5, "head.": 1, "fsr.": 1}
        for step, factor in ((0, 0.0), (1, 0.5), (2, 1.0), (5, 0.5), (2, 1.0)):
            schedule.step_update(step)
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            seen = set()
            for name, parameter in model.named_parameters():
                prefix = next((prefix for prefix in scales if name.startswith(prefix)), "head.")
                seen.add(prefix)
                assert rates[id(parameter)] == pytest.approx(0.1 * factor * scales[prefix], abs=1e-12), name
            assert seen == set(scales)


def rates(options: OptimOptions, steps_per_epoch: int, seed: int = 0) -> list[float]:
    """The learning rate of each step and of the one after the last, asked for in random order, some twice."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.lr)
    schedule = options.build_schedule(optimizer, steps_per_epoch)
    order = 2 * list(range(options.epochs * steps_per_epoch + 1))
    random.Random(seed).shuffle(order)
    found: dict[int, float] = {}
    for step in order:
        schedule.step_update(step)
        rate = optimizer.param_groups[0]["lr"]
        assert found.setdefault(step, rate) == rate, "a rate depends on what was asked before"
    return [found[step] for step in sorted(found)]


def staircase(edges: list[int], gamma: float) -> Callable[[int], float]:
    return lambda step: gamma ** sum(step >= edge for edge in edges)


def cosine(start: int, end: int) -> Callable[[int], float]:
    return lambda step: (1 + math.cos(math.pi * (step - start) / (end - start))) / 2


def line(start: int, end: int) -> Callable[[int], float]:
    return lambda step: (end - step) / (end - start)


class TestSchedule:
    """Runs of 10 epochs of 7 steps: 70 steps."""

    CASES: tuple[tuple[dict[str, Any], int, Callable[[int], float]], ...] = (
        ({"schedule": "constant"}, 0, lambda step: 1.0),
        ({"schedule": "constant", "warmup": 0.2}, 14, lambda step: 1.0),
        ({"schedule": "step", "milestones": [4, 8]}, 0, staircase([28, 56], 0.1)),
        ({"schedule": "step", "milestones": [8, 4], "gamma": 0.5}, 0, staircase([28, 56], 0.5)),
        ({"schedule": "step", "milestones": [4, 8], "warmup": 0.3}, 21, staircase([28, 56], 0.1)),
        ({"schedule": "step", "milestones": [0.5, 9.8]}, 0, staircase([4, 69], 0.1)),  # the nearest steps
        ({"schedule": "step", "milestones": []}, 0, lambda step: 1.0),
        ({"schedule": "cosine"}, 0, cosine(0, 70)),
        ({"schedule": "cosine", "warmup": 0.2}, 14, cosine(14, 70)),
        ({"schedule": "one_cycle"}, 0, line(0, 70)),
        ({"schedule": "one_cycle", "warmup": 0.4}, 28, line(28, 70)),
    )

    @pytest.mark.parametrize(
        ("options", "rising", "factor"), CASES, ids=lambda value: str(value) if isinstance(value, dict) else ""
    )
    def test_rates_are_those_by_formula(self, options, rising, factor):
        """Linearly up to the peak in the warm-up's steps, then as the schedule's name says."""
        expected = [0.3 * (step / rising if step < rising else factor(step)) for step in range(71)]
        assert rates(OptimOptions(lr=0.3, epochs=10, **options), 7) == pytest.approx(expected, abs=1e-12)

    def test_a_milestone_lowers_the_rate_at_the_first_step_of_its_epoch_and_no_earlier(self):
        """timm's own scheduler does so one step before, which its comments say it will go on doing."""
        found = rates(OptimOptions(lr=0.1, epochs=10, milestones=[4, 8]), 7)
        assert found[4 * 7 - 2 : 4 * 7 + 2] == pytest.approx([0.1, 0.1, 0.01, 0.01])
        assert found[8 * 7 - 2 : 8 * 7 + 2] == pytest.approx([0.01, 0.01, 0.001, 0.001])

    def test_one_cycle_is_a_triangle(self):
        found = rates(OptimOptions(lr=0.1, epochs=5, schedule="one_cycle", warmup=0.4), 10)
        differences = [after - before for before, after in pairwise(found)]
        assert differences[:20] == pytest.approx([0.1 / 20] * 20)
        assert differences[20:] == pytest.approx([-0.1 / 30] * 30)
        assert max(found) == found[20] == pytest.approx(0.1)

    def test_the_warm_up_begins_before_any_step_was_asked_for(self):
        """A step with the peak rate before the schedule is first consulted would undo the warm-up."""
        for schedule in ("step", "cosine", "one_cycle", "constant"):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            OptimOptions(schedule=schedule, warmup=0.1).build_schedule(optimizer, 10)
            assert optimizer.param_groups[0]["lr"] == 0

    @pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle", "constant"])
    def test_a_run_of_a_single_step_is_at_the_peak(self, schedule):
        assert rates(OptimOptions(lr=0.3, epochs=1, schedule=schedule), 1)[0] == pytest.approx(0.3)

    @pytest.mark.parametrize("schedule", ["step", "cosine", "one_cycle", "constant"])
    def test_a_resumed_optimizer_goes_on_as_if_never_stopped(self, schedule):
        """A schedule made anew on an optimizer whose rate was lowered already takes the peak from its state."""
        options = OptimOptions(lr=0.3, epochs=4, milestones=[1], schedule=schedule, warmup=0.25)
        expected = rates(options, 5)
        first = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        options.build_schedule(first, 5).step_update(15)
        second = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        second.load_state_dict(first.state_dict())
        schedule_again = options.build_schedule(second, 5)
        for step in (16, 3, 19):
            schedule_again.step_update(step)
            assert second.param_groups[0]["lr"] == pytest.approx(expected[step], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "key", "section"),
    [
        *((EvaluationOptions, key, "evaluation") for key in ("validation_steps", "validate_every", "patience")),
        *((CheckpointOptions, key, "checkpoint") for key in ("every_steps", "keep")),
    ],
)
def test_counts_below_1_are_refused(options, key, section):
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"{section}.{key}={value} must be at least 1"):
            options(**{key: value}).check()
    options(**{key: 1}).check()
    options().check()


@pytest.mark.parametrize(
    "options", [AttackOptions, ObjectiveOptions, OptimOptions, EvaluationOptions, CheckpointOptions]
)
def test_options_cannot_be_changed_after_they_were_checked(options):
    entry = dataclasses.fields(options)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options(), entry, None)
