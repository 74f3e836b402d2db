"""AutoAttack's adapter against the original: stored results of its code, and the installed reference itself.

tests/fixtures/autoattack.safetensors holds a small network, 16 images of Fashion-MNIST (MIT licence), and what the
original code (github fra31/auto-attack at commit a392200, MIT) made of them with seed 0.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from support.brief import brief_autoattack
from torch import Tensor, nn

from timm_fsr.attacks import autoattack
from timm_fsr.attacks.autoattack import (
    AUTOATTACK_NORMS,
    COMPONENTS,
    VERSIONS,
    Component,
    implementation_version,
    nonstandard,
    usable,
)
from timm_fsr.attacks.base import attack_mode
from timm_fsr.evaluation.evaluator import evaluate

pytest.importorskip("pyautoattack")

FIXTURE = Path(__file__).parents[1] / "fixtures" / "autoattack.safetensors"
STORED = ("linf.standard", "l2.rand")
INSTALLED = ("linf.plus", "l2.standard", "l1.standard")


class Network(nn.Module):
    """The fixture's network, for 28x28 grey images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 49, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(images)))).flatten(1))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(FIXTURE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def eps() -> dict[str, float]:
    with safe_open(FIXTURE, "pt") as file:
        return json.loads(file.metadata()["eps"])


@pytest.fixture
def network(golden) -> nn.Module:
    model = Network().eval().requires_grad_(False)
    model.load_state_dict({key.removeprefix("weight."): v for key, v in golden.items() if key.startswith("weight.")})
    return model


@pytest.fixture
def brief(monkeypatch) -> None:
    brief_autoattack(monkeypatch)


def run_version(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, version: str) -> Tensor:
    """What our chain of components makes of a batch: each attacks what those before it left."""
    attacked = images.clone()
    left = (model(images).argmax(1) == labels).nonzero().flatten()
    for name in VERSIONS[version]:
        if len(left) == 0:
            break
        found = Component(name, norm, eps, 0, version)(model, images[left], labels[left], 10)
        broken = model(found).argmax(1) != labels[left]
        attacked[left[broken]] = found[broken]
        left = left[~broken]
    return attacked


