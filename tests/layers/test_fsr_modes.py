"""FSR's ablations: separation without recalibration, recalibration without separation."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.tiny import images, labels, tiny_resnet, with_fsr
from torch import Tensor

import timm_fsr
from timm_fsr.evaluation.model_checks import ModelCheck
from timm_fsr.evaluation.suites.adaptive import adaptive_stages
from timm_fsr.hooks.surrogates import list_surrogates, surrogate
from timm_fsr.layers import FSR
from timm_fsr.layers.common import strongest_wrong_class

CHANNELS, CLASSES = 8, 5
ABLATIONS = ("separation", "recalibration")


def layer(mode: str, **arguments: object) -> FSR:
    torch.manual_seed(0)
    made = FSR(CHANNELS, CLASSES, hidden=4, mode=mode, **arguments)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    return made


def features() -> Tensor:
    return torch.randn(4, CHANNELS, 5, 3, generator=torch.Generator().manual_seed(1))


def logits() -> Tensor:
    return torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(2))


def half(whole: FSR, mode: str) -> FSR:
    """The ablation with the weights that it shares with a whole layer."""
    part = layer(mode)
    part.load_state_dict({key: value for key, value in whole.state_dict().items() if key in part.state_dict()})
    return part


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise", [True, False])
def test_separation_gives_out_the_robust_part_of_the_whole_layer(training: bool, noise: bool) -> None:
    whole = layer("both", noise=noise).train(training)
    part = layer("separation", noise=noise).train(training)
    part.load_state_dict({key: value for key, value in whole.state_dict().items() if key in part.state_dict()})
    outs = []
    for one in (whole, part):
        torch.manual_seed(3)
        outs.append(one(features()))
    (_, aux), (out, own) = outs
    assert torch.equal(out, own["mask"] * features())
    assert set(aux) - set(own) == {"recalibrated_logits"}
    assert all(torch.equal(own[key], aux[key]) for key in own)
    if training and noise:
        assert not torch.equal(part(features())[0], out)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("feature_norm", [True, False])
def test_recalibration_adds_r_of_everything(training: bool, feature_norm: bool) -> None:
    part = layer("recalibration", feature_norm=feature_norm).train(training)
    seen = F.group_norm(features(), 1) if feature_norm else features()
    expected = features() + copy.deepcopy(part.recalibration)(seen)
    state = torch.get_rng_state()
    out, aux = part(features())
    torch.testing.assert_close(out, expected)
    assert set(aux) == {"recalibrated_logits"}
    torch.testing.assert_close(aux["recalibrated_logits"], part.head(expected.mean(dim=(2, 3))))
    assert torch.equal(torch.get_rng_state(), state), "there is nothing to draw noise for"


def test_recalibration_is_the_whole_layer_with_a_mask_of_zero() -> None:
    whole = layer("both").eval()
    with torch.no_grad():
        whole.separation[3].weight.zero_()  # S then sees a constant
        whole.separation[4].bias.fill_(1.0)
        whole.separation[6].weight.fill_(-100.0)
    out, aux = whole(features())
    assert aux["mask"].max() == 0
    torch.testing.assert_close(half(whole, "recalibration").eval()(features())[0], out)


def test_the_losses_are_those_of_the_half_that_is_there() -> None:
    whole = layer("both").eval()
    aux = whole(features())[1]
    true = torch.arange(4)
    wrong = strongest_wrong_class(logits(), true)
    part = layer("separation", separation_weight=3.0).eval()
    part.load_state_dict(half(whole, "separation").state_dict())
    robust = F.cross_entropy(aux["robust_logits"], true) + F.cross_entropy(aux["nonrobust_logits"], wrong)
    assert part.aux_losses(part(features())[1], logits(), true) == {"separation": 3 * robust}
    part = layer("recalibration", recalibration_weight=0.5).eval()
    own = part(features())[1]
    (loss,) = part.aux_losses(own, logits(), true).values()
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(own["recalibrated_logits"], true))


@pytest.mark.parametrize("mode", ABLATIONS)
def test_every_parameter_that_exists_learns(mode: str) -> None:
    part = layer(mode, feature_norm=True).train()
    given = features().requires_grad_()
    out, aux = part(given, torch.arange(4))
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    ((out * direction).sum() + sum(part.aux_losses(aux, logits(), torch.arange(4)).values())).backward()
    assert given.grad.abs().max() > 0
    for key, parameter in part.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("mode", ABLATIONS)
def test_only_the_network_that_is_used_is_there(mode: str) -> None:
    keys = {key.split(".")[0] for key in layer(mode).state_dict()}
    assert keys == {mode, "head"}


@pytest.mark.parametrize("mode", ABLATIONS)
def test_without_classes_or_listeners_nothing_is_said(mode: str) -> None:
    part = FSR(CHANNELS, 0, hidden=4, mode=mode)
    assert set(part(features())[1]) == ({"mask"} if mode == "separation" else set())
    part.reset_classifier(CLASSES)
    part.wants_aux = False
    assert part(features())[1] == {}


def test_surrogates_are_those_that_mean_something() -> None:
    names = {mode: list_surrogates(with_fsr(tiny_resnet(), mode=mode)) for mode in ("both", *ABLATIONS)}
    masks = ("identity", "wide_tau", "straight_through", "detached_mask")
    assert names == {
        "both": (*masks, "robust_part", "bypass"),
        "separation": (*masks, "bypass"),
        "recalibration": ("identity", "bypass"),
    }
    with (
        pytest.raises(ValueError, match="unknown surrogate 'robust_part'"),
        surrogate(with_fsr(tiny_resnet(), mode="separation"), "robust_part"),
    ):
        pass


@pytest.mark.parametrize("mode", ["both", *ABLATIONS])
def test_the_mask_is_attacked_where_there_is_one(mode: str) -> None:
    model = with_fsr(tiny_resnet(), mode=mode).eval()
    model_check = ModelCheck(num_classes=10, random=False, dynamic=False, zero_gradients=0, auxiliary=True)
    stages = adaptive_stages(model, norm="linf", eps=8 / 255, seed=0, model_check=model_check)
    assert ("mask forcing" in [stage.name for stage in stages]) == (mode != "recalibration")


@pytest.mark.parametrize("mode", ABLATIONS)
def test_a_model_trains_in_every_mode(mode: str) -> None:
    model = with_fsr(tiny_resnet(), mode=mode).train()
    with timm_fsr.record(model, labels()) as tape:
        out = model(images())
    terms = tape.losses(out)
    assert set(terms) == {f"fsr.{mode}"}
    (F.cross_entropy(out, labels()) + sum(terms.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_default_is_as_it_was_before_there_were_modes() -> None:
    torch.manual_seed(0)
    plain = FSR(CHANNELS, CLASSES, hidden=4)
    torch.manual_seed(0)
    whole = FSR(CHANNELS, CLASSES, hidden=4, mode="both")
    assert list(plain.state_dict()) == list(whole.state_dict())
    assert next(iter(plain.state_dict())) == "separation.0.weight"
    torch.manual_seed(1)
    expected = plain(features())[0]
    torch.manual_seed(1)
    assert torch.equal(whole(features())[0], expected)


@pytest.mark.parametrize("mode", ABLATIONS)
def test_a_saved_ablation_comes_back(mode: str, tmp_path) -> None:
    model = timm.create_model("resnet_tiny_cifar_fsr", fsr_hidden=4, fsr_mode=mode).eval()
    timm_fsr.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again._model_args["fsr_mode"] == mode
    assert torch.equal(again(images()), model(images()))


def test_an_unknown_mode_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="unknown mode of the feature layer 'fsr' 'seperation'; did you mean 'separat"):
        FSR(CHANNELS, CLASSES, mode="seperation")
    with pytest.raises(ValueError, match=r"known: both, separation, recalibration"):
        with_fsr(tiny_resnet(), mode="none")
