"""Our FGSM and PGD against two independent libraries on the same network at an equal budget.

Without a random start the attacked images are equal to float noise; with one, as many images withstand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attacked import robust
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.losses import cross_entropy
from timm_fsr.attacks.pgd import FGSM, PGD

EPS = {"linf": 0.06, "l2": 0.9}
STEPS = 12


def ours(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
    with attack_mode(model):
        generator = torch.Generator().manual_seed(0)
        return attack(lambda x: cross_entropy(model(x), labels), images, generator=generator)


def by_foolbox(model: nn.Module, images: Tensor, labels: Tensor, norm: str, *, steps: int, random: bool) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    torch.manual_seed(1)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    step = EPS[norm] if steps == 1 else 0.25 * EPS[norm]
    attack = kind(abs_stepsize=step, steps=steps, random_start=random)
    return attack.run(wrapped, images, labels, epsilon=EPS[norm])


def by_art(model: nn.Module, images: Tensor, labels: Tensor, norm: str, *, steps: int, random: bool) -> Tensor:
    pytest.importorskip("art")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    loss = nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(
        model, loss=loss, input_shape=(1, 28, 28), nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    step = EPS[norm] if steps == 1 else 0.25 * EPS[norm]
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm={"linf": "inf", "l2": 2}[norm],
        eps=EPS[norm],
        eps_step=step,
        max_iter=steps,
        num_random_init=int(random),
        batch_size=len(images),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


LIBRARIES = {"foolbox": by_foolbox, "art": by_art}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


@pytest.mark.parametrize("library", LIBRARIES)
class TestLibraries:
    @pytest.mark.parametrize(("norm", "steps"), [("linf", 1), ("l2", 1), ("linf", STEPS), ("l2", STEPS)])
    def test_without_a_random_start_the_images_are_equal(self, trained, batch, library, norm, steps):
        images, labels = batch
        theirs = LIBRARIES[library](trained, images, labels, norm, steps=steps, random=False)
        step = EPS[norm] if steps == 1 else 0.25 * EPS[norm]
        attack = PGD(norm=norm, eps=EPS[norm], steps=steps, step_size=step, random_start=False)
        found = ours(trained, images, labels, attack)
        if (library, norm, steps) == ("art", "l2", STEPS):  # it clips to [0, 1] before it projects onto the ball
            assert abs(int(robust(trained, found, labels).sum()) - int(robust(trained, theirs, labels).sum())) <= 6
            return
        same = (found - theirs).abs().amax(dim=(1, 2, 3)) < 1e-4
        assert same.float().mean() > 0.95, "a sign of a gradient near zero may differ, but not often"
        assert torch.equal(robust(trained, found, labels)[same], robust(trained, theirs, labels)[same])
        if steps == 1 and norm == "linf":
            torch.testing.assert_close(ours(trained, images, labels, FGSM(eps=EPS[norm])), found)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_with_a_random_start_as_many_withstand(self, trained, batch, library, norm):
        """Of 150; by starts of its own each library may win or lose a few."""
        images, labels = batch
        theirs = LIBRARIES[library](trained, images, labels, norm, steps=STEPS, random=True)
        attack = PGD(norm=norm, eps=EPS[norm], steps=STEPS, step_size=0.25 * EPS[norm])
        counts = [int(robust(trained, x, labels).sum()) for x in (theirs, ours(trained, images, labels, attack))]
        assert 15 <= counts[0] <= 135, "the comparison says nothing if all or none withstand"
        assert abs(counts[0] - counts[1]) <= 6


def test_apgd_against_art(trained, batch):
    pytest.importorskip("art")
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    images, labels = batch
    classifier = PyTorchClassifier(
        trained,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = AutoProjectedGradientDescent(
        classifier,
        eps=EPS["linf"],
        eps_step=2 * EPS["linf"],
        max_iter=40,
        nb_random_init=1,
        batch_size=150,
        verbose=False,
    )
    theirs = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
    found = ours(trained, images, labels, APGD(eps=EPS["linf"], steps=40))
    counts = [int(robust(trained, x, labels).sum()) for x in (theirs, found)]
    assert abs(counts[0] - counts[1]) <= 6
