"""Each adaptive attack breaks a defence, planted for it, that PGD-20 calls robust in the same ball."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import tiny_resnet, traces, with_fsr
from support.toys import (
    DEFENCES,
    DIRECT,
    EPS,
    JOINT,
    MASKS,
    Toy,
    brightness,
    by_the_mask,
    channel,
    data,
    decide,
    grey,
    honest,
    misled_mask,
    noisy_gradient,
    plain_toy,
    planes,
    rounded_head,
    steps,
    toy_layers_registered,
    watched,
    wrapped,
)
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.base import attack_mode, input_gradient
from timm_fsr.attacks.losses import margin
from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.model_checks import examine
from timm_fsr.evaluation.registry import Stage
from timm_fsr.evaluation.suites import adaptive
from timm_fsr.evaluation.suites.adaptive import adaptive_stages, mean_gradient
from timm_fsr.hooks.site import layer_groups
from timm_fsr.hooks.surrogates import feature_layers, noisy, plain

pytest.importorskip("pyautoattack")  # Square's implementation


@pytest.fixture(autouse=True)
def toy_layers() -> Iterator[None]:
    with toy_layers_registered():
        yield


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "STEPS", 30)


def stages_of(model: nn.Module, images: Tensor, labels: Tensor, norm: str = "linf", **kwargs: Any) -> dict[str, Stage]:
    found = adaptive_stages(model, norm=norm, eps=EPS, seed=0, model_check=examine(model, images, labels), **kwargs)
    assert len({stage.name for stage in found}) == len(found)
    return {stage.name: stage for stage in found}


def run(stage: Stage, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    adversarial = stage.run(model, images, labels, torch.Generator().manual_seed(seed))
    assert float((adversarial - images).abs().max()) <= EPS + 1e-6
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    return adversarial


def share_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


@cache
def outcome(name: str, stage: str) -> float:
    """Accuracy of a defence under a stage."""
    defence = DEFENCES[name]
    model = defence.build().eval()
    images, labels = defence.data()
    torch.manual_seed(0)
    with attack_mode(model):
        stages = stages_of(model, images, labels, sources=defence.transfer_from())
        return share_right(model, run(stages[stage], model, images, labels), labels)


def pairs(attribute: str) -> list[Any]:
    return [
        pytest.param(name, stage, id=f"{name}-{stage}")
        for name, defence in DEFENCES.items()
        for stage in getattr(defence, attribute)
    ]


class TestPlantedDefences:
    @pytest.mark.parametrize("name", DEFENCES)
    def test_pgd20_calls_it_robust(self, name):
        defence = DEFENCES[name]
        model = defence.build().eval()
        images, labels = defence.data()
        torch.manual_seed(0)
        attack = PGD(eps=EPS, steps=20)
        found = attack(
            lambda x: F.cross_entropy(model(x), labels, reduction="none") + 0 * x.sum(),
            images,
            generator=torch.Generator().manual_seed(0),
        )
        assert share_right(model, images, labels) == 1
        assert share_right(model, found, labels) >= 0.8

    @pytest.mark.parametrize(("name", "stage"), pairs("breaks"))
    def test_the_stage_breaks_it(self, name, stage):
        assert outcome(name, stage) <= 0.2

    @pytest.mark.parametrize(("name", "stage"), pairs("withstands"))
    def test_other_stages_do_not(self, name, stage):
        """Else the toy would not show that the stage is needed."""
        assert outcome(name, stage) >= 0.8

    @pytest.mark.parametrize("name", DEFENCES)
    def test_the_whole_chain_breaks_it(self, name):
        defence = DEFENCES[name]
        torch.manual_seed(0)
        report = evaluate(
            defence.build(),
            defence.data(),
            eps=EPS,
            attacks=["pgd20", "adaptive"],
            transfer_from=defence.transfer_from(),
        )
        assert report.accuracy["clean"] == 1
        assert report.accuracy["pgd20"] >= 0.8
        assert report.accuracy["adaptive"] <= 0.2

    def test_an_honest_model_falls_to_pgd20_too(self):
        assert evaluate(honest(), data(), eps=EPS, attacks=["pgd20"]).accuracy["pgd20"] == 0


class TestTargetedRestarts:
    """The targeted stage goes on from the best point that it has found."""

    def test_later_rounds_begin_at_the_best_point_of_those_before(self, monkeypatch):
        model, (images, labels) = plain_toy(lambda d: d, 4).eval(), data()
        calls: list[tuple[Tensor | None, Tensor]] = []
        original = APGD.__call__

        def spy(self: APGD, loss_fn: Any, images: Tensor, **options: Any) -> Tensor:
            found = original(self, loss_fn, images, **options)
            calls.append((options.get("start"), found))
            return found

        monkeypatch.setattr(APGD, "__call__", spy)
        stage = adaptive._targeted_stage(APGD(eps=1e-4, steps=10), 4)  # too small a ball to break any
        with attack_mode(model):
            best = stage.run(model, images, labels, torch.Generator().manual_seed(0))
        starts = [start for start, _ in calls]
        assert starts[:3] == [None] * 3
        assert len(starts) == 3 * (1 + adaptive._RESTARTS)
        first = torch.stack([margin(model(found), labels) for _, found in calls[:3]])
        assert torch.allclose(margin(model(starts[3]), labels), first.amax(dim=0))
        assert bool((margin(model(best), labels) >= first.amax(dim=0)).all())


class TestWhichApply:
    def test_a_plain_model_gets_what_needs_no_layer(self):
        images, labels = data()
        assert list(stages_of(honest().eval(), images, labels)) == [*DIRECT, "square"]

    def test_two_classes_have_no_dlr(self):
        assert list(stages_of(watched().eval(), *data()))[:3] == ["apgd-ce", "apgd-margin", "apgd-targeted"]

    @pytest.mark.parametrize("classes", [2, 3, 4, 12])
    def test_targets_are_the_wrong_classes_nine_at_most(self, classes):
        stages = stages_of(plain_toy(lambda d: d, classes).eval(), *data())
        assert f"towards each of {min(classes - 1, 9)} wrong class(es)" in stages["apgd-targeted"].detail

    def test_fsr_gets_them_all(self):
        source = {"base": honest().eval()}
        assert list(stages_of(by_the_mask(8).eval(), *data(), sources=source)) == [
            *DIRECT,
            "identity",
            *MASKS,
            "robust_part",
            "bypass",
            *JOINT,
            "mask forcing",
            "eot",
            "latent",
            "transfer from base",
            "square",
        ]

    def test_a_layer_from_outside_gets_identity_and_bypass_by_itself(self):
        found = list(stages_of(wrapped("toy_rounding").eval(), *data()))
        assert found == [*DIRECT, "identity", "bypass", "eot", "latent", "square"]

    def test_without_auxiliary_classifiers_there_is_no_joint_loss(self):
        toy = by_the_mask(8).eval()
        feature_layers(toy)[0].reset_classifier(0)
        assert not set(JOINT) & set(stages_of(toy, *data()))

    def test_a_model_random_in_eval_mode_gets_eot_without_layers(self):
        assert "eot" in stages_of(noisy_gradient().eval(), *data())

    def test_dropout_inside_a_layer_is_noise_too(self):
        """And BatchNorm inside it is none."""
        model, (images, _) = wrapped("toy_dropping").eval(), data()
        before = condition(model)
        with noisy(model):
            assert not torch.equal(model(images), model(images))
            with plain(model):
                assert torch.equal(model(images), model(images))
        assert condition(model) == before

    def test_a_model_that_cannot_be_copied_has_no_latent_stage(self):
        model = rounded_head().eval()
        model.lock = threading.Lock()
        assert "latent" not in stages_of(model, *data())

    @pytest.mark.parametrize("build", [tiny_resnet, lambda: with_fsr(tiny_resnet())], ids=["base", "fsr"])
    def test_timm_models_get_latent_where_a_site_would_sit(self, build):
        model = build().eval()
        given, labels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
        stages = stages_of(model, given, labels)
        assert "latent" in stages
        with attack_mode(model):
            run(stages["latent"], model, given, labels)

    def test_every_detail_says_attack_and_parameters(self):
        for name, stage in stages_of(by_the_mask(8).eval(), *data()).items():
            expected = "Component(name='square'" if name == "square" else repr(APGD(eps=EPS, steps=30))
            assert stage.detail.startswith(expected), name

    @pytest.mark.parametrize("arguments", [{"norm": "l1"}, {"norm": "linf", "eps": -1}], ids=["norm", "eps"])
    def test_bad_balls_are_refused(self, arguments):
        model = honest().eval()
        with pytest.raises(ValueError, match=r"norm='l1' is unknown|must be 0 or more"):
            adaptive_stages(model, **{"eps": EPS, **arguments}, seed=0, model_check=examine(model, *data()))


def condition(model: nn.Module) -> list[Any]:
    """All that an attack may have left behind on a model."""
    groups, layers = layer_groups(model), feature_layers(model)
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        {key: value.tolist() for key, value in model.state_dict().items()},
        [(group.surrogate, group.tape) for group in groups],
        [layer.surrogate for layer in layers],
        traces(model),
    ]


class StopError(Exception):
    """Raised by a model in the middle of an attack."""


def fsr_stages() -> list[str]:
    return [*DIRECT, "identity", *MASKS, "robust_part", "bypass", *JOINT, "mask forcing", "eot", "latent", "square"]


class TestManners:
    @pytest.fixture
    def model(self) -> nn.Module:
        return by_the_mask(8, steps).eval()

    @pytest.mark.parametrize("name", fsr_stages())
    def test_a_stage_leaves_no_trace_and_is_decided_by_its_seed(self, model, monkeypatch, name):
        monkeypatch.setattr(adaptive, "STEPS", 4)
        images, labels = data()
        given, state = images.clone(), torch.get_rng_state()
        before, logits = condition(model), model(images)
        stage = stages_of(model, images, labels)[name]
        with attack_mode(model):
            found = [run(stage, model, images, labels, seed) for seed in (3, 3, 4)]
        assert torch.equal(found[0], found[1])
        corner = name in ("mask forcing", "latent", "square")  # where any start leads
        assert corner or not torch.equal(found[0], found[2])
        assert condition(model) == before
        assert torch.equal(model(images), logits)
        assert torch.equal(images, given)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("name", fsr_stages())
    @pytest.mark.parametrize("passes", [1, 2, 5])
    def test_also_when_the_model_raises(self, model, name, passes):
        images, labels = data()
        stage = stages_of(model, images, labels)[name]
        state, count = torch.get_rng_state(), [0]

        def stop(*_: Any) -> None:
            count[0] += 1
            if count[0] >= passes:
                raise StopError

        handle = model.head.register_forward_pre_hook(stop)
        before = condition(model)
        with pytest.raises(StopError), attack_mode(model):
            run(stage, model, images, labels)
        assert condition(model) == before
        assert torch.equal(torch.get_rng_state(), state)
        handle.remove()

    def test_the_attack_keeps_what_the_model_itself_likes_least(self):
        """A surrogate that leads astray costs nothing: the judge sees the model without it."""
        model, (images, labels) = misled_mask().eval(), data()
        with attack_mode(model):
            for name, stage in stages_of(model, images, labels).items():
                if name != "square":
                    found = run(stage, model, images, labels)
                    moved = (labels * 2 - 1) * (model(found) - model(images))[:, 1].detach()
                    assert float(moved.max()) < 0.05, name  # never much more certain than before

    def test_eps_0_gives_the_images_back(self, model):
        images, labels = data()
        stages = adaptive_stages(model, norm="linf", eps=0, seed=0, model_check=examine(model, images, labels))
        for stage in stages:
            assert torch.equal(stage.run(model, images, labels, torch.Generator()), images)

    def test_l2(self):
        """A shift of the mean by 0.1 is 1.6 long for 256 pixels."""
        for name in ("rounded features", "saturated mask", "rounded head"):
            report = evaluate(DEFENCES[name].build(), data(), norm="l2", eps=1.6, attacks=["pgd20", "adaptive"], seed=1)
            assert report.accuracy == {"clean": 1, "pgd20": 1, "adaptive": 0}

    def test_the_same_seed_gives_the_same_report(self):
        model = misled_mask()
        reports = [evaluate(model, data(), eps=EPS, attacks=["adaptive"], seed=2).to_dict() for _ in range(2)]
        assert reports[0] == reports[1]

    def test_also_of_a_model_that_is_random_itself(self):
        """Its own noise comes from the default generator, which is then as it was."""
        model, pair, reports = noisy_gradient(), data((0.47, 0.53) * 8), []
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            reports.append(evaluate(model, pair, eps=EPS, attacks=["pgd20", "apgd30"]).to_dict())
            assert torch.equal(torch.get_rng_state(), state)
        assert reports[0] == reports[1] == reports[2]


class TestParts:
    def test_mean_gradient_is_linear_and_averages_passes(self):
        calls: list[float] = []

        def loss(x: Tensor) -> Tensor:
            calls.append(float(len(calls)))
            return calls[-1] * x.flatten(1).sum(dim=1)

        gradient = input_gradient(mean_gradient(loss, draws=5), grey(0.2, 0.7))
        assert torch.equal(gradient, torch.full_like(gradient, 2))  # of 0 to 4
        assert len(calls) == 5

    def test_latent_without_another_class_goes_away_from_the_own_features(self):
        """Dark is only a narrow band here, so any way out will do."""
        toy = Toy(
            lambda images: planes(brightness(images)),
            lambda out: decide(steps(channel(out).abs() - 0.03, 0.2)),
        )
        toy.feature_info = [{"module": "body", "num_chs": 1, "reduction": 8}]
        images, labels = grey(0.49, 0.5, 0.51), torch.zeros(3, dtype=torch.int64)
        stage = stages_of(toy.eval(), images, labels)["latent"]
        assert share_right(toy, images, labels) == 1
        assert share_right(toy, run(stage, toy, images, labels), labels) == 0
