"""Our FSR networks against numbers that the official code computed (tests/fixtures/official_fsr/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.official import OFFICIAL, official_weights
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.pgd import PGD
from timm_fsr.layers.common import strongest_wrong_class

VARIANTS = {"resnet18": "resnet18_cifar_fsr", "vgg16": "vgg16_bn_cifar_fsr", "wrn34_10": "wrn34_10_cifar_fsr"}
HEADS = ("robust_logits", "nonrobust_logits", "recalibrated_logits")


@dataclass(frozen=True)
class Case:
    """One network with the official weights, in eval mode, and what the official code says of it."""

    model: nn.Module
    expected: dict[str, Tensor]

    @property
    def images(self) -> Tensor:
        return self.expected["images"].clone()

    @property
    def labels(self) -> Tensor:
        return self.expected["labels"]

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Classification, separation and recalibration loss."""
        with timm_fsr.record(self.model, self.labels) as tape:
            logits = self.model(images)
        losses = tape.losses(logits)
        return {
            "loss_cls": F.cross_entropy(logits, self.labels),
            "loss_sep": losses["fsr.separation"],
            "loss_rec": losses["fsr.recalibration"],
        }


def official(network: str) -> nn.Module:
    model = timm.create_model(VARIANTS[network], num_classes=10)
    model.load_state_dict(timm_fsr.convert_official(official_weights(network)), strict=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["resnet18", "vgg16"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(official(request.param), load_file(OFFICIAL / f"{request.param}.safetensors"))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_logits_masks_and_wrong_classes(case: Case) -> None:
    with timm_fsr.record(case.model, case.labels) as tape:
        logits = case.model(case.images)
    (aux,) = tape.values()
    ours = {"logits": logits, **{head: getattr(aux, head) for head in HEADS}}
    ours |= {"mask_mean": aux.mask.mean(), "mask_per_channel": aux.mask.mean(dim=(0, 2, 3))}
    for key, value in ours.items():
        assert relative_error(value, case.expected[key]) < 1e-4, key
    assert torch.equal(strongest_wrong_class(logits, case.labels), case.expected["wrong_labels"])


def test_losses(case: Case) -> None:
    for key, value in case.losses(case.images).items():
        assert relative_error(value, case.expected[key]) < 1e-4, key


@pytest.mark.parametrize(
    ("key", "total"),
    [
        ("grad_cls_loss_wrt_images", lambda losses: losses["loss_cls"]),
        ("grad_total_loss_wrt_images", lambda losses: sum(losses.values())),
    ],
)
def test_gradients_of_the_images(case: Case, key: str, total: Callable[[dict[str, Tensor]], Tensor]) -> None:
    images = case.images.requires_grad_()
    (gradient,) = torch.autograd.grad(total(case.losses(images)), images)
    assert relative_error(gradient, case.expected[key]) < 1e-3


def test_the_loss_that_pgd_reaches(case: Case) -> None:
    attack = PGD(eps=8 / 255, steps=10, step_size=0.25 * 8 / 255, random_start=False)
    with attack_mode(case.model):
        adversarial = attack(
            lambda images: F.cross_entropy(case.model(images), case.labels, reduction="sum"), case.images
        )
        reached = F.cross_entropy(case.model(adversarial), case.labels)
    assert relative_error(reached, case.expected["pgd10_no_random_start_ce"]) < 1e-4


def test_the_logits_of_the_wide_resnet() -> None:
    images = load_file(OFFICIAL / "resnet18.safetensors")["images"]
    expected = load_file(OFFICIAL / "without_fsr.safetensors")["wrn34_10.logits"]
    assert relative_error(official("wrn34_10")(images), expected) < 1e-4
