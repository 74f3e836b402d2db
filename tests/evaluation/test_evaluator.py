"""Evaluation against outcomes counted by hand, and its refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from support.judged import Brightness, Fixed, grey, suite
from support.tiny import images, labels, tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr.evaluation.inference
from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation.evaluator import Standing, evaluate
from timm_fsr.evaluation.inference import _precision_switches
from timm_fsr.evaluation.registry import Suite
from timm_fsr.hooks.site import layer_groups
from timm_fsr.models.pixel import PixelModel

EPS = 0.1


@pytest.fixture
def model() -> nn.Module:
    return with_fsr(tiny_resnet())


@pytest.fixture
def fixed() -> dict[str, Fixed]:
    """Three attacks, of which each breaks other images."""
    return {name: Fixed(broken, []) for name, broken in {"a": [0], "b": [0, 1], "c": [2]}.items()}


@pytest.fixture
def suites(fixed) -> dict[str, Suite]:
    return {name: suite(name, (name, attack)) for name, attack in fixed.items()}


class TestCounting:
    LEVELS = grey(0.1, 0.45, 0.55, 0.9, 0.2)
    CLASSES = torch.tensor([0, 0, 1, 1, 1])  # the last one is wrong even without an attack

    def test_outcomes_are_those_counted_by_hand(self):
        """An attack moves the mean by eps: 0.45 and 0.55 cross the border, 0.1 and 0.9 do not."""
        report = evaluate(Brightness(), (self.LEVELS, self.CLASSES), eps=EPS, attacks=["fgsm", "pgd10"])
        hit = [True, False, False, True, False]
        assert {name: flags.tolist() for name, flags in report.correct.items()} == {
            "clean": [True, True, True, True, False],
            "fgsm": hit,
            "pgd10": hit,
        }
        assert report.accuracy == {"clean": 4 / 5, "fgsm": 2 / 5, "pgd10": 2 / 5}
        assert report.worst_case == 2 / 5
        assert all(flags.dtype == torch.bool for flags in report.correct.values())

    def test_l2_moves_the_mean_less(self):
        """By eps / 3 for 9 pixels: 0.45 crosses the border with eps 0.2 and not with 0.1."""
        for eps, right in ((0.1, 4 / 5), (0.2, 2 / 5)):
            report = evaluate(Brightness(), (self.LEVELS, self.CLASSES), norm="l2", eps=eps, attacks=["pgd10"])
            assert report.accuracy["pgd10"] == right

    def test_eps_0_is_clean_accuracy(self):
        report = evaluate(Brightness(), (self.LEVELS, self.CLASSES), eps=0, attacks=["fgsm", "pgd10"])
        assert set(report.accuracy.values()) == {4 / 5}

    def test_the_worst_case_is_the_intersection(self, suites):
        seen: list[Standing] = []
        pair = (self.LEVELS, self.CLASSES)
        report = evaluate(Brightness(), pair, eps=1, attacks=list(suites.values()), progress=seen.append)
        assert report.accuracy == {"clean": 4 / 5, "a": 3 / 5, "b": 2 / 5, "c": 3 / 5}
        assert report.worst_case == 1 / 5
        assert [now.stage for now in seen] == ["a: a", "b: b", "c: c", "c: c"]
        assert [(now.images, now.robust) for now in seen] == [(0, 0), (0, 0), (0, 0), (5, 1)]
        assert [now.bound for now in seen] == [3 / 5, 2 / 5, 1 / 5, 1 / 5]

    def test_batches_are_put_together_in_order(self, suites):
        seen: list[Standing] = []
        parts = list(zip(self.LEVELS.split(3), self.CLASSES.split(3), strict=True))
        report = evaluate(Brightness(), iter(parts), eps=1, attacks=[suites["a"]], progress=seen.append)
        # The first image of each batch is broken: the very first, and the fourth.
        assert report.correct["a"].tolist() == [False, True, True, False, False]
        assert [(now.images, now.robust) for now in seen] == [(0, 0), (3, 2), (3, 2), (5, 2)]
        assert report.labels.tolist() == self.CLASSES.tolist()

    def test_a_pair_of_tensors_is_cut_into_batches(self, monkeypatch):
        pair = (self.LEVELS, self.CLASSES)
        together = evaluate(Brightness(), pair, attacks=["fgsm"])
        as_batch = evaluate(Brightness(), [pair], attacks=["fgsm"])
        monkeypatch.setattr(timm_fsr.evaluation.inference, "BATCH_SIZE", 2)
        seen: list[int] = []
        cut = evaluate(Brightness(), pair, attacks=["fgsm"], progress=lambda now: seen.append(now.images))
        assert together.to_dict()["correct"] == as_batch.to_dict()["correct"] == cut.to_dict()["correct"]
        assert seen == [0, 2, 2, 4, 4, 5]

    def test_a_timm_model_gets_its_normalisation(self):
        model = timm.create_model("test_resnet", num_classes=10).eval()
        with torch.no_grad():
            classes = PixelModel(model)(images()).argmax(1)
        for given in (model, PixelModel(model)):
            assert evaluate(given, (images(), classes), attacks=[]).accuracy == {"clean": 1.0}

    def test_the_report_says_under_which_conditions(self):
        report = evaluate(
            Brightness(), (self.LEVELS, self.CLASSES), eps=EPS, attacks=["pgd10"], seed=4, name="tiny", data_name="five"
        )
        assert report.attacks == {"pgd10": repr(PGD(eps=EPS, steps=10))}
        assert (report.norm, report.eps, report.seed) == ("linf", EPS, 4)
        assert (report.conditions["model"], report.conditions["data"]) == ("tiny", "five")
        assert report.conditions["precision"] == "float32"
        assert set(report.conditions["versions"]) == {"timm_fsr", "timm", "torch"}


class TestSeeds:
    def test_the_same_seed_gives_the_same_report(self, model):
        reports = [evaluate(model, (images(8), labels(8)), attacks=["pgd3"], seed=1).to_dict() for _ in range(2)]
        assert reports[0] == reports[1]

    def test_a_start_depends_on_seed_attack_and_batch_alone(self, fixed, suites):
        pair = (TestCounting.LEVELS, TestCounting.CLASSES)

        def seeds(attacks: list[str], seed: int = 0) -> list[int]:
            fixed["a"].seeds.clear()
            torch.manual_seed(torch.seed() % 1000)
            evaluate(Brightness(), [pair, pair], eps=1, attacks=[suites[name] for name in attacks], seed=seed)
            return list(fixed["a"].seeds)

        alone = seeds(["a"])
        assert seeds(["b", "c", "a"]) == alone
        assert len({*alone, *seeds(["a"], seed=1), *fixed["b"].seeds}) == 6

    def test_no_attack_is_said(self, model):
        report = evaluate(model, (images(), labels()), attacks=[])
        assert "no attack was run: the worst case is nothing but the clean accuracy" in report.notes

    def test_the_default_generator_is_left_alone(self, model):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        evaluate(model, (images(), labels()), attacks=["pgd3"])
        assert torch.equal(torch.get_rng_state(), state)


class TestManners:
    @pytest.mark.parametrize("attacks", [["pgd3"], ["unknown"]], ids=["done", "refused"])
    def test_modes_and_flags_are_restored(self, model, attacks):
        model.train()
        model.bn1.eval()
        model.conv1.weight.requires_grad_(False)
        modes, flags = self.state(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            evaluate(model, (images(), labels()), attacks=attacks)
        except ValueError:
            assert attacks == ["unknown"]
        assert self.state(model) == (modes, flags)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_also_when_a_batch_is_refused(self, model):
        model.train()
        before = self.state(model)
        with pytest.raises(ValueError, match="labels run"):
            evaluate(model, (images(), labels() + 100))
        assert self.state(model) == before

    @staticmethod
    def state(model: nn.Module) -> tuple[list[bool], list[bool]]:
        return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_images_of_another_precision_are_taken_in_float32(self, model, dtype):
        given = images().to(dtype)
        found, expected = (evaluate(model, (x, labels()), attacks=["pgd2"]) for x in (given, given.float()))
        assert found.to_dict() == expected.to_dict()

    def test_the_callers_contexts_change_nothing(self, model):
        """Neither no_grad nor autocast: half precision would hide weak spots."""
        seen: list[torch.dtype] = []
        model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        plain = evaluate(model, (images(), labels()), attacks=["pgd3"])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            inside = evaluate(model, (images(), labels()), attacks=["pgd3"])
        assert inside.to_dict() == plain.to_dict()
        assert set(seen) == {torch.float32}

    def test_tf32_is_off_inside(self, model):
        """And restored: see test_inference.py."""
        seen: list[object] = []
        model.conv1.register_forward_hook(
            lambda *_: seen.append([getattr(holder, name) for holder, name, _ in _precision_switches()])
        )
        evaluate(model, (images(), labels()), attacks=[])
        exact = [value for _, _, value in _precision_switches()]
        assert seen
        assert all(found == exact for found in seen)


class Wrong(nn.Module):
    """A model that returns whatever it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, given: Tensor) -> Any:
        return self.answer


