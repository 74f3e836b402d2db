"""What an evaluation shows of itself: what runs, how much is done, the running bound, and what attacks may cost."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from support.judged import Brightness, Fixed, grey, suite
from torch import Tensor, nn

import timm_fsr.evaluation.benchmark
import timm_fsr.evaluation.evaluator
from timm_fsr.attacks.autoattack import Component
from timm_fsr.evaluation.benchmark import CORRUPTIONS, Cache, _corruptions
from timm_fsr.evaluation.display import describe, evaluation_display
from timm_fsr.evaluation.evaluator import Standing, evaluate
from timm_fsr.evaluation.gradient_masking import gather_evidence
from timm_fsr.evaluation.model_checks import examine
from timm_fsr.evaluation.registry import Target, build_suites

LEVELS, CLASSES = grey(0.2, 0.4, 0.6, 0.8, 0.1, 0.9), torch.tensor([0, 0, 1, 1, 0, 1])


class Unbreakable(nn.Module):
    """Four classes, of which the first always wins, by next to nothing; counts the images that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = self.forwards = 0

    def forward(self, given: Tensor) -> Tensor:
        if torch.is_grad_enabled() and given.requires_grad:
            self.gradients += len(given)
        else:
            self.forwards += len(given)
        means = given.flatten(1)[:, :4].sigmoid()
        return 0.01 * means + torch.tensor([1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["fgsm", "pgd3x2", "apgd10", "cw3", "apgd-ce", "apgd-t", "fab-t", "adaptive"])
def test_no_attack_costs_more_than_it_says_and_none_much_less(name):
    """On images that it cannot break, where nothing ends early."""
    if name in ("apgd-ce", "apgd-t", "fab-t", "adaptive"):
        pytest.importorskip("pyautoattack")
    model, images, labels = Unbreakable().eval(), torch.rand(2, 1, 8, 8), torch.tensor([0, 0])
    check = examine(model, images, labels)
    stages = build_suites([name], Target(model, "linf", 0.01, 0, check))[0].stages
    for stage in (stage for stage in stages if stage.name != "square"):
        model.gradients = model.forwards = 0
        stage.run(model, images, labels, torch.Generator().manual_seed(0))
        assert stage.cost is not None
        passes = (2 * model.gradients + model.forwards) / len(images)
        assert 0.8 * stage.cost.passes <= passes <= stage.cost.passes + 3, stage.name


def test_square_costs_its_queries():
    pytest.importorskip("pyautoattack")
    model = Unbreakable().eval()
    check = examine(model, torch.rand(1, 1, 8, 8), torch.tensor([0]))
    (stage,) = build_suites(["square"], Target(model, "linf", 0.1, 0, check))[0].stages
    reference = Component("square", "linf", 0.1, 0)._build(model, torch.device("cpu"), 4)
    assert stage.cost is not None
    assert stage.cost.passes == reference.n_queries


class TestStanding:
    def seen(self, *attacks: object, folder: object = None) -> list[Standing]:
        seen: list[Standing] = []
        evaluate(
            Brightness(), (LEVELS, CLASSES), attacks=attacks, progress=seen.append, batch_size=3, folder=folder, eps=1
        )
        return seen

    def suites(self) -> list[object]:
        one, two = suite("one", ("one", Fixed([0], []))), suite("two", ("a", Fixed([1], [])), ("b", Fixed([], [])))
        return [one, two]

    def test_it_says_what_comes_next_and_how_much_of_the_batch_is_done(self):
        seen = self.seen(*self.suites())
        assert [now.next for now in seen[:4]] == ["two: a (2 of 3)", "two: b (3 of 3)", "", "one (1 of 3)"]
        shares = [now.share for now in seen[:4]]
        assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
        assert shares[3] == 0, "the next batch"

    def test_it_has_the_accuracies_of_the_finished_images(self):
        seen = self.seen(*self.suites())
        assert seen[0].accuracies == {}
        assert seen[-1].accuracies == pytest.approx({"clean": 1.0, "one": 4 / 6, "two": 4 / 6})

    def test_what_is_known_from_before_does_not_count_as_work(self, tmp_path):
        assert all(now.fresh for now in self.seen("pgd2", folder=tmp_path))
        assert not any(now.fresh for now in self.seen("pgd2", folder=tmp_path))
        more = self.seen("pgd2", "pgd3", folder=tmp_path)
        assert [now.fresh for now in more] == [False, True, True] * 2

    def test_an_attack_that_runs_long_tells_of_itself(self, monkeypatch):
        monkeypatch.setattr(timm_fsr.evaluation.evaluator, "_TICK", 0.0)
        seen = self.seen("pgd20")
        shares = [now.share for now in seen if now.images == 0]
        assert len(shares) > 20
        assert shares == sorted(shares)
        assert shares[10] == pytest.approx(0.5, abs=0.1)
        assert not Brightness()._forward_pre_hooks

    def test_telling_changes_no_outcome(self, monkeypatch):
        monkeypatch.setattr(timm_fsr.evaluation.evaluator, "_TICK", 0.0)
        model = Brightness()
        told = evaluate(model, (LEVELS, CLASSES), attacks=["pgd5"], eps=0.15, progress=lambda now: None)
        silent = evaluate(model, (LEVELS, CLASSES), attacks=["pgd5"], eps=0.15)
        assert told.to_dict()["correct"] == silent.to_dict()["correct"]
        assert not model._forward_pre_hooks


class TestDisplay:
    def test_it_says_the_bound_first(self):
        now = Standing(100, 40, "pgd20: pgd20", 50, 5, next="autoattack: square (3 of 5)", accuracies={"clean": 0.9})
        assert describe(now) == "at most 30.0 % robust; now autoattack: square (3 of 5)\nclean 90.0 %"

    @pytest.mark.parametrize("last", [0, 1, 2])
    def test_bars_for_attacks_and_for_each_later_part(self, last):
        file = io.StringIO()
        texts = [
            ("images attacked", "75/200", "at most 30.0 % robust"),
            ("gradient masking checks", "25 %", "random noise"),
            ("common corruptions", "50 %", "fog"),
        ]
        with evaluation_display(Console(file=file, force_terminal=True, width=80), 200) as display:
            display.attacked(Standing(50, 20, "", 50, 10, share=0.5, next="pgd20 (2 of 2)"))
            if last > 0:
                display.part("gradient masking checks: random noise", 0.25)
            if last > 1:
                display.part("common corruptions: fog", 0.5)
        for text in texts[last]:
            assert text in file.getvalue()


class TestParts:
    def test_evidence_says_in_words_what_it_does_and_how_much_is_done(self):
        pytest.importorskip("pyautoattack")
        told: list[tuple[str, float]] = []
        model = Brightness().eval()
        gather_evidence(
            model,
            LEVELS,
            CLASSES,
            eps=1,
            steps=(1, 2),
            restarts=(1, 2),
            advance=lambda words, share: told.append((words, share)),
        )
        shares = [share for _, share in told]
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert shares[-1] <= 1
        assert len({words for words, _ in told}) == 10
        assert told[1][0] == "PGD-50 at growing eps"

    def test_corruptions_name_their_kind(self, tmp_path, monkeypatch):
        def accuracy(model: nn.Module, batches: Any, *, names: list[str], seed: int, progress: Any) -> Any:
            for done, _ in enumerate(batches, 1):
                progress(done, 0)
            return {names[0]: {1: 0.5}}

        monkeypatch.setattr(timm_fsr.evaluation.benchmark, "corruption_accuracy", accuracy)
        told: list[tuple[str, float]] = []
        cache = Cache(tmp_path / "cache.json", {})
        _corruptions(Brightness(), (LEVELS, CLASSES), 0, 3, cache, lambda words, share: told.append((words, share)))
        assert told[0] == ("common corruptions: gaussian noise", 0)
        assert told[1] == ("common corruptions: gaussian noise", 1 / 6 / len(CORRUPTIONS))
        assert told[-1][0] == "common corruptions: jpeg compression"
        assert len(told) == 3 * len(CORRUPTIONS)
