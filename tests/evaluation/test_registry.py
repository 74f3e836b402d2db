"""Suites by name: what each consists of, what is refused, and the official attacks as the FSR repository runs them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

import timm_fsr.attacks.autoattack
from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.autoattack import VERSIONS
from timm_fsr.attacks.losses import carlini_wagner, cross_entropy
from timm_fsr.attacks.pgd import FGSM, PGD
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.model_checks import ModelCheck, examine
from timm_fsr.evaluation.registry import (
    ENSEMBLE,
    OFFICIAL,
    Stage,
    Suite,
    Target,
    build_attack,
    build_suites,
    check_names,
    expand_names,
)
from timm_fsr.evaluation.suites import adaptive
from timm_fsr.models.weights import model_digest
from timm_fsr.reports.report import STRONG_ATTACKS

pytest.importorskip("pyautoattack")

EPS = 0.1
STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


class Network(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, classes)

    def forward(self, given: Tensor) -> Tensor:
        return self.head(given.flatten(1))


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def labelled(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the classes that the model gives them, but for the last one."""
    with torch.no_grad():
        labels = model(images()).argmax(dim=1)
    labels[-1] = (labels[-1] + 1) % 2
    return images(), labels


def target(classes: int = 10, norm: str = "linf", **sources: nn.Module) -> Target:
    model = Network(classes).eval().requires_grad_(False)
    return Target(model, norm, EPS, 3, examine(model, *labelled(model)), sources)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "attack"),
        [
            ("fgsm", FGSM(eps=EPS)),
            ("pgd20", PGD(eps=EPS, steps=20)),
            ("pgd100x5", PGD(eps=EPS, steps=100, restarts=5)),
            ("apgd50", APGD(eps=EPS, steps=50)),
            ("apgd50x2", APGD(eps=EPS, steps=50, restarts=2)),
            ("cw30", PGD(eps=EPS, steps=30, step_size=0.1 * EPS, random_start=False)),
        ],
    )
    def test_single_attacks(self, name, attack):
        assert name == "cw30" or build_attack(name, "linf", EPS) == attack
        (suite,) = build_suites([name], target())
        assert (suite.name, suite.every_image, suite.note) == (name, True, "")
        assert suite.detail.startswith(repr(attack))

    def test_cw_names_its_loss(self):
        (suite,) = build_suites(["cw30"], target())
        assert suite.detail.endswith("on the loss carlini_wagner")

    def test_aliases_groups_and_doubles(self):
        assert expand_names(["standard", "pgd20", "autoattack", "pgd20"]) == ["autoattack", "pgd20"]
        assert expand_names(["official-fgsm", "official"]) == list(OFFICIAL)
        assert [s.name for s in build_suites(["standard", "autoattack", "square"], target())] == [
            "autoattack",
            "square",
        ]

    @pytest.mark.parametrize("version", VERSIONS)
    def test_autoattack_and_its_versions(self, version):
        (suite,) = build_suites([version], target())
        assert suite.name == ("autoattack" if version == "standard" else version)
        assert [stage.name for stage in suite.stages] == list(VERSIONS[version])
        assert all(f"version='{version}'" in stage.detail and "seed=3" in stage.detail for stage in suite.stages)
        assert not suite.every_image
        assert suite.note == ""

    @pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
    def test_components_alone(self, name):
        (suite,) = build_suites([name], target())
        assert [stage.name for stage in suite.stages] == [suite.name] == [name]
        assert f"Component(name='{name}', norm='linf', eps={EPS}, seed=3, version='standard')" == suite.detail

    def test_transfer_is_one_attack_for_each_source(self):
        suites = build_suites(["transfer"], target(base=Network(), other=Network()))
        assert [(s.name, s.every_image) for s in suites] == [
            ("transfer from base", True),
            ("transfer from other", True),
        ]
        digest = model_digest(Network())[:8]
        assert suites[0].detail == f"{APGD(eps=EPS)!r} by the gradient of base (digest {digest})"

    def test_adaptive_is_a_chain(self):
        (suite,) = build_suites(["adaptive"], target(base=Network()))
        assert [stage.name for stage in suite.stages] == [
            "apgd-ce",
            "apgd-dlr",
            "apgd-targeted",
            "transfer from base",
            "square",
        ]
        assert not suite.every_image

    def test_adaptive_does_not_repeat_what_autoattack_has_done(self):
        standard, adaptive = build_suites(["standard", "adaptive"], target())
        assert [stage.name for stage in adaptive.stages if stage.reuse] == ["square"]
        assert adaptive.stages[-1].detail == standard.stages[-1].detail
        assert not any(stage.reuse for stage in standard.stages)  # the reference's result, whatever ran before

    def test_what_is_no_weak_attack(self):
        for name in STRONG_ATTACKS:
            check_names([name], "linf", EPS)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pdg20", "unknown attack 'pdg20'; did you mean 'pgd20'"),
            ("standart", "unknown attack 'standart'; did you mean 'standard'"),
            ("adaptve", "unknown attack 'adaptve'; did you mean 'adaptive'"),
            ("apgdt", "unknown attack 'apgdt'; did you mean 'apgd-t'"),
            ("pgd", "unknown attack 'pgd'; did you mean 'pgd20'"),
            ("pgd0", "unknown attack 'pgd0'"),
            ("pgd020", "unknown attack 'pgd020'"),
            ("pgd20x0", "unknown attack 'pgd20x0'"),
            ("cw30x2", "unknown attack 'cw30x2'; did you mean 'cw30'"),
            ("official-pgd50", "unknown attack 'official-pgd50'"),
            ("official-apgd20", "unknown attack 'official-apgd20'"),
            ("PGD20", "unknown attack 'PGD20'"),
            ("", "unknown attack ''"),
            ("transfer", "needs other models to transfer from; name some"),
        ],
    )
    def test_unknown_names(self, name, message):
        for call in (
            lambda: check_names(["fgsm", name], "linf", EPS, sources=False),
            lambda: evaluate(Network(), [], attacks=["fgsm", name], eps=EPS),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_a_string_in_place_of_a_list(self):
        with pytest.raises(ValueError, match=r"'pgd20' is one name where a list belongs; use \['pgd20'\]"):
            check_names("pgd20", "linf", EPS)

    @pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw30", "apgd50", "official"])
    def test_l1_is_for_autoattack_alone(self, name):
        with pytest.raises(ValueError, match=r"has no L1 ball; use AutoAttack \('standard'\)"):
            check_names([name], "l1", EPS)

    @pytest.mark.parametrize("name", ["adaptive", "transfer"])
    def test_nor_is_it_for_adaptive_attacks(self, name):
        with pytest.raises(ValueError, match=f"'{name}' has no L1 ball"):
            check_names([name], "l1", EPS)

    @pytest.mark.parametrize("name", ["standard", "plus", "rand", "square"])
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_autoattack_has_three_norms(self, name, norm):
        check_names([name], norm, EPS)
        (suite,) = build_suites([name], target(norm=norm))
        assert f"norm='{norm}'" in suite.detail

    @pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw30", "apgd50", "standard", "adaptive", "transfer"])
    def test_unknown_norms_and_negative_radii(self, name):
        with pytest.raises(ValueError, match="l3'"):
            check_names([name], "l3", EPS)
        with pytest.raises(ValueError, match="must be 0 or more"):
            check_names([name], "linf", -EPS)

    @pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw30", "apgd50", "official", "standard", "adaptive"])
    def test_a_radius_of_0_is_a_ball(self, name):
        check_names([name], "linf", 0)

    def test_without_the_extra_package(self, monkeypatch):
        monkeypatch.setattr(timm_fsr.attacks.autoattack.importlib.util, "find_spec", lambda name: None)
        for name in ("standard", "plus", "rand", "square", "adaptive"):
            with pytest.raises(ModuleNotFoundError, match=r'pip install "timm-fsr\[eval\]"'):
                check_names([name], "linf", EPS)
        check_names(["fgsm", "pgd20", "apgd50", "cw30", "official", "transfer"], "linf", EPS)


class TestFewClasses:
    @pytest.mark.parametrize(
        ("classes", "kept", "notes"),
        [
            (2, ["apgd-ce", "fab-t", "square"], ["apgd-t is left out, its loss needs 4", "fab-t tries 1 target"]),
            (3, ["apgd-ce", "fab-t", "square"], ["apgd-t is left out, its loss needs 4", "fab-t tries 2 target"]),
            (4, STANDARD, ["apgd-t tries 3 target class(es) instead of 9", "fab-t tries 3 target"]),
            (10, STANDARD, []),
        ],
    )
    def test_what_differs_is_noted(self, classes, kept, notes):
        (suite,) = build_suites(["standard"], target(classes))
        assert [stage.name for stage in suite.stages] == kept
        assert all(note in suite.note for note in notes)
        assert suite.note.startswith(f"autoattack: non-standard AutoAttack, for {classes} classes") == bool(notes)
        assert bool(suite.note) == bool(notes)

    @pytest.mark.parametrize(("name", "classes"), [("apgd-dlr", 2), ("apgd-t", 3)])
    def test_a_component_of_which_nothing_is_left(self, name, classes):
        with pytest.raises(ValueError, match=f"'{name}' needs more than the model's {classes} classes; use another"):
            build_suites([name], target(classes))

    def test_the_report_says_so(self):
        model = Network(2)
        report = evaluate(model, labelled(model), eps=EPS, attacks=["fab-t"])
        assert report.conditions["autoattack_nonstandard"].startswith("fab-t: non-standard AutoAttack, for 2 classes")
        assert report.conditions["autoattack"].startswith("pyautoattack ")
        assert "fab-t: non-standard AutoAttack, for 2 classes: fab-t tries 1 target" in report.notes[0]

    @pytest.mark.parametrize("classes", [2, 3, 4, 10])
    def test_adaptive_chains_have_a_loss_for_any_number(self, classes, monkeypatch):
        monkeypatch.setattr(adaptive, "STEPS", 3)
        (suite,) = build_suites(["adaptive"], target(classes))
        second = "apgd-margin" if classes == 2 else "apgd-dlr"
        assert [stage.name for stage in suite.stages] == ["apgd-ce", second, "apgd-targeted", "square"]
        model = Network(classes)
        for stage in suite.stages[:3]:
            found = stage.run(model, *labelled(model), torch.Generator())
            assert float((found - images()).abs().max()) <= EPS + 1e-6


class TestOfficial:
    """What the FSR repository tests with: FGSM, PGD-20, PGD-100 and C&W-30 in steps of 0.1 eps from the image."""

    def test_the_attacks(self):
        assert [suite.name for suite in build_suites(["official"], target())] == list(OFFICIAL)
        assert build_suites(["official-fgsm"], target())[0].detail == repr(FGSM(eps=EPS))
        for name, steps in (("pgd20", 20), ("pgd100", 100), ("cw30", 30)):
            expected = PGD(eps=EPS, steps=steps, step_size=0.1 * EPS, random_start=False)
            assert build_suites([f"official-{name}"], target())[0].detail.startswith(repr(expected))

    @pytest.mark.parametrize(
        ("name", "steps", "loss"),
        [("official-pgd20", 20, cross_entropy), ("official-cw30", 30, carlini_wagner), ("cw7", 7, carlini_wagner)],
    )
    def test_by_hand(self, name, steps, loss):
        """The sign of the loss's gradient, 0.1 eps at a time, clipped to the ball and to [0, 1]."""
        model = Network().eval().requires_grad_(False)
        given, labels = labelled(model)
        point = given.clone()
        for _ in range(steps):
            point.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(model(point), labels).sum(), point)
            point = (point.detach() + 0.1 * EPS * gradient.sign()).clamp(given - EPS, given + EPS).clamp(0, 1)
        (suite,) = build_suites([name], target())
        torch.testing.assert_close(suite.stages[0].run(model, given, labels, torch.Generator()), point)

    def test_the_ensemble_is_the_intersection(self):
        model = Network()
        report = evaluate(model, labelled(model), eps=0.01, attacks=["official", "pgd20"])
        assert list(report.correct) == ["clean", *OFFICIAL, "pgd20", ENSEMBLE]
        expected = torch.stack([report.correct[name] for name in ("clean", *OFFICIAL)]).all(dim=0)
        assert torch.equal(report.correct[ENSEMBLE], expected)
        assert report.attacks[ENSEMBLE] == "right clean and under each of the official attacks"

    def test_three_of_four_are_no_ensemble(self):
        model = Network()
        report = evaluate(model, labelled(model), eps=0.01, attacks=list(OFFICIAL[:3]))
        assert ENSEMBLE not in report.correct

    def test_with_eps_0_they_give_the_images_back(self):
        model = Network()
        report = evaluate(model, labelled(model), eps=0, attacks=["official"])
        assert set(report.accuracy.values()) == {7 / 8}