class TestTheOriginal:
    @pytest.mark.parametrize("run", STORED)
    def test_stored_results(self, golden, network, eps, run):
        """Which images break, and nearly all attacked images to float noise.

        On the machine that made the fixture they are equal to the bit; another processor may add up in another order,
        and the sign of a gradient near zero then sends an image elsewhere.
        """
        norm, version = run.split(".")
        images, labels, expected = golden["images"], golden["labels"], golden[f"attacked.{run}"]
        attacked = run_version(network, images, labels, norm, eps[norm], version)
        right, stored = (network(x).argmax(1) == labels for x in (attacked, expected))
        assert 3 <= int(stored.sum()) <= 12, "the fixture says nothing if all or no images break"
        assert torch.equal(right, stored)
        same = (attacked - expected).abs().amax(dim=(1, 2, 3)) < 1e-5
        assert same.float().mean() >= 0.8

    def test_stored_results_of_the_first_attack_in_l1(self, golden, network, eps):
        """What the others do to the images that it leaves takes a minute; they are compared below, with fewer steps."""
        images, labels, expected = golden["images"], golden["labels"], golden["attacked.l1.standard"]
        right = network(images).argmax(1) == labels
        found = Component("apgd-ce", "l1", eps["l1"], 0)(network, images[right], labels[right], 10)
        broken = network(found).argmax(1) != labels[right]
        assert 3 <= int(broken.sum()) <= 12, "the fixture says nothing if all or no images break"
        same = (found - expected[right]).abs().amax(dim=(1, 2, 3)) < 1e-5
        assert same[broken].float().mean() >= 0.8

    @pytest.mark.parametrize("run", INSTALLED)
    def test_the_installed_reference_to_the_bit(self, golden, network, eps, brief, run):
        from pyautoattack import AutoAttack

        norm, version = run.split(".")
        images, labels = golden["images"][:4], golden["labels"][:4]
        with torch.random.fork_rng():
            whole = AutoAttack(network, norm=AUTOATTACK_NORMS[norm], eps=eps[norm], seed=0, version=version)
            expected, _ = whole.run_standard_evaluation(images, labels, batch_size=4)
        torch.testing.assert_close(
            run_version(network, images, labels, norm, eps[norm], version), expected, rtol=0, atol=0
        )

    def test_evaluate_gives_its_outcomes(self, golden, network, eps, brief):
        images, labels = golden["images"][:6], golden["labels"][:6]
        expected = network(run_version(network, images, labels, "l2", eps["l2"], "rand")).argmax(1) == labels
        report = evaluate(network, (images, labels), norm="l2", eps=eps["l2"], attacks=["rand"])
        assert list(report.correct.values())[-1].tolist() == expected.tolist()
        assert 0 < int(expected.sum()) < int(report.correct["clean"].sum()), "it says nothing if all or none break"

    def test_the_authors_own_package_is_taken_where_that_is_installed(self, golden, network, monkeypatch):
        """`autoattack` from its repository prints, unless it is told not to."""
        import pyautoattack

        asked: list[dict[str, Any]] = []

        class AutoAttack(pyautoattack.AutoAttack):
            def __init__(self, *args: Any, verbose: bool, **options: Any) -> None:
                asked.append({"verbose": verbose})
                super().__init__(*args, **options)

        theirs = types.ModuleType("autoattack")
        theirs.AutoAttack = AutoAttack
        find_spec = importlib.util.find_spec
        monkeypatch.setitem(sys.modules, "autoattack", theirs)
        images, labels = golden["images"][:2], golden["labels"][:2]
        expected = Component("apgd-ce", "linf", 0.1, 0)(network, images, labels, 10)
        assert asked == []
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: find_spec(n) if n != "pyautoattack" else None)
        theirs.__spec__ = importlib.machinery.ModuleSpec("autoattack", None)
        assert implementation_version() == "autoattack"
        assert torch.equal(Component("apgd-ce", "linf", 0.1, 0)(network, images, labels, 10), expected)
        assert asked == [{"verbose": False}]


