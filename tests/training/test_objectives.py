"""Natural training and AT against values computed by hand, and every method's manners on one process and on two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from support.objectives import Brighten, assert_terms, brighter, cross_entropy, fsr_terms
from support.tiny import images, labels, same_state, state, tiny_resnet, with_fsr
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm_fsr
from timm_fsr.attacks.base import LossFunction, attack_mode
from timm_fsr.attacks.pgd import PGD
from timm_fsr.training.objectives import OBJECTIVES
from timm_fsr.training.objectives.afd import AFD
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.objectives.mart import MART
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.trades import TRADES


@pytest.fixture(params=["plain", "fsr"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In training mode; without noise, so that two passes agree."""
    model = tiny_resnet()
    return model.train() if request.param == "plain" else with_fsr(model, noise=False).train()


@pytest.fixture
def fsr_model() -> nn.Module:
    return with_fsr(tiny_resnet(), noise=False).train()


@pytest.fixture(params=OBJECTIVES.names())
def objective(request: pytest.FixtureRequest, model: nn.Module) -> Objective:
    """Begun on `model`, which gets the feature layer that the method needs."""
    method = OBJECTIVES[request.param]()
    if method.layer is not None:
        timm_fsr.attach(model, method.layer)
    return method.begin(model)


class TestTerms:
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_natural_training_is_on_the_images_as_they_are(self, model, smoothing):
        attack = Brighten(model)
        terms = Natural(label_smoothing=smoothing)(model, attack, images(), labels())
        natural = cross_entropy(model(images()).detach(), labels(), smoothing).mean()
        assert_terms(terms, {"natural": natural, **fsr_terms(model, images())})
        assert attack.losses is None, "natural training attacked"

    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_at_is_on_the_adversarial_images_with_every_auxiliary_term(self, model, smoothing):
        terms = AT(label_smoothing=smoothing)(model, Brighten(model), images(), labels())
        adversarial = cross_entropy(model(brighter(images())).detach(), labels(), smoothing).mean()
        assert_terms(terms, {"adversarial": adversarial, **fsr_terms(model, brighter(images()))})

    def test_the_official_weights_are_one(self, fsr_model):
        heavier = with_fsr(tiny_resnet(), noise=False, separation_weight=3.0, recalibration_weight=0.5).train()
        heavier.load_state_dict(fsr_model.state_dict())
        one, other = (AT()(m, Brighten(m), images(), labels()) for m in (fsr_model, heavier))
        for name, weight in {"adversarial": 1, "fsr.separation": 3, "fsr.recalibration": 0.5}.items():
            torch.testing.assert_close(other[name], weight * one[name])

    def test_logits_are_those_of_the_training_pass_by_what_was_shown(self, model, objective):
        terms = objective(model, Brighten(model), images(), labels())
        shown = {"clean": images(), "adversarial": brighter(images())}
        assert 1 <= len(terms.logits) <= 2
        assert terms.logits.keys() <= shown.keys()
        together = model(torch.cat([shown[kind] for kind in terms.logits])).chunk(len(terms.logits))
        expected = dict(zip(terms.logits, together, strict=True))
        for kind, logits in terms.logits.items():
            assert not logits.requires_grad
            torch.testing.assert_close(logits, expected[kind].detach())

    @pytest.mark.parametrize("method", [AT, MART])
    def test_the_attack_maximises_the_plain_cross_entropy_in_eval_mode(self, model, method):
        with attack_mode(model), torch.no_grad():
            expected = cross_entropy(model(brighter(images())), labels())
        attack, generator = Brighten(model), torch.Generator()
        method(label_smoothing=0.3)(model, attack, images(), labels(), generator=generator)
        assert attack.modes == {False}
        assert attack.frozen
        assert attack.generator is generator
        torch.testing.assert_close(attack.losses.double(), expected)

    def test_gradients_reach_every_parameter(self, model, objective):
        objective(model, PGD(steps=2), images(), labels()).total().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
    def test_bad_label_smoothing_is_refused(self, objective, smoothing):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            type(objective)(label_smoothing=smoothing)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite_are_refused(self, objective, value):
        keys = [e.name for e in dataclasses.fields(objective) if e.init and "float" in str(e.type)]
        assert "label_smoothing" in keys
        for key in keys:
            with pytest.raises(ValueError, match=f"{key}={value}"):
                type(objective)(**{key: value})

    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize(
        ("method", "name"), [(AT, "grad_align"), (TRADES, "beta"), (MART, "beta"), (AFD, "alignment")]
    )
    def test_bad_weights_are_refused(self, method, name, weight):
        with pytest.raises(ValueError, match=f"{name}={weight} must be 0 or more"):
            method(**{name: weight})


@pytest.mark.parametrize(
    ("objective", "shown"),
    [
        (Natural, ["clean"]),
        (AT, ["adversarial"]),
        (TRADES, ["clean", "adversarial"]),
        (MART, ["clean", "adversarial"]),
        (AFD, ["adversarial"]),
    ],
)
def test_what_each_objective_shows_the_model(objective, shown):
    model = timm_fsr.attach(tiny_resnet(), "afd" if objective is AFD else "fsr").train()
    terms = objective().begin(model)(model, Brighten(model), images(), labels())
    assert list(terms.logits) == shown


class TestInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (255 * x, y), "divide them by 255"),
            (lambda x, y: ((255 * x).byte(), y), "dtype torch.uint8"),
            (lambda x, y: (x.half(), y), r"images are float16 but the model's weights are float32; give images\.to"),
            (lambda x, y: (x, y + 99), "but the model has"),
            (lambda x, y: (x, y.float()), "dtype torch.float32; give one int64 class"),
        ],
    )
    def test_what_is_no_batch_of_pixels_with_classes_is_refused(self, model, objective, change, message):
        with pytest.raises(ValueError, match=message):
            objective(model, PGD(steps=1), *change(images(), labels()))


class TestManners:
    def test_the_attack_touches_no_running_statistics(self, model, objective):
        """Afterwards they are those of one pass in training mode over the images that were shown."""
        attack = PGD(steps=2)
        before = state(model)
        starts = torch.Generator().manual_seed(5)
        adversarial = objective.craft(model, attack, images(), labels(), generator=starts)
        assert same_state(model, before)
        terms = objective(model, attack, images(), labels(), generator=starts.manual_seed(5))
        after = state(model)
        model.load_state_dict(before)
        shown = {"clean": images(), "adversarial": adversarial}
        model(torch.cat([shown[kind] for kind in terms.logits]))
        assert same_state(model, after)
        moved = [key for key in after if not torch.equal(after[key], before[key])]
        assert "bn1.running_mean" in moved
        assert all("running" in key or "num_batches" in key for key in moved)

    def test_flags_stay_and_no_gradient_is_accumulated(self, model, objective):
        model.bn1.eval()
        model.conv1.weight.requires_grad_(False)
        modes = [module.training for module in model.modules()]
        objective(model, PGD(steps=2), images(), labels())
        assert [module.training for module in model.modules()] == modes
        assert not model.conv1.weight.requires_grad
        assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "conv1.weight")
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("method", [AT, TRADES, MART])
    def test_flags_are_restored_when_the_attack_fails(self, model, method):
        def broken(*_: object, **__: object) -> Tensor:
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            method()(model, broken, images(), labels())
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_no_tape_stays_behind(self, model, objective):
        objective(model, Brighten(model), images(), labels())
        assert all(group.tape is None for group in timm_fsr.hooks.site.layer_groups(model))


# On two processes.

METHODS: dict[str, Objective] = {"at": AT(), "trades": TRADES(), "mart": MART(), "aligned": AT(grad_align=0.2)}
JOINT = ("at", "trades", "mart")  # those that draw nothing at random


class FromAside:
    """Gradient steps from a fixed point beside the image, where the divergence of TRADES has a gradient."""

    eps = 0.1

    def __call__(self, loss_fn: LossFunction, given: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return PGD(eps=0.1, steps=3, random_start=False)(loss_fn, (given + 0.05).clamp(0, 1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_step(model: nn.Module, method: str, given: Tensor, classes: Tensor) -> None:
    model.zero_grad()
    METHODS[method](model, FromAside(), given, classes).total().backward()


def rank_main(folder: Path) -> None:
    """What each of the two processes does: its half of the batch in eval mode, then steps in training mode."""
    AcceleratorState._reset_state(reset_partial_state=True)  # this process is a copy of one that may have trained
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    inner = with_fsr(tiny_resnet())
    prepared, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    assert isinstance(prepared, DistributedDataParallel)
    forwards = count_calls(prepared)
    half = images(8)[4 * rank : 4 * rank + 4], labels(8)[4 * rank : 4 * rank + 4]

    prepared.eval()  # fixed BatchNorm statistics and no noise: each image is on its own
    joint = {}
    for method in JOINT:
        one_step(prepared, method, *half)
        joint[method] = gradients(inner)
    assert forwards() == len(JOINT), "an attack ran through the wrapper, or a method made two passes"

    prepared.train()
    parameters = {}
    for number, method in enumerate(METHODS):
        for step in range(2):
            torch.manual_seed(100 * number + 10 * step + rank)
            one_step(prepared, method, *half)
            optimizer.step()
        parameters[method] = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
    torch.save({"joint": joint, "parameters": parameters, "forwards": forwards()}, folder / f"{rank}.pt")


def count_calls(module: nn.Module) -> Callable[[], int]:
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return lambda: len(calls)


def test_two_processes_compute_the_gradient_of_the_joint_batch(tmp_path):
    """And do not hang at the second step, as they would if an auxiliary head had no part in the loss.

    In training mode a method of two passes would fail there: the second would overwrite the BatchNorm statistics
    that the first one's backward pass is checked against.
    """
    debug_launcher(rank_main, args=(tmp_path,), num_processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    alone = with_fsr(tiny_resnet()).eval()
    for method in JOINT:
        one_step(alone, method, images(8), labels(8))
        for name, gradient in gradients(alone).items():
            for rank in (first, second):
                found = rank["joint"][method][name]
                torch.testing.assert_close(
                    found, gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=f"{method} {name}": f"{name}: {text}"
                )
    earlier = dict(alone.named_parameters())
    for method, trained in first["parameters"].items():
        for name, value in trained.items():
            assert value.isfinite().all(), f"{name} broke under {method}"
            assert torch.equal(value, second["parameters"][method][name]), f"{name} drifted apart under {method}"
            assert not torch.equal(value, earlier[name]), f"{name} was not trained by {method}"
        earlier = trained
    assert first["forwards"] == second["forwards"] == len(JOINT) + 2 * len(METHODS)
