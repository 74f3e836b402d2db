"""The page shows every number of a report, needs no other file, and escapes what it is given."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from support.hostile import HOSTILE

from timm_fsr.reports.comparison import mcnemar
from timm_fsr.reports.page import Entry, render_page
from timm_fsr.reports.report import Report

NASTY = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIDENCE: dict[str, Any] = {
    "images": 60,
    "eps": {"eps": [0.0, 8 / 255, 64 / 255], "accuracy": [0.9, 0.4, 0.0]},
    "steps": {"steps": [10, 1000], "accuracy": [0.41, 0.39]},
    "restarts": {"restarts": [1, 10], "accuracy": [0.42, 0.4]},
    "noise": {"clean": 0.9, "uniform": 0.871, "corners": 0.861, "pgd": 0.411},
    "square": {"white_box": 0.401, "after_square": 0.391, "broken_by_square_only": 0.01},
    "noise_on": {"clean": 0.881, "pgd_eot": 0.371},
    "surface": [{"image": 3, "gradient": [-1, 1], "random": [-1, 1], "margin": [[-1.0, -1.0], [1.0, 1.0]]}],
    "masks": [
        {"site": "layer4", "edges": [0, 0.5, 1], "clean": [0.3, 0.7], "attacked": [0.4, 0.6], "saturated": 0.123}
    ],
    "zero_gradients": {"images": 0.0, "mask_elements": 0.0456},
    "repeatable": {"logits": True, "attack": True},
    "findings": [{"level": "warning", "text": "suspect masking"}, {"level": "ok", "text": "all is well"}],
}
BINS = {"confidence": [None, 0.8], "accuracy": [None, 0.7], "count": [0, 8]}
CALIBRATION = {"clean": {"accuracy": 0.75, "brier_score": 0.1234, "bins": BINS}}
DOT = "data:image/png;base64,AAAA"
EXAMPLES = {
    "attack": "PGD(steps=20)",
    "eps": 0.1,
    "magnification": 5.0,
    "mask_range": [0.1, 0.9],
    "difference_range": 0.2,
    "images": [
        {
            "truth": "cat",
            "clean_class": "cat",
            "attacked_class": "dog",
            "clean": DOT,
            "perturbation": DOT,
            "attacked": DOT,
            "masks": [{"site": "layer4", "clean": DOT, "attacked": DOT, "difference": DOT}],
        }
    ],
}


def flags(text: str) -> torch.Tensor:
    return torch.tensor([flag == "1" for flag in text])


def report(fgsm: str = "11100000", **changes: Any) -> Report:
    values: dict[str, Any] = {
        "correct": {"clean": flags("11111100"), "fgsm": flags(fgsm)},
        "attacks": {"fgsm": "FGSM(eps=0.1)"},
        "norm": "linf",
        "eps": 8 / 255,
        "seed": 0,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]),
        "conditions": {
            "data": "images",
            "data_fingerprint": "abc",
            "classes": ["cat", "dog", "eel"],
            "versions": {"torch": "9"},
        },
    }
    return Report(**{**values, **changes})


def test_attacks_are_told_in_words():
    detail = "PGD(norm='linf', eps=0.03137254901960784, steps=20, step_size=None, start_noise=None, restarts=1)"
    conditions = {"training": f"AT(label_smoothing=0.1), {detail}, 5 epochs"}
    found = report(attacks={"fgsm": detail}, conditions=conditions)
    text = words(render_page([Entry("x", found, {**EXAMPLES, "attack": detail})]))
    assert "PGD (20 steps)" in text, "in the ball of the report, which stands above"
    assert "Attacked by PGD (Linf 8/255, 20 steps)." in text
    assert "AT (label smoothing 0.1), PGD (Linf 8/255, 20 steps), 5 epochs" in text
    assert "None" not in text
    assert "=" not in text


class Skeleton(HTMLParser):
    """Which tags and attributes there are, and every address that would be fetched or followed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.kinds: set[str] = set()
        self.addresses: set[str | None] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds |= {f"<{tag}", *(name for name, _ in attrs)}
        self.addresses |= {value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")}


def named(text: str) -> str:
    """A page of two models on which every name and note is this text."""
    evidence = {
        **EVIDENCE,
        "findings": [{"level": "ok", "text": text}],
        "masks": [{**EVIDENCE["masks"][0], "site": text}],
    }
    image = {**EXAMPLES["images"][0], "truth": text, "clean_class": text, "attacked_class": text}
    conditions = {"data": text, "classes": [text] * 3, "model": text, text: text, "versions": {text: text}}
    found = report(
        attacks={"fgsm": text}, stages={"fgsm": {text: flags("11100000")}}, notes=(text,), conditions=conditions
    )
    found = dataclasses.replace(found, evidence=evidence, corruptions={text: {"1": 0.5}})
    return render_page([Entry(text, found, {**EXAMPLES, "attack": text, "images": [image]})] * 2)


def test_no_name_adds_anything_but_words():
    expected = Skeleton(named("x"))
    assert expected.addresses == {DOT, "#comparison", "#model-1", "#model-2"}
    for text in (" ".join(HOSTILE), HOSTILE[1], *(text for text in HOSTILE if "\x00" in text)):
        found = Skeleton(named(text))
        assert found.kinds == expected.kinds, text
        assert found.addresses == expected.addresses, text


def test_pictures_are_in_the_page_or_nowhere():
    image = {**EXAMPLES["images"][0], "clean": "https://evil.example/x.png", "attacked": "javascript:alert(1)"}
    page = render_page([Entry("x", report(), {**EXAMPLES, "images": [image]})])
    assert "evil" not in page
    assert "javascript" not in page
    assert "default-src 'none'; img-src data:" in page


@pytest.mark.parametrize(("norm", "shown"), [("linf", "6.25/255"), ("l2", "0.02451")])
def test_radii_on_the_axis_are_short(norm, shown):
    eps = {"eps": [0.0, 6.25 / 255, 25 / 255], "accuracy": [0.9, 0.4, 0.0]}
    page = render_page([Entry("x", report(norm=norm, evidence={"images": 5, "eps": eps}))])
    assert f">{shown}</text>" in page
    assert "0.0245098" not in page


def full() -> Report:
    stages = {"adaptive": {"first": flags("11110000"), "square": flags("11000000")}}
    correct = {"clean": flags("11111100"), "adaptive": flags("11000000")}
    return report(
        correct=correct,
        stages=stages,
        attacks={"adaptive": "first: x; square: y"},
        notes=("a note",),
        evidence=EVIDENCE,
        calibration=CALIBRATION,
        corruptions={"motion_blur": {"1": 0.91, "5": 0.31}},
    )


class Checker(HTMLParser):
    """Finds unbalanced tags, what would be fetched, and headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            v or "" for k, v in attributes if k in ("src", "href") and not (v or "").startswith(("data:", "#"))
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without its beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch("h[1-4]", self.open[-1]):
            self.headings.append(data)


def words(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


class TestOneModel:
    def test_every_part_is_there_with_its_numbers(self):
        page = render_page([Entry("my model", full(), EXAMPLES)])
        found = Checker(page)
        assert found.headings == [
            "my model",
            "Attacks",
            "Are the gradients honest?",
            "Weaker and stronger attacks",
            "Loss surface",
            "Masks",
            "Examples",
            "Class by class",
            "Calibration on clean images",
            "Common corruptions",
            "Conditions",
        ]
        text = words(page)
        for number in (
            "25.0 %",
            "75.0 %",
            "87.1 %",
            "86.1 %",
            "39.1 %",
            "88.1 %",
            "37.1 %",
            "12.3 %",
            "4.6 %",
            "0.1234",
            "91.0 %",
            "61.0 %",
        ):
            assert number in text, number
        for phrase in (
            "Linf 8/255",
            "a note",
            "suspect masking",
            "8 images of images",
            "cat ; attacked: dog",
            "versions torch 9",
        ):
            assert phrase in text, phrase
        low, high = full().interval("worst_case")
        assert f"{100 * low:.1f} % \u2013 {100 * high:.1f} %" in text

    def test_stages_say_what_each_broke(self):
        text = words(render_page([Entry("m", full())]))
        assert "after correct newly broken what it does first 50.0 % 2 x square 25.0 % 2 y" in text

    def test_both_figures_of_the_masks_say_what_they_count(self):
        text = words(render_page([Entry("m", full())]))
        assert "within 0.01 of 0 or 1: nearly off or on, clean and attacked images together 12.3 %" in text
        assert "within 0.0001 of 0 or 1: next to no gradient passes the mask, clean images 4.6 %" in text
        older = dataclasses.replace(full(), evidence={**EVIDENCE, "zero_gradients": {"images": 0.0}})
        assert "within 0.0001" not in words(render_page([Entry("m", older)]))

    def test_each_mask_lies_over_its_image(self):
        dots = {name: f"data:image/png;base64,{name}" for name in ("CLEAN", "ATTACKED", "MASK", "OTHER", "CHANGE")}
        mask = {"site": "layer4", "clean": dots["MASK"], "attacked": dots["OTHER"], "difference": dots["CHANGE"]}
        image = {**EXAMPLES["images"][0], "clean": dots["CLEAN"], "attacked": dots["ATTACKED"], "masks": [mask]}
        page = render_page([Entry("m", report(), {**EXAMPLES, "images": [image]})])
        laid = re.findall(
            r'<div class="laid"><img src="[^"]*,(\w+)" alt=""><img src="[^"]*,(\w+)" alt="[^"]+"></div>', page
        )
        assert laid == [("CLEAN", "MASK"), ("ATTACKED", "OTHER"), ("ATTACKED", "CHANGE")]

    def test_every_accuracy_that_is_drawn_has_its_chance(self):
        page = render_page([Entry("m", full())])
        drawn = re.findall(r'<svg class="(?:chart|share-bars)".*?</svg>', page, re.DOTALL)
        masks = [drawing for drawing in drawn if "Mask values" in drawing]
        assert len(masks) == 1, "which have no accuracies"
        for drawing in drawn:
            assert ("chance: 33.3 %" in drawing or "M33.3 -4V14" in drawing) == (drawing not in masks), drawing[:80]
        assert len(drawn) == 3 + 1 + 1 + 3 + 1, "curves, masks, calibration, classes, corruptions"
        unknown = dataclasses.replace(full(), labels=None, conditions={})
        assert "guess" not in re.sub(r"<style>.*?</style>", "", render_page([Entry("m", unknown)]), flags=re.DOTALL)

    def test_nothing_is_fetched_and_nothing_runs(self):
        found = Checker(render_page([Entry("m", full(), EXAMPLES), Entry("n", report())]))
        assert found.fetched == []
        assert "script" not in found.tags

    def test_parts_without_data_leave_no_heading(self):
        found = Checker(render_page([Entry("m", report(labels=None))]))
        assert found.headings == ["m", "Attacks", "Conditions"]

    @pytest.mark.parametrize(("name", "warned"), [("fgsm", True), ("autoattack", False), ("adaptive", False)])
    def test_weak_attacks_are_called_an_upper_bound(self, name, warned):
        weak = report(correct={"clean": flags("11"), name: flags("10")}, attacks={name: "x"}, labels=None)
        assert ("is an upper bound: FGSM only; AutoAttack" in render_page([Entry("m", weak)])) == (name == "fgsm")
        assert ("is an upper bound" in render_page([Entry("m", weak)])) == warned

    def test_names_are_escaped(self):
        conditions = {"data": NASTY, "classes": [NASTY, "b", "c"], NASTY: NASTY}
        examples = {**EXAMPLES, "images": [{**EXAMPLES["images"][0], "truth": NASTY}]}
        nasty = report(conditions=conditions, notes=(NASTY,), attacks={"fgsm": NASTY})
        page = render_page([Entry(NASTY, nasty, examples), Entry(NASTY, nasty)])
        assert "<script" not in page
        Checker(page)

    def test_of_a_thousand_classes_the_best_and_the_worst_are_shown(self):
        labels = torch.arange(2000) % 1000
        right = labels < 500
        many = report(correct={"clean": right}, attacks={}, labels=labels, conditions={})
        rows = re.findall(r'<tr><th scope="row">(\d+)</th>', render_page([Entry("m", many)]))
        assert len(rows) == 20

    def test_no_report(self):
        with pytest.raises(ValueError, match="no report to show"):
            render_page([])


class TestSideBySide:
    def test_gains_and_losses_are_those_counted_by_hand(self):
        one, other = report("11100000"), report("10011100")
        assert mcnemar(one, other, "worst_case") == (3, 2, False)
        text = words(render_page([Entry("one", one), Entry("other", other)]))
        assert (
            "In the worst case other is +12.5 points against one: 3 images gained, 2 lost, no more than chance" in text
        )
        assert "fgsm 37.5 %" in text
        assert "50.0 % +12.5" in text

    def test_a_clear_difference(self):
        many = {"clean": flags("1" * 40), "fgsm": flags("1" * 40)}
        none = {"clean": flags("1" * 40), "fgsm": flags("0" * 40)}
        reports = [report(correct=correct, labels=None) for correct in (none, many)]
        assert mcnemar(*reports, "fgsm") == (40, 0, True)

    @pytest.mark.parametrize(
        ("changes", "warning"),
        [
            ({"eps": 0.5}, "The threat models differ"),
            ({"conditions": {"data_fingerprint": "other"}}, "tried on different images"),
            ({"conditions": {}}, "tried on other images, so single images cannot be compared"),
            ({"correct": {"clean": flags("11111100")}}, "Not all attacks were run on all models"),
        ],
    )
    def test_what_cannot_be_compared_is_said(self, changes, warning):
        assert warning in words(render_page([Entry("a", report()), Entry("b", report(**changes))]))

    def test_unequal_budgets_are_said(self):
        def trained(layer: str | None, ema_decay: float, data: str = "a") -> Report:
            recipe = {"model": {"name": "resnet18", "layer": layer}, "optim": {"ema_decay": ema_decay}}
            return report(conditions={"data_fingerprint": "1", "recipe": recipe, "training_data": data})

        def page(*reports: Report) -> str:
            return words(render_page([Entry(f"model {index}", one) for index, one in enumerate(reports)]))

        assert "trained differently" not in page(trained(None, 0), trained("fsr", 0))
        assert "trained differently" not in page(report(), trained("fsr", 0.9))  # the first one does not say
        assert "model 0 and model 1 were trained differently, the layer aside: optim.ema_decay (0 and 0.9)." in page(
            trained(None, 0), trained("fsr", 0.9)
        )
        short, long = ({"data_fingerprint": "1", "training": f"AT(), {epochs} epochs"} for epochs in (5, 50))
        assert "trained differently, the layer aside: training (AT, 5 epochs and AT, 50 epochs)." in page(
            report(conditions=short), report(conditions=long)
        )
        assert "trained differently, the layer aside: training data (a and b)." in page(
            trained(None, 0), trained(None, 0, "b")
        )

    def test_curves_are_drawn_together(self):
        page = render_page([Entry("a", full()), Entry("b", full())])
        charts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
        lines = [chart.count("stroke-width: 2.5") for chart in charts]
        alone = render_page([Entry("a", full()), Entry("b", report())])
        assert alone.count('<svg class="chart"') == 3 + 1 + 1, "one line is no comparison"
        assert lines[:3] == [4, 4, 4], "two in the chart, two in the legend"
        assert lines.count(1) == 2 * 3, "each on its own"


class TestCollapse:
    """A model that always answers the same keeps all of its few right answers under attack: that is no robustness."""

    def entry(self, title: str, right: torch.Tensor) -> Entry:
        outcomes = {"clean": right, "autoattack": right}
        labels = torch.arange(200) % 2
        conditions = {"data_fingerprint": "abc", "classes": ["cat", "dog"]}
        found = report(correct=outcomes, labels=labels, attacks={"autoattack": "x"}, conditions=conditions)
        notes = ("a note", *filter(None, [found.collapsed]))
        return Entry(title, dataclasses.replace(found, notes=notes))

    def test_it_stands_at_the_top_once(self):
        text = html.unescape(words(render_page([self.entry("m", torch.arange(200) % 2 == 0)])))
        said = "the model does not work: it answers the class 'cat' for nearly all images"
        assert text.count(f"Robust accuracy says nothing here: {said}") == 1
        assert text.count(said) == 1
        assert text.index(said) < text.index("a note")

    @pytest.mark.parametrize("collapsed_first", [True, False])
    def test_it_is_ranked_against_nothing(self, collapsed_first):
        works = torch.arange(200) < 120
        pair = [self.entry("collapsed", torch.arange(200) % 2 == 0), self.entry("works", works)]
        page = render_page(pair if collapsed_first else pair[::-1])
        text = words(page)
        assert "collapsed: the model does not work" in text
        assert "are not compared: collapsed cannot classify" in text
        assert "McNemar" not in text
        assert '<span class="points">' not in page

    def test_two_that_work_are_compared(self):
        page = render_page([self.entry(name, torch.arange(200) < right) for name, right in (("a", 120), ("b", 150))])
        assert "McNemar" in page
        assert page.count('<span class="points">') == 3