class SquareRoot(nn.Module):
    """Finite everywhere, with a slope of NaN at bright images, as a hand-made normalisation may have."""

    def forward(self, given: Tensor) -> Tensor:
        level = given.mean(dim=(1, 2, 3))
        root = torch.where(level > 0.7, 0 * level, torch.ones_like(level)).sqrt() - 1
        return torch.stack([0.8 - level + root, level - 0.8 + root], dim=1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ((torch.zeros(4, 10), None), "returned type tuple for 4 images; it must return logits"),
            (torch.zeros(4), r"returned shape \(4,\)"),
            (torch.zeros(2, 10), r"returned shape \(2, 10\) for 4"),
            (torch.zeros(4, 10, 1, 1), r"returned shape \(4, 10, 1, 1\)"),
            (torch.full((4, 10), float("nan")), "NaN or infinite logits for clean images; check its weights"),
            (torch.full((4, 10), float("inf")), "NaN or infinite logits"),
            (torch.full((4, 10), 0.1), "returned probabilities"),
            (torch.zeros(4, 1), "nothing to confuse"),
            (torch.zeros(4, 2), r"labels run from 0 to 3, but the model has 2 classes .*num_classes=4"),
        ],
    )
    def test_models_that_give_no_logits(self, answer, message):
        with pytest.raises(ValueError, match=message):
            evaluate(Wrong(answer), (images(), labels()), attacks=[])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ((images() * 2, labels()), r"must lie in \[0, 1\]"),
            (((images() * 255).byte(), labels()), r"images.float\(\) / 255"),
            ((images(), labels().float()), "int64"),
            ((images(), labels() - 1), "use labels of 0 or more"),
            ((images(), labels(3)), "4 images have 3 labels"),
            ((images()[:0], labels()[:0]), "is empty|no image to evaluate"),
            ([], "no image to evaluate on; check the data's split"),
            ([(images(), labels(3))], r"shape \(4,\)"),
            ((images().double() * 2, labels()), r"must lie in \[0, 1\]"),
            (images(), "pairs of tensors"),
            ((images().numpy(), labels().numpy()), "pairs of tensors"),
            ([images()], "pairs of tensors"),
            ((images()[:, :1], labels()), "images have 1 channels but the model takes 3"),
        ],
    )
    def test_data_that_does_not_fit(self, model, data, message):
        with pytest.raises(ValueError, match=message):
            evaluate(model, data)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"eps": -1 / 255}, "must be 0 or more"),
            ({"norm": "l1"}, "'fgsm' has no L1 ball; use AutoAttack"),
            ({"norm": "l3"}, "norm='l3' is unknown"),
            ({"attacks": ["transfer"]}, "needs other models to transfer from"),
            ({"save_images": True}, "save_images needs a folder"),
            ({"attacks": ["pdg20"]}, "unknown attack 'pdg20'; did you mean 'pgd20'"),
            ({"attacks": ["pgd0"]}, "unknown attack 'pgd0'"),
            ({"attacks": ["clean"]}, "unknown attack 'clean'"),
            ({"attacks": "pgd20"}, r"attacks='pgd20'.*\['pgd20'\]"),
        ],
    )
    def test_arguments_before_anything_is_read(self, model, arguments, message):
        def data() -> Iterator[tuple[Tensor, Tensor]]:
            pytest.fail("the data was read")
            yield images(), labels()

        with pytest.raises(ValueError, match=message):
            evaluate(model, data(), **arguments)

    def test_an_fsr_layer_that_does_not_fire(self, model):
        path = layer_groups(model)[0].sites[0].path
        model.get_submodule(path)._forward_hooks.clear()  # as when a conversion replaces the module
        with pytest.raises(RuntimeError, match=r"was left out of the forward pass.*reattach"):
            evaluate(model, (images(), labels()))

    @pytest.mark.parametrize("attack", ["pgd3", "apgd5", "apgd-ce", "fab-t"])
    def test_gradients_that_are_no_numbers(self, attack):
        """They move nothing, so such images would count as robust; the first batch does not show them."""
        batches = [(grey(0.2, 0.3), torch.tensor([0, 0])), (grey(0.72), torch.tensor([0]))]
        with pytest.raises(ValueError, match=r"gave NaN or infinite pixels|met a gradient of NaN or infinity"):
            evaluate(SquareRoot(), batches, attacks=[attack])
        with pytest.raises(ValueError, match="NaN or infinite for 1 of 1 images, so attacks cannot follow it"):
            evaluate(SquareRoot(), batches[1:], attacks=[attack])

    def test_half_precision_and_models_that_stay_in_training_mode(self, model):
        with pytest.raises(ValueError, match=r"call model\.float\(\) first"):
            evaluate(model.half(), (images(), labels()))

    def test_an_attack_that_leaves_the_ball(self, suites):
        with pytest.raises(RuntimeError, match=r"'a' left \[0, 1\] or the linf ball of radius 0.1 \(reached 0.8"):
            evaluate(Brightness(), (grey(0.1, 0.9), torch.tensor([0, 1])), eps=0.1, attacks=[suites["a"]])


@pytest.mark.parametrize("constant", [True, False])
def test_a_model_that_answers_one_class_is_named(constant):
    """No attack changes its answer, so that its few right answers look robust."""

    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean(dim=(1, 2, 3)) * self.weight
            return torch.stack([0 * means + (9.0 if constant else 0.5), means], dim=1)

    labels = torch.arange(120) % 2
    pictures = (0.2 + 0.6 * labels.float())[:, None, None, None].expand(120, 3, 4, 4)
    report = timm_fsr.evaluate(Means(), (pictures, labels), attacks=["fgsm"], eps=8 / 255)
    assert report.accuracy == ({"clean": 0.5, "fgsm": 0.5} if constant else {"clean": 1.0, "fgsm": 1.0})
    assert any(note.startswith("the model does not work: it answers the class 0") for note in report.notes) == constant
    assert bool(report.collapsed) == constant
