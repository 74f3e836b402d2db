"""Attacks and objectives in words: every one that the package has, and nothing that is no Python call."""

from __future__ import annotations

import pytest

from timm_fsr.attacks.autoattack import COMPONENTS
from timm_fsr.attacks.base import ATTACKS, attack_fields
from timm_fsr.attacks.pgd import PGD
from timm_fsr.reports.wording import in_words, stages_in_words
from timm_fsr.training.objectives.base import OBJECTIVES

PYTHON = ("=", "None", "True", "False", "_", "'")


@pytest.mark.parametrize("name", ATTACKS.names())
def test_every_attack_is_told_without_python(name):
    cls = ATTACKS[name]
    given = {"eps": 8 / 255} if "eps" in attack_fields(cls) else {}
    told = in_words(repr(cls(**given)))
    assert not [sign for sign in PYTHON if sign in told], told
    assert told.startswith(cls.__name__)
    if given:
        assert "8/255" in told


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_is_told_without_python(name):
    told = in_words(repr(OBJECTIVES[name]()))
    assert not [sign for sign in PYTHON if sign in told], told


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_part_of_autoattack_is_told(name):
    told = in_words(f"Component(name={name!r}, norm='l2', eps=0.5, seed=3, version='plus')")
    assert told.startswith("AutoAttack's ")
    assert told.endswith(" (L2 0.5, seed 3, plus version)")
    assert not [sign for sign in ("=", "Component", "_") if sign in told]


@pytest.mark.parametrize(
    ("detail", "told"),
    [
        (repr(PGD(eps=0.1, steps=20)), "PGD (Linf 0.1, 20 steps, random start)"),
        (
            repr(PGD(norm="l2", eps=0.5, steps=1, step_size=0.0123456789, random_start=False)),
            "PGD (L2 0.5, 1 step, step size 0.01235, no random start)",
        ),
        (repr(PGD(eps=1 / 255, steps=20, restarts=5)), "PGD (Linf 1/255, 20 steps, random start, 5 restarts)"),
        ("APGD(steps=100) on the loss ce", "APGD (100 steps) on the cross-entropy loss"),
        ("AT(), PGD(eps=0.1), 5 epochs", "AT, PGD (eps 0.1), 5 epochs"),
        ("Outer(inner=Inner(eps=0.1), most=inf)", "Outer (inner Inner (eps 0.1), most inf)"),
        ("FMN(norm='linf', steps=100), within eps 0.1", "FMN (Linf, 100 steps), within eps 0.1"),
    ],
)
def test_as_a_reader_would_say_it(detail, told):
    assert in_words(detail) == told


def test_the_ball_that_the_reader_knows_is_not_named_again():
    assert in_words("PGD(norm='linf', eps=0.1, steps=20)", ("linf", 0.1)) == "PGD (20 steps)"
    for threat in (("l2", 0.1), ("linf", 0.2)):
        assert in_words("PGD(norm='linf', eps=0.1, steps=20)", threat) == "PGD (Linf 0.1, 20 steps)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "right under each",
        "f(x) and (a, b)",
        "PGD(",
        "PGD(steps=)",
        "<b onclick='x(1)'>",
        "f(**{'a': 1})",
        "a(" * 5000,
    ],
)
def test_what_is_no_python_stays(text):
    assert in_words(text) == text


def test_each_stage_is_told_of_its_own():
    detail = "a: PGD(steps=2); b: c; also: text; joint 1: PGD(steps=3) on the loss dlr"
    assert stages_in_words(detail, ["a", "b", "joint 1"]) == {
        "a": "PGD (2 steps)",
        "b": "c; also: text",
        "joint 1": "PGD (3 steps) on the DLR loss",
    }


@pytest.mark.parametrize("names", [[], ["b"], ["a", "c"]])
def test_stages_that_are_not_written_so_are_not_told(names):
    assert stages_in_words("a: x; b: y", names) == {}