class TestOwnSuites:
    def test_they_pass_through_beside_names(self):
        model = Network()
        pair = labelled(model)
        black = Suite("black", (Stage("black", "all black", lambda m, x, y, g: torch.zeros_like(x)),), every_image=True)
        report = evaluate(model, pair, eps=1, attacks=[black, "fgsm"])
        expected = model(torch.zeros_like(pair[0])).argmax(dim=1) == pair[1]
        assert torch.equal(report.correct["black"], expected)
        assert report.attacks == {"black": "all black", "fgsm": repr(FGSM(eps=1.0))}

    def test_a_chain_says_its_stages(self):
        stages = tuple(Stage(name, f"does {name}", lambda m, x, y, g: x) for name in ("a", "b"))
        assert Suite("both", stages).detail == "a: does a; b: does b"

    def test_what_a_suite_is_built_for_is_plain_data(self):
        assert [f.name for f in fields(Target)] == ["model", "norm", "eps", "seed", "model_check", "sources"]
        assert isinstance(target().model_check, ModelCheck)


@pytest.mark.parametrize("eps", [8.0, 1.5])
def test_an_eps_in_255ths_is_noticed(eps):
    """8 for 8/255 gives 0 % and looks like a result."""
    with pytest.raises(ValueError, match=rf"more than pixels in \[0, 1\] can change by; .* write {eps:g}/255"):
        check_names(["fgsm"], "linf", eps)
    check_names(["fgsm"], "l2", eps)
