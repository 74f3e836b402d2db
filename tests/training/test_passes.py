"""The feature layers' terms in training attacks: what is maximised, that it is, and that others pay nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import LabelScale, images, label_scale_registered, labels, tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.pgd import PGD
from timm_fsr.layers.cas import CAS
from timm_fsr.training.objectives import passes
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.objectives.mart import MART
from timm_fsr.training.objectives.trades import TRADES


def two_blocks() -> nn.Module:
    return tiny_resnet(layers=(1, 1, 1, 2))


def with_layer(layer: str, **args: Any) -> nn.Module:
    """In training mode, with two sites."""
    torch.manual_seed(1)
    model = timm_fsr.attach(two_blocks(), layer, layer_args=args)
    assert len(getattr(model, layer).sites) == 2
    return model.train()


def moved() -> Tensor:
    return (images() + 0.1).clamp(0, 1)


def said(model: nn.Module, given: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's logits and each site's auxiliary ones, in eval mode."""
    with attack_mode(model), torch.no_grad(), timm_fsr.record(model) as tape:
        logits = model(given)
    return logits, [tape[name].logits for name in tape]


def attacked(objective: Objective, model: nn.Module, given: Tensor) -> Tensor:
    with attack_mode(model), torch.no_grad():
        return objective.attack_loss(model, images(), labels())(given)


def entropy(logits: Tensor) -> Tensor:
    return torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, labels(), strict=True)])


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    p, q = clean.double().softmax(1), logits.double().softmax(1)
    return (p * (p / q).log()).sum(1).float()


