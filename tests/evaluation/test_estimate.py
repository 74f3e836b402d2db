"""`evaluate --dry-run`: what attacks will take, from timed passes and the number of passes that each may need."""

from __future__ import annotations

import pytest
import torch
from support.judged import Brightness, Fixed, grey, suite
from support.tiny import tiny_resnet, with_fsr

import timm_fsr.evaluation.estimate
from timm_fsr.attacks.base import attack_mode
from timm_fsr.cli.main import main
from timm_fsr.data.dataset import load_data
from timm_fsr.evaluation.estimate import (
    AttackEstimate,
    Passes,
    _estimates,
    estimate_attacks,
    estimate_evidence,
    size,
    time_passes,
    together,
)
from timm_fsr.evaluation.registry import Cost, Stage, Suite
from timm_fsr.models.saving import save_pretrained

PASSES = Passes(forward=1.0, gradient=2.0, clean=0.5, robust=0.25, images=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_fsr.evaluation.estimate, "SECONDS", 0.0)


def stage(name: str, cost: Cost | None, *, reuse: bool = False) -> Stage:
    return Stage(name, "detail", lambda m, x, y, g: x, reuse=reuse, cost=cost)


class TestArithmetic:
    def test_an_attack_on_every_image_takes_what_it_takes(self):
        (found,) = _estimates([Suite("a", (stage("a", Cost(10)),), every_image=True)], PASSES, 100, trained=True)
        assert (found.likely, found.most) == (2100, 2100), "ten gradients and a last look at each of 100 images"
        assert str(found) == "35 min 00 s"

    def test_survivors_decide_on_later_stages(self):
        stages = (stage("a", Cost(10)), stage("b", Cost(0, 99)))
        (found,) = _estimates([Suite("s", stages)], PASSES, 100, trained=True)
        assert found.most == 100 * 21 + 100 * 100
        assert found.likely == 0.5 * 100 * 21 + 0.25 * 100 * 100

    def test_of_a_model_that_is_still_to_be_trained_only_the_most_is_known(self):
        (found,) = _estimates([Suite("s", (stage("a", Cost(10)),))], PASSES, 100, trained=False)
        assert (found.likely, found.most) == (None, 2100)
        assert str(found) == "at most 35 min 00 s"

    def test_what_is_taken_over_from_a_suite_before_costs_nothing(self):
        square = stage("square", Cost(0, 99))
        again = stage("square", Cost(0, 99), reuse=True)
        _, second = _estimates([Suite("one", (square,)), Suite("two", (again,))], PASSES, 100, trained=True)
        assert second.most == 0

    def test_an_attack_of_unknown_cost_is_said_to_be_so(self):
        found = _estimates([suite("mine", ("a", Fixed([], [])))], PASSES, 100, trained=True)
        assert str(found[0]).startswith("unknown")
        assert together([*found, AttackEstimate("b", 1.0, 1.0)]).most is None

    def test_the_evidence_depends_on_the_images_that_are_right(self):
        found = estimate_evidence(PASSES, 10)
        assert found.likely == 0.5 * (found.most or 0)
        assert found.most == 2.0 * 10 * (450 + 1160 + 320 + 30 + 2700 + 200 + 5 + 20 + 2 + 20)


class TestTimes:
    def test_shares_are_those_of_the_timed_images(self):
        levels, classes = grey(0.1, 0.49, 0.9, 0.9), torch.tensor([0, 0, 1, 0])
        with attack_mode(model := Brightness()):
            found = time_passes(model, levels, classes, norm="linf", eps=0.1)
        assert (found.clean, found.robust, found.images) == (0.75, 0.5, 4)
        assert found.forward > 0
        assert found.gradient > 0

    def test_each_attack_by_name(self):
        model = with_fsr(tiny_resnet(in_chans=1))
        data = load_data("fashion_mnist", "test", limit=12, progress=False)
        _, found = estimate_attacks(model, data, norm="linf", eps=0.1, attacks=["fgsm", "pgd20"], batch_size=6)
        assert [one.name for one in found] == ["fgsm", "pgd20"]
        assert 5 < found[1].most / found[0].most < 20


class TestCommand:
    def test_it_prints_a_time_for_each_attack_and_writes_nothing(self, tmp_path, capsys):
        pytest.importorskip("pyautoattack")
        saved = save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "model")
        before = sorted(tmp_path.rglob("*"))
        flags = ["--limit", "6", "--attacks", "pgd20", "standard", "adaptive", "--evidence", "2", "--eps", "0.1"]
        assert main(["evaluate", str(saved), *flags, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for text in ("forward and back", "pgd20", "autoattack", "adaptive", "gradient masking checks", "together"):
            assert text in printed
        assert "peak memory" in printed
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1234, "1.23 kB"), (5.6e6, "5.6 MB"), (7.8e10, "78 GB")])
def test_sizes_in_words(count, text):
    assert size(count) == text
