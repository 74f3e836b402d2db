"""BatchNorm folded into convolutions: the same function, exactly where it may be done, and restored afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from support.backbones import TinyBackbone
from support.tiny import images, labels, same_state, state, tiny_resnet, with_fsr
from timm.layers import StdConv2d
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.bn_folding import Folding, find_folding
from timm_fsr.attacks.pgd import PGD
from timm_fsr.models.pixel import PixelModel

ALL_FOLDED = ("resnet_tiny_cifar_fsr", "mobilenetv2_cifar_fsr", "test_efficientnet", "regnety_002")


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in double precision with BatchNorms that have seen something, so that an error shows."""
    generator = torch.Generator().manual_seed(5)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.3, 3, generator=generator)
        with torch.no_grad():
            norm.weight.normal_(generator=generator)
            norm.bias.normal_(generator=generator)
    return model.double()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def outcome(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in eval mode, and their gradient with respect to the pixels."""
    with attack_mode(model):
        pixels = pixels.detach().requires_grad_()
        logits = model(pixels)
        (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
    return logits.detach(), gradient


def assert_same_function(model: nn.Module, pixels: Tensor) -> Folding:
    folding = find_folding(model, pixels)
    before = outcome(model, pixels)
    with folding.applied():
        for found, expected in zip(outcome(model, pixels), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for found, expected in zip(outcome(model, pixels), before, strict=True):
        assert torch.equal(found, expected), "the model is not what it was"
    return folding


@pytest.mark.parametrize("name", [*ALL_FOLDED, "preact_resnet18_cifar_fsr", "densenet121", "repvgg_a0"])
def test_networks_stay_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    model = with_statistics(timm.create_model(name, num_classes=10))
    folding = assert_same_function(model, images(2).double())
    assert 0 < len(folding.pairs) <= len(norms(model))
    if name in ALL_FOLDED:
        assert {norm for _, norm in folding.pairs} == set(norms(model))
    else:  # norms before convolutions, after additions or beside skips stay
        assert len(folding.pairs) < len(norms(model))


def test_every_tiny_backbone_stays_the_same_function(backbone: TinyBackbone) -> None:
    torch.manual_seed(0)
    model = with_statistics(timm_fsr.attach(backbone.create(), layer_args={"hidden": 4}))
    folding = assert_same_function(model, backbone.images().double())
    assert len(folding.pairs) >= 4, "FSR's own convolutions"


def test_a_model_in_training_mode_is_left_in_it_with_its_parameters() -> None:
    model = with_fsr(tiny_resnet()).train()
    before, parameters = state(model), list(model.parameters())
    random = torch.get_rng_state()
    folding = find_folding(model, images())
    with pytest.raises(KeyError, match="inside"), folding.applied(), attack_mode(model):
        raise KeyError("inside")
    assert same_state(model, before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in parameters)
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_it_folds_the_weights_of_the_moment() -> None:
    model = with_statistics(tiny_resnet())
    folding = find_folding(model, images().double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    expected, _ = outcome(model, images().double())
    with folding.applied():
        torch.testing.assert_close(outcome(model, images().double())[0], expected, rtol=1e-9, atol=1e-11)


def test_nested_use_folds_once() -> None:
    model = with_statistics(tiny_resnet())
    folding = find_folding(model, images().double())
    expected = outcome(model, images().double())[0]
    with folding.applied(), folding.applied():
        torch.testing.assert_close(outcome(model, images().double())[0], expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(outcome(model, images().double())[0], expected)


class Small(nn.Module):
    """A convolution and a norm, with something between or beside them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x).mean(dim=(2, 3))


BESIDE: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "another reader": lambda net, x: (lambda f: net.norm(f) + f)(net.conv(x)),
    "changed in place": lambda net, x: net.norm(F.relu_(net.conv(x))),
    "something between": lambda net, x: net.norm(2 * net.conv(x)),
    "norm twice": lambda net, x: net.norm(net.norm(net.conv(x))),
    "convolution twice": lambda net, x: net.norm(net.conv(x)) + net.conv(x),
    "norm first": lambda net, x: net.conv(net.norm(torch.cat([x, x[:, :1]], dim=1))[:, :3]),
}


@pytest.mark.parametrize("how", BESIDE)
def test_what_cannot_be_folded_is_not(how: str) -> None:
    torch.manual_seed(0)
    model = with_statistics(Small(BESIDE[how]))
    assert assert_same_function(model, images().double()).pairs == ()


def test_the_plain_sequence_is_folded() -> None:
    """So that the test above can fail."""
    model = with_statistics(Small(lambda net, x: net.norm(net.conv(x))))
    assert len(assert_same_function(model, images().double()).pairs) == 1


def test_a_hook_on_the_convolution_sees_what_it_saw() -> None:
    model = with_statistics(Small(lambda net, x: net.norm(net.conv(x))))
    late = find_folding(model, images().double())
    seen: list[Tensor] = []
    model.conv.register_forward_hook(lambda _, __, output: seen.append(output))
    assert find_folding(model, images().double()).pairs == ()
    outcome(model, images().double())
    with late.applied():
        outcome(model, images().double())
    assert torch.equal(seen[-2], seen[-1])


def test_norms_without_statistics_are_left_alone() -> None:
    model = Small(lambda net, x: net.norm(net.conv(x)))
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert find_folding(model, images()).pairs == ()


def test_weight_standardisation_is_left_alone() -> None:
    """Its convolutions compute with another weight than they store."""
    model = Small(lambda net, x: net.norm(net.conv(x)))
    model.conv = StdConv2d(3, 4, 3)
    assert find_folding(model, images()).pairs == ()


def test_nothing_of_a_compiled_model_is_folded() -> None:
    model = tiny_resnet()
    assert find_folding(torch.compile(model, backend="eager"), images()).pairs == ()
    model.compile(backend="eager")
    assert find_folding(model, images()).pairs == ()


def test_a_model_that_cuts_its_gradient_off_has_nothing_to_fold() -> None:
    assert find_folding(Small(lambda net, x: net.norm(net.conv(x.detach())).detach()), images()).pairs == ()


def test_an_attack_ends_at_the_same_images() -> None:
    """In double precision; in float32 rounding turns signs of gradients that are nearly zero."""
    model = PixelModel(with_statistics(with_fsr(tiny_resnet()))).double()
    attack = PGD(eps=0.1, steps=5)

    def run() -> Tensor:
        with attack_mode(model):
            return attack(
                lambda x: F.cross_entropy(model(x), labels(), reduction="none"),
                images().double(),
                generator=torch.Generator().manual_seed(0),
            )

    expected = run()
    with find_folding(model, images().double()).applied():
        torch.testing.assert_close(run(), expected, rtol=0, atol=1e-9)
