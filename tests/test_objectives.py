"""Natural training and AT against values computed by hand, on one process and on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from tiny import images, labels, tiny_resnet, with_fsr
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm_fsr
import timm_fsr.engine
from timm_fsr.attacks import PGD, LossFunction, attack_mode
from timm_fsr.objectives import AT, OBJECTIVES, LossTerms, Natural, attack_cross_entropy

FSR_TERMS = ["fsr.separation", "fsr.recalibration"]


class Brighten:
    """Stands in for an attack: what it does is known, and it notes how it was called."""

    eps = 0.1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: Tensor | None = None
        self.modes: set[bool] = set()
        self.frozen = False
        self.generator: torch.Generator | None = None

    def __call__(self, loss_fn: LossFunction, given: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        self.modes = {module.training for module in self.model.modules()}
        self.frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        self.losses, self.generator = loss_fn(given).detach(), generator
        return (given + 0.1).clamp(0, 1)


@pytest.fixture(params=["plain", "fsr"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In training mode; without noise, so that two passes agree."""
    model = tiny_resnet()
    return model.train() if request.param == "plain" else with_fsr(model, noise=False).train()


@pytest.fixture
def fsr_model() -> nn.Module:
    return with_fsr(tiny_resnet(), noise=False).train()


def expected_terms(model: nn.Module, name: str, given: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    """The terms by the formulas of the paper, with log-probabilities written out."""
    with timm_fsr.record(model) as tape, torch.no_grad():
        logits = model(given)

    def nll(logits: Tensor, classes: Tensor) -> Tensor:
        return -logits.log_softmax(1)[torch.arange(len(classes)), classes].mean()

    uniform = -logits.log_softmax(1).mean()
    terms = {name: (1 - smoothing) * nll(logits, labels()) + smoothing * uniform}
    if tape:
        aux = tape["layer4"]
        rivals = logits.clone()
        rivals[torch.arange(len(logits)), labels()] = float("-inf")
        terms["fsr.separation"] = nll(aux.robust_logits, labels()) + nll(aux.nonrobust_logits, rivals.argmax(1))
        terms["fsr.recalibration"] = nll(aux.recalibrated_logits, labels())
    return terms


def assert_terms(found: LossTerms, expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == ()
        torch.testing.assert_close(found[name].detach(), value, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found.total().detach(), sum(expected.values(), start=torch.zeros(())))


class TestTerms:
    def test_natural_training_is_on_the_images_as_they_are(self, model):
        attack = Brighten(model)
        assert_terms(Natural()(model, attack, images(), labels()), expected_terms(model, "natural", images()))
        assert attack.losses is None, "natural training attacked"

    def test_at_is_on_the_adversarial_images_with_every_auxiliary_term(self, model):
        terms = AT()(model, Brighten(model), images(), labels())
        brighter = (images() + 0.1).clamp(0, 1)
        assert_terms(terms, expected_terms(model, "adversarial", brighter))
        torch.testing.assert_close(terms.logits, model(brighter).detach())
        assert not terms.logits.requires_grad

    def test_the_official_weights_are_one(self, fsr_model):
        heavier = with_fsr(tiny_resnet(), noise=False, separation_weight=3.0, recalibration_weight=0.5).train()
        heavier.load_state_dict(fsr_model.state_dict())
        one, other = (AT()(m, Brighten(m), images(), labels()) for m in (fsr_model, heavier))
        for name, weight in {"adversarial": 1, "fsr.separation": 3, "fsr.recalibration": 0.5}.items():
            torch.testing.assert_close(other[name], weight * one[name])

    @pytest.mark.parametrize("objective", [Natural(label_smoothing=0.3), AT(label_smoothing=0.3)], ids=repr)
    def test_label_smoothing_is_of_the_main_term(self, model, objective):
        terms = objective(model, Brighten(model), images(), labels())
        given = images() if "natural" in terms else (images() + 0.1).clamp(0, 1)
        assert_terms(terms, expected_terms(model, next(iter(terms)), given, smoothing=0.3))

    def test_the_attack_maximises_the_plain_cross_entropy_in_eval_mode(self, model):
        with attack_mode(model), torch.no_grad():
            expected = F.cross_entropy(model(images()), labels(), reduction="none")
        attack, generator = Brighten(model), torch.Generator()
        AT(label_smoothing=0.3)(model, attack, images(), labels(), generator=generator)
        assert attack.modes == {False}
        assert attack.frozen
        assert attack.generator is generator
        torch.testing.assert_close(attack.losses, expected)

    def test_gradients_reach_every_parameter(self, model):
        AT()(model, PGD(steps=2), images(), labels()).total().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
    def test_bad_label_smoothing_is_refused(self, smoothing):
        for objective in OBJECTIVES.values():
            with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
                objective(label_smoothing=smoothing)


class TestManners:
    def test_the_attack_touches_no_running_statistics(self, model):
        """Afterwards they are those of one pass in training mode over the adversarial images."""
        attack = PGD(steps=2, random_start=False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        adversarial = attack_cross_entropy(model, attack, images(), labels())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        AT()(model, attack, images(), labels())
        after = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(before)
        model(adversarial)
        expected = model.state_dict()
        moved = [key for key in after if not torch.equal(after[key], before[key])]
        assert all(torch.equal(after[key], expected[key]) for key in after)
        assert "bn1.running_mean" in moved
        assert all("running" in key or "num_batches" in key for key in moved)

    def test_flags_stay_and_no_gradient_is_accumulated(self, model):
        model.bn1.eval()
        model.conv1.weight.requires_grad_(False)
        modes = [module.training for module in model.modules()]
        AT()(model, PGD(steps=2), images(), labels())
        assert [module.training for module in model.modules()] == modes
        assert not model.conv1.weight.requires_grad
        assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "conv1.weight")
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_flags_are_restored_when_the_attack_fails(self, model):
        def broken(*_: object, **__: object) -> Tensor:
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            AT()(model, broken, images(), labels())
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_no_tape_stays_behind(self, fsr_model):
        AT()(fsr_model, Brighten(fsr_model), images(), labels())
        assert all(group.tape is None for group in timm_fsr.sites.layer_groups(fsr_model))


# On two processes.


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_step(model: nn.Module, given: Tensor, classes: Tensor) -> None:
    AT()(model, PGD(eps=0.1, steps=3, random_start=False), given, classes).total().backward()


def rank_main(folder: Path) -> None:
    """What each of the two processes does: its half of the batch in eval mode, then steps in training mode."""
    AcceleratorState._reset_state(reset_partial_state=True)  # this process is a copy of one that may have trained
    accelerator = timm_fsr.engine.build_accelerator()
    rank = accelerator.process_index
    inner = with_fsr(tiny_resnet())
    prepared, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    assert isinstance(prepared, DistributedDataParallel)
    forwards = count_calls(prepared)

    prepared.eval()  # fixed BatchNorm statistics and no noise: each image is on its own
    one_step(prepared, images(8)[4 * rank : 4 * rank + 4], labels(8)[4 * rank : 4 * rank + 4])
    joint = gradients(inner)
    assert forwards() == 1, "the attack ran through the wrapper"

    prepared.train()
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        one_step(prepared, images(8)[4 * rank : 4 * rank + 4], labels(8)[4 * rank : 4 * rank + 4])
        optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in inner.named_parameters()}
    torch.save({"joint": joint, "parameters": parameters, "forwards": forwards()}, folder / f"{rank}.pt")


def count_calls(module: nn.Module) -> Callable[[], int]:
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return lambda: len(calls)


def test_two_processes_compute_the_gradient_of_the_joint_batch(tmp_path):
    """And do not hang at the second step, as they would if an auxiliary head had no part in the loss."""
    debug_launcher(rank_main, args=(tmp_path,), num_processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    alone = with_fsr(tiny_resnet()).eval()
    one_step(alone, images(8), labels(8))
    for name, gradient in gradients(alone).items():
        for rank in (first, second):
            torch.testing.assert_close(
                rank["joint"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), f"{name} has drifted apart"
        assert not torch.equal(value, alone.get_parameter(name)), f"{name} was not trained"
    assert first["forwards"] == second["forwards"] == 4
