"""Suites of several stages: what each of them is given, and what it takes over from another suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.judged import Brightness, Fixed, grey, suite
from torch import Tensor, nn

from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.registry import Stage, Suite


class Nudge:
    """An attack that moves every image without breaking one, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, model: nn.Module, given: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        self.given.append(given.clone())
        return given + 0.04


class TestChains:
    PAIR = (grey(0.1, 0.2, 0.8, 0.9, 0.3), torch.tensor([0, 0, 1, 1, 1]))  # the last is wrong clean

    def test_each_stage_attacks_what_those_before_it_left(self):
        stages = [("first", Fixed([1], [])), ("second", Fixed([1], [])), ("third", Fixed([0, 1], []))]
        report = evaluate(Brightness(), self.PAIR, eps=1, attacks=[suite("chain", *stages, every_image=False)])
        found = {name: flags.tolist() for name, flags in report.stages["chain"].items()}
        assert found == {
            "first": [True, False, True, True, False],
            "second": [True, False, False, True, False],  # the second of those left is the third image
            "third": [False, False, False, False, False],
        }
        assert report.accuracy == {"clean": 4 / 5, "chain": 0}

    @pytest.mark.parametrize("kept", [False, True])
    def test_each_stage_begins_at_the_original_images(self, tmp_path, kept):
        """Were it where the stage before has moved them to, images could leave the ball unnoticed, step by step."""
        first, second, third = Nudge(), Fixed([1], []), Nudge()
        runs = {"first": first, "second": second, "third": third}
        chain = Suite("chain", tuple(Stage(name, name, run) for name, run in runs.items()))
        images, _ = self.PAIR
        options = {"folder": tmp_path, "save_images": True} if kept else {}
        report = evaluate(Brightness(), self.PAIR, eps=1, attacks=[chain], **options)
        assert report.correct["chain"].tolist() == [True, False, True, True, False]
        assert [one.flatten(1).mean(1).tolist() for one in first.given] == [pytest.approx([0.1, 0.2, 0.8, 0.9])]
        assert torch.equal(*first.given, images[:4])
        assert torch.equal(*third.given, images[[0, 2, 3]])

    def test_a_stage_with_nothing_left_is_not_run(self):
        last = Fixed([], [])
        stages = [("first", Fixed([0, 1, 2, 3], [])), ("last", last)]
        evaluate(Brightness(), self.PAIR, eps=1, attacks=[suite("chain", *stages, every_image=False)])
        assert len(last.seeds) == 0

    def test_what_square_broke_beyond_gradients_is_said(self):
        stages = [("apgd-ce", Fixed([0], [])), ("square", Fixed([0], []))]
        report = evaluate(Brightness(), self.PAIR, eps=1, attacks=[suite("mine", *stages, every_image=False)])
        assert report.notes[-1] == (
            "in 'mine', Square broke 1 of 5 images (20.0 %) that the attacks before it missed: suspect masked gradients"
        )


class TestReuse:
    """A stage that may take over what the same attack did in a suite before its own."""

    PAIR = TestChains.PAIR

    def both(self, *, first_name: str = "square", **options: Any) -> tuple[Any, Fixed]:
        """The report of two suites that end in the same attack, and what the second one ran itself."""
        own = Fixed([], [])  # breaks nothing, so that what breaks has been taken over
        suites = [
            suite("one", ("other", Fixed([0], [])), (first_name, Fixed([1], [])), every_image=False),
            Suite("two", (Stage("square", "Fixed([1])", own, reuse=True),)),
        ]
        return evaluate(Brightness(), self.PAIR, eps=1, attacks=suites, **options), own

    def test_outcomes_are_taken_over_and_only_the_rest_is_attacked(self):
        report, own = self.both()
        # In "one" the first image is broken by "other", so that "square" never saw it and breaks the third.
        assert report.correct["one"].tolist() == [False, True, False, True, False]
        assert report.correct["two"].tolist() == [True, True, False, True, False]
        assert len(own.seeds) == 1

    @pytest.mark.parametrize("every_image", [True, False])
    def test_nothing_is_run_where_all_is_known(self, every_image):
        suites = [
            suite("one", ("square", Fixed([1], [])), every_image=every_image),
            Suite("two", (Stage("square", "Fixed([1])", own := Fixed([], []), reuse=True),)),
        ]
        report = evaluate(Brightness(), self.PAIR, eps=1, attacks=suites)
        assert report.correct["one"].tolist() == [True, False, True, True, False]
        assert report.correct["two"].tolist() == report.correct["one"].tolist()
        assert own.seeds == []

    def test_not_from_another_attack(self):
        report, own = self.both(first_name="cube")
        assert report.correct["two"].tolist() == [True, True, True, True, False]
        assert len(own.seeds) == 1

    def test_not_from_a_later_suite(self):
        suites = [
            Suite("two", (Stage("square", "Fixed([1])", own := Fixed([], []), reuse=True),)),
            suite("one", ("square", Fixed([1], [])), every_image=False),
        ]
        report = evaluate(Brightness(), self.PAIR, eps=1, attacks=suites)
        assert report.correct["two"].tolist() == report.correct["clean"].tolist()
        assert len(own.seeds) == 1

    def test_an_evaluation_that_was_killed_in_between_goes_on_the_same(self, tmp_path):
        class Killed(Fixed):
            def __call__(self, *args: Any) -> Tensor:
                raise KeyboardInterrupt

        def run(own: Fixed, folder: Path) -> dict[str, Any]:
            suites = [
                suite("one", ("other", Fixed([0], [])), ("square", Fixed([1], [])), every_image=False),
                Suite(
                    "two",
                    (Stage("first", "Fixed([3])", Fixed([3], [])), Stage("square", "Fixed([1])", own, reuse=True)),
                ),
            ]
            return evaluate(Brightness(), self.PAIR, eps=1, attacks=suites, folder=folder).to_dict()["stages"]

        expected = run(Fixed([], []), tmp_path / "whole")
        assert expected["two"]["square"] == "11000"
        with pytest.raises(KeyboardInterrupt):
            run(Killed([], []), tmp_path / "killed")
        assert run(Fixed([], []), tmp_path / "killed") == expected
        assert run(Killed([], []), tmp_path / "killed") == expected  # all is known

    def test_not_where_the_attacked_images_are_kept(self, tmp_path):
        report, _ = self.both(folder=tmp_path, save_images=True)
        assert report.correct["two"].tolist() == [True, True, True, True, False]
