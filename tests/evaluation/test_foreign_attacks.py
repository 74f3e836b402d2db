"""Functions of (model, images, labels) as attacks of an evaluation: what is taken, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import images, labels, tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.evaluation.foreign_attacks import described

EPS = 0.1
Attack = Callable[[nn.Module, Tensor, Tensor], Any]


def evaluated(*attacks: Any, eps: float = EPS, **options: Any) -> timm_fsr.Report:
    model = with_fsr(tiny_resnet()).eval()
    with torch.no_grad():
        right = model(images(6)).argmax(dim=1)
    return timm_fsr.evaluate(model, (images(6), right), eps=eps, attacks=attacks, **options)


def brighter(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
    return (given + EPS).clamp(0, 1)


class TestTaken:
    def test_a_function_by_its_name_and_a_suite_by_any(self):
        suite = timm_fsr.Suite.from_callable("my-pgd", brighter, detail="brighter by 0.1", note="a note")
        report = evaluated("fgsm", brighter, suite)
        assert list(report.correct) == ["clean", "fgsm", "brighter", "my-pgd"]
        assert torch.equal(report.correct["brighter"], report.correct["my-pgd"])
        assert report.attacks["my-pgd"] == "brighter by 0.1"
        assert report.attacks["brighter"].startswith(f"{__name__}.brighter (code ")
        assert "a note" in report.notes

    def test_it_is_what_our_own_attack_finds(self):
        own = timm_fsr.PGD(eps=EPS, steps=3, random_start=False)
        report = evaluated(timm_fsr.Suite.from_callable("same", lambda model, x, y: own.attack(model, x, y)), "pgd3")
        assert report.accuracy["same"] < 1

    def test_numpy_and_rounding_outside_of_the_pixels(self):
        def arrays(model: nn.Module, given: Tensor, classes: Tensor) -> Any:
            return given.numpy() * (1 + 1e-7) - 5e-8

        assert evaluated(arrays).accuracy["arrays"] == 1

    def test_the_model_is_frozen_in_eval_mode_and_stays_so(self):
        def wakes(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model.train()
            return given

        assert evaluated(wakes).accuracy["wakes"] == 1

    def test_random_numbers_of_numpy_and_python_are_repeated_and_given_back(self):
        drawn = []

        def draws(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
            drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
            return given

        np.random.seed(3)
        random.seed(3)
        expected = np.random.RandomState(3).rand(), random.Random(3).random()
        evaluated(draws)
        evaluated(draws)
        assert drawn[0] == drawn[1]
        assert (np.random.rand(), random.random()) == expected

    def test_what_a_folder_knows_is_not_attacked_again_unless_it_is_another(self, tmp_path):
        calls = []

        def make(shift: float) -> Attack:
            def mine(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
                calls.append(shift)
                return (given + shift).clamp(0, 1)

            return mine

        for shift in (0.05, 0.05, 0.1):
            evaluated(make(shift), folder=tmp_path / "results")
        assert calls.count(0.1) == 1
        assert calls.count(0.05) == 2, "the list of calls that it uses has changed"


class TestDescribed:
    def test_the_same_code_and_values(self):
        def make(shift: float) -> Attack:
            return lambda model, x, y: x + shift

        assert described(make(0.1)) == described(make(0.1))
        assert described(make(0.1)) != described(make(0.2))
        assert described(lambda model, x, y: x) != described(lambda model, x, y: x + 1)

    def test_no_address_is_part_of_it(self):
        def make() -> Attack:
            thing = object()
            return lambda model, x, y: x if thing else y

        assert described(make()) == described(make())


class TestRefused:
    def test_the_ball_with_the_distance(self):
        with pytest.raises(timm_fsr.UnsoundError, match=r"'brighter' left .* ball of radius 0\.05 \(reached 0\.1"):
            evaluated(brighter, eps=0.05)

    def test_the_pixels_with_their_range(self):
        def dark(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
            return given - 0.05

        with pytest.raises(timm_fsr.UnsoundError, match=r"reached 0\.05, pixels in \[-0\.04"):
            evaluated(dark)

    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (
                lambda x: (x, x, None),
                "returned tuple; return the attacked images alone, .*; of foolbox's three",
            ),
            (lambda x: None, "returned NoneType; return the attacked images alone"),
            (lambda x: x[:1], r"returned images of shape \(1, 3, 32, 32\) for such of \(6, 3, 32, 32\)"),
            (lambda x: x * float("nan"), "gave NaN or infinite pixels"),
        ],
    )
    def test_what_is_no_batch_of_images(self, result, text):
        with pytest.raises(ValueError, match=text):
            evaluated(timm_fsr.Suite.from_callable("bad", lambda model, x, y: result(x)))

    def test_a_changed_model(self):
        def spoils(model: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
            model.model.fc.bias.add_(1)
            return given

        with pytest.raises(timm_fsr.UnsoundError, match="'spoils' changed the model's weights or statistics"):
            evaluated(spoils)

    @pytest.mark.parametrize("name", ["autoattack", "standard", "pgd20", "pgd7x2", "clean", "worst_case", "fmn"])
    def test_names_of_ours(self, name):
        with pytest.raises(ValueError, match=f"'{name}' means something else in a report; choose .* 'my-{name}'"):
            timm_fsr.Suite.from_callable(name, brighter)

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "<b>"])
    def test_names_that_are_none(self, name):
        with pytest.raises(ValueError, match="cannot name an attack; use letters, digits"):
            timm_fsr.Suite.from_callable(name, brighter)

    @pytest.mark.parametrize(
        ("attack", "text"),
        [
            (lambda model, x, y: x, r"has no name to be reported by; give timm_fsr\.Suite\.from_callable"),
            (timm_fsr.PGD(), "has no name to be reported by"),
            (3, "has no name to be reported by"),
        ],
    )
    def test_attacks_without_a_name(self, attack, text):
        with pytest.raises(ValueError, match=text):
            evaluated(attack)

    def test_attacks_that_take_something_else(self):
        with pytest.raises(ValueError, match=r"'two' does not take \(model, images, labels\): too many .*lambda model"):
            timm_fsr.Suite.from_callable("two", lambda x, y: x)
        with pytest.raises(ValueError, match="'none' is int; give a function, such as lambda model"):
            timm_fsr.Suite.from_callable("none", 3)

    def test_two_of_one_name(self, tmp_path: Path):
        one, two = (timm_fsr.Suite.from_callable("mine", brighter, detail=text) for text in ("one", "two"))
        assert evaluated(one, one).attacks == {"mine": "one"}
        with pytest.raises(ValueError, match="two different attacks are called 'mine'"):
            evaluated(one, two, folder=tmp_path / "results")
        assert not (tmp_path / "results").exists()

    def test_a_string_in_the_place_of_a_list(self):
        with pytest.raises(ValueError, match=r"attacks='fgsm' is one name where a list belongs; use \['fgsm'\]"):
            timm_fsr.evaluate(tiny_resnet(), (images(), labels()), attacks="fgsm")