class TestTraps:
    def test_neither_a_tracer_nor_the_verdict_on_another_model_is_changed(self, golden, network):
        """The reference's own checks take the tracer away and call every model after a dynamic one dynamic too."""

        class Dynamic(nn.Module):
            def forward(self, given: Tensor) -> Tensor:
                with torch.enable_grad():
                    point = given.detach().requires_grad_(True)
                    (gradient,) = torch.autograd.grad(network(point).sum(), point)
                return network(given + 0.01 * gradient)

        def tracer(*_: Any) -> None:
            return None

        pair, before = (golden["images"][:2], golden["labels"][:2]), sys.gettrace()
        sys.settrace(tracer)
        try:
            found = [evaluate(model, pair, eps=0.01, attacks=["apgd-ce"]) for model in (Dynamic(), network)]
            assert sys.gettrace() is tracer
        finally:
            sys.settrace(before)
        assert ["computes gradients in its forward" in " ".join(report.notes) for report in found] == [True, False]

    def test_the_default_generator_and_parameter_gradients_are_left_alone(self, golden, network, brief):
        network.requires_grad_(True)
        before = torch.get_rng_state()
        for name in COMPONENTS:
            if name == "square":
                continue
            with attack_mode(network):
                Component(name, "linf", 0.01, 0)(network, golden["images"][:2], golden["labels"][:2], 10)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_images_and_labels_are_left_alone(self, golden, network):
        images, labels = golden["images"][:3].clone(), golden["labels"][:3].clone()
        Component("apgd-ce", "linf", 0.1, 0)(network, images, labels, 10)
        assert torch.equal(images, golden["images"][:3])
        assert torch.equal(labels, golden["labels"][:3])

    def test_its_logger_is_as_it_was(self, golden, network):
        logger = logging.getLogger("auto-attack")
        Component("apgd-ce", "linf", 0.1, 0)(network, golden["images"][:1], golden["labels"][:1], 10)
        assert not logger.disabled

    @pytest.mark.parametrize("classes", [2, 3, 4, 5, 9])
    def test_few_classes(self, golden, brief, classes):
        """The original crashes or compares with classes that are not there."""
        torch.manual_seed(0)
        model = Network(classes).eval().requires_grad_(False)
        images = golden["images"][:4]
        labels = model(images).argmax(1)
        for name in COMPONENTS:
            if name == "square":
                continue
            component = Component(name, "linf", 0.02, 0)
            if usable(name, classes):
                assert component(model, images, labels, classes).shape == images.shape
            else:
                with pytest.raises(ValueError, match=f"{name} needs . classes but the model has {classes}"):
                    component(model, images, labels, classes)

    def test_what_few_classes_change_is_said(self):
        assert nonstandard(VERSIONS["standard"], 10) == ""
        assert nonstandard(VERSIONS["standard"], 1000) == ""
        three = nonstandard(VERSIONS["standard"], 3)
        assert "apgd-t is left out, its loss needs 4 classes" in three
        assert "fab-t tries 2 target class(es) instead of 9" in three
        assert "apgd-t tries 5 target class(es)" in nonstandard(VERSIONS["standard"], 6)

    @pytest.mark.parametrize("norm", ["l1", "l2"])
    def test_square_fails_for_some_sizes_in_clear_words(self, golden, norm):
        model = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 10)).requires_grad_(False)
        images = golden["images"][:2, :, :24, :24]
        labels = model(images).argmax(1)
        with pytest.raises(ValueError, match="images of some sizes, such as these of 24x24"):
            Component("square", norm, 0.01, 0)(model, images, labels, 10)

    def test_eps_0_and_no_images(self, golden, network):
        images, labels = golden["images"][:2], golden["labels"][:2]
        assert torch.equal(Component("square", "linf", 0, 0)(network, images, labels, 10), images)
        assert Component("fab", "l2", 1, 0)(network, images[:0], labels[:0], 10).shape == (0, 1, 28, 28)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_seed_decides(self, golden, network, seed):
        images, labels = golden["images"][:4], network(golden["images"][:4]).argmax(1)
        runs = [Component("apgd-dlr", "linf", 0.1, s)(network, images, labels, 10) for s in (0, seed)]
        assert torch.equal(*runs) == (seed == 0)


class Rooted(nn.Module):
    """The fixture's network plus a root of zero: the same logits, and gradients of NaN."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + (images - images).square().sum(dim=(1, 2, 3)).sqrt()[:, None]


class TestBrokenGradients:
    @pytest.mark.parametrize("name", [name for name in COMPONENTS if name != "square"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_they_are_refused_instead_of_called_robust(self, golden, network, name, norm):
        images = golden["images"][:3]
        labels = network(images).argmax(1)
        with pytest.raises(ValueError, match=r"gradient of NaN or infinity.*add a small constant"):
            Component(name, norm, 0.3, 0)(Rooted(network).eval(), images, labels, 10)

    def test_square_needs_none(self, golden, network):
        images = golden["images"][:3]
        labels = network(images).argmax(1)
        found = [Component("square", "linf", 0.3, 0)(m, images, labels, 10) for m in (network, Rooted(network).eval())]
        assert torch.equal(*found)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("apgd", "linf", 0.1, 0), "'apgd' is not part of AutoAttack; use one of apgd-ce"),
            (("square", "linfinity", 0.1, 0), "'linfinity' is not part of AutoAttack"),
            (("square", "linf", 0.1, 0, "strong"), "'strong' is not part of AutoAttack"),
            (("square", "linf", -0.1, 0), "must be 0 or more"),
            (("square", "linf", float("nan"), 0), "must be 0 or more"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Component(*arguments)

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setattr(autoattack.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "timm-fsr\[eval\]"'):
            Component("square", "linf", 0.1, 0)