@pytest.mark.parametrize("objective", [AT(), AT(label_smoothing=0.2), MART()], ids=repr)
@pytest.mark.parametrize("layer", ["cas", "cifs"])
def test_the_attack_adds_the_mean_of_the_sites_cross_entropies(layer, objective):
    model = with_layer(layer, attack_weight=3.0)
    logits, (one, other) = said(model, moved())
    expected = entropy(logits) + 3 * (entropy(one) + entropy(other)) / 2
    torch.testing.assert_close(attacked(objective, model, moved()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["cas", "cifs"])
def test_trades_adds_the_divergences_of_the_auxiliary_predictions(layer):
    model = with_layer(layer, attack_weight=3.0)
    with torch.no_grad():
        for site in getattr(model, layer).sites:
            site.layer.head.weight.mul_(30)  # so that clean and attacked images are told apart
    (clean, before), (logits, after) = said(model, images()), said(model, moved())
    layers = sum(divergence(*pair) for pair in zip(before, after, strict=True)) / 2
    assert layers.min() > 1e-4, "the case shows nothing"
    expected = divergence(clean, logits) + 3 * layers
    torch.testing.assert_close(attacked(TRADES(), model, moved()), expected, rtol=1e-3, atol=1e-5)


def test_two_kinds_of_layers_add_a_term_each():
    model = timm_fsr.attach(with_layer("cas", attack_weight=2.0), "cifs", layer_args={"attack_weight": 0.5})
    with attack_mode(model), torch.no_grad(), timm_fsr.record(model) as tape:
        logits = model(moved())
    expected = entropy(logits)
    for kind, weight in (("cas", 2.0), ("cifs", 0.5)):
        terms = [entropy(tape[f"{kind}.layer4.{block}"].logits) for block in (0, 1)]
        expected = expected + weight * (terms[0] + terms[1]) / 2
    torch.testing.assert_close(attacked(AT(), model, moved()), expected, rtol=1e-5, atol=1e-5)


def test_the_attack_really_raises_it():
    """Higher than the attack without it does, and not at the price of nothing."""
    joint, alone = with_layer("cas", attack_weight=10.0), with_layer("cas", attack_weight=0.0)
    with torch.no_grad():
        for site in joint.cas.sites:
            site.layer.head.weight.mul_(10)
    alone.load_state_dict(joint.state_dict())
    attack = PGD(eps=0.1, steps=5, random_start=False)
    found = {}
    for name, model in (("joint", joint), ("alone", alone)):
        adversarial = AT().craft(model, attack, images(), labels())
        logits, auxiliary = said(model, adversarial)
        found[name] = (entropy(logits).sum().item(), sum(entropy(one).sum().item() for one in auxiliary))
    assert found["joint"][1] > found["alone"][1] + 0.1
    assert found["joint"][0] < found["alone"][0]
    _, before = said(joint, images())
    assert found["joint"][1] > sum(entropy(one).sum().item() for one in before) + 0.5


def test_no_label_reaches_a_layer_during_the_attack(monkeypatch):
    model, seen = with_layer("cas"), []
    forward = CAS.forward

    def watched(layer: CAS, feature: Tensor, given: Tensor | None = None) -> Any:
        seen.append((layer.training, given))
        return forward(layer, feature, given)

    monkeypatch.setattr(CAS, "forward", watched)
    for objective in (AT(), TRADES(), MART()):
        objective.craft(model, PGD(steps=2), images(), labels())
    assert len(seen) == 2 * (2 + 3 + 2)
    assert all(not training and given is None for training, given in seen)


class TestOthersPayNothing:
    @pytest.fixture(params=["plain", "fsr", "weightless"])
    def model(self, request: pytest.FixtureRequest) -> nn.Module:
        if request.param == "weightless":
            return with_layer("cas", attack_weight=0.0)
        return tiny_resnet().train() if request.param == "plain" else with_fsr(tiny_resnet()).train()

    @pytest.fixture(autouse=True)
    def _no_recording(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("recorded during an attack")

        monkeypatch.setattr(passes, "record", refuse)
        monkeypatch.setattr("timm_fsr.training.objectives.trades.record", refuse)

    def test_the_loss_is_the_plain_one_to_the_bit(self, model):
        assert not passes.joins_attacks(model)
        for objective in (AT(), MART()):
            found = attacked(objective, model, moved())
            with attack_mode(model), torch.no_grad():
                assert torch.equal(found, F.cross_entropy(model(moved()), labels(), reduction="none"))
        found = attacked(TRADES(), model, moved())
        with attack_mode(model), torch.no_grad():
            clean, logits = model(images()).log_softmax(1), model(moved()).log_softmax(1)
        assert torch.equal(found, F.kl_div(logits, clean, reduction="none", log_target=True).sum(1))

    def test_the_images_are_those_of_the_plain_attack_to_the_bit(self, model):
        attack = PGD(steps=3, random_start=False)
        found = AT().craft(model, attack, images(), labels())
        with attack_mode(model):
            expected = attack(lambda x: F.cross_entropy(model(x), labels(), reduction="none"), images())
        assert torch.equal(found, expected)


def test_a_layer_may_have_nothing_to_say():
    with label_scale_registered():
        model = timm_fsr.attach(tiny_resnet(), "label_scale")
        plain = attacked(AT(), model, moved())
        LabelScale.attack_weight = 1.0
        try:
            assert passes.joins_attacks(model)
            torch.testing.assert_close(attacked(AT(), model, moved()), plain)
        finally:
            del LabelScale.attack_weight


@pytest.mark.parametrize("objective", [AT(), TRADES()], ids=repr)
def test_without_classes_the_attack_says_what_is_missing(objective):
    model = timm_fsr.attach(nn.Sequential(tiny_resnet(num_classes=0))[0], "cas")
    with pytest.raises(ValueError, match=r"call model\.reset_classifier"):
        objective.craft(model, PGD(steps=1), images(), labels())


@pytest.mark.parametrize("objective", [AT(), TRADES(), MART()], ids=repr)
def test_gradient_checkpointing_finds_the_same_images(objective):
    """Its recomputation records nothing, but has to do what the recorded pass did."""
    model = with_layer("cas")
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        generator = torch.Generator().manual_seed(0)
        found.append(objective.craft(model, PGD(steps=2), images(), labels(), generator=generator))
    assert torch.equal(*found)


def test_a_compiled_model_finds_the_same_images():
    model = with_layer("cas")
    attack = PGD(steps=2, random_start=False)
    expected = AT().craft(model, attack, images(), labels())
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    found = AT().craft(model, attack, images(), labels())
    torch.compiler.reset()
    assert (found != expected).float().mean() < 0.01  # a sign may differ where the gradient is all but zero
