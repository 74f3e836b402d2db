"""Whatever names and notes say, a card has the same headings, tables and code, and shows them as they were written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.hostile import HOSTILE

import timm_fsr
from timm_fsr.hub.bundle import Bundle, read_bundle
from timm_fsr.hub.card import CardOptions, check_card, render_card
from timm_fsr.hub.markdown import code, escape, one_line
from timm_fsr.reports.report import Report

REPO = "somebody/tiny"
AUTOLINK = re.compile(r"[a-z]+://|www\.|[\w.+-]+@[\w-]+\.\w", re.IGNORECASE)  # GitHub's, in text


def tokens(text: str) -> list[Token]:
    """As GitHub and the Hub read it, raw HTML included."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [inner for token in parser.parse(text) for inner in (token, *(token.children or ()))]


def skeleton(text: str) -> list[tuple[str, str, str]]:
    """All that acts; text, and code inside it, do not."""
    shown = ("text", "text_special", "code_inline", "inline")
    return [(t.type, t.tag, t.content if t.type == "fence" else "") for t in tokens(text) if t.type not in shown]


def words(text: str) -> str:
    return "".join(t.content for t in tokens(text) if t.type in ("text", "text_special", "code_inline"))


def texts(text: str) -> list[str]:
    """What a renderer looks through for addresses: runs of text without code."""
    runs = [""]
    for token in tokens(text):
        if token.type in ("text", "text_special"):
            runs[-1] += token.content
        else:
            runs.append("")
    return runs


def placed(text: str) -> list[str]:
    return [f"Before {text} after.", f"# {text}", f"- {text}", text, f"| a |\n| --- |\n| {text} |", f"({text}[a])(b)"]


@pytest.mark.parametrize("text", HOSTILE)
def test_it_is_text_wherever_it_stands(text):
    for found, plain in zip(placed(escape(text)), placed("x" if text else ""), strict=True):
        assert skeleton(found) == skeleton(plain), found
        assert one_line(text) in words(found)
        assert not any(AUTOLINK.search(run) for run in texts(found)), found


def test_pieces_side_by_side_are_text_too():
    for index, first in enumerate(HOSTILE):
        for second in (HOSTILE[index - 1], HOSTILE[index - 7], HOSTILE[index - 19]):
            line = f"a {escape(first)}, {escape(second)}{escape(first)} b"
            assert skeleton(line) == skeleton("a"), line
            assert not any(AUTOLINK.search(run) for run in texts(line)), line


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_code(text):
    found = tokens(f"a {code(text)} b")
    assert [token.type for token in found if token.type == "code_inline"] == ["code_inline"] * bool(text)
    assert skeleton(f"a {code(text)} b") == skeleton("a")
    assert one_line(text) in words(f"a {code(text)} b")


@pytest.mark.parametrize(
    "text", ["resnet18_cifar_fsr.at", "AT(label_smoothing=0.0), 25 epochs", "-0.5", "3.5", "71.6 %"]
)
def test_usual_names_stay_as_they_are(text):
    assert escape(text) == text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("resnet_tiny_cifar_fsr", num_classes=4, fsr_hidden=4)
    return timm_fsr.save_pretrained(model, tmp_path_factory.mktemp("saved"), license="mit")


def bundle(folder: Path, given: str, *, recipe: bool = True) -> Bundle:
    """A model whose every name and note is the same text."""
    flags = torch.tensor([True, True, False])
    named = given.replace("[", "(").replace("]", ")")  # brackets would end the name of a data set
    report = Report(
        correct={"clean": flags, "autoattack": flags, "adaptive": flags, given: flags},
        stages={"adaptive": {given: flags}, "autoattack": {given: flags}},
        attacks={"adaptive": given},
        norm="linf",
        eps=0.1,
        seed=0,
        notes=(given,),
        evidence={"findings": [{"level": "warning", "text": given}, {"level": given, "text": given}]},
        conditions={
            "data": f"{named}[test] {given}",
            "training_data": f"{named}[train] {given}",
            "training": given,
            "checkpoint_rule": given,
            "checkpoint_epoch": given,
            "training_seconds": 1.0,
            "training_hardware": given,
            "classes": [given] * 4,
        },
    )
    ours = {"model": {"name": f"hf-hub:{given}"}, "objective": {"name": given}, "data": {"extra_source": given}}
    notes = {**ours, "seed": given, "mixed_precision": given} if recipe else {given: given, "other": [given]}
    report.save(folder / "report.json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(notes, allow_unicode=True), encoding="utf-8")
    found = read_bundle(folder)
    config: dict[str, Any] = {**found.config, "label_names": [given, given]}
    config["model_args"] = {**config["model_args"], "at": [given], f"{given}_noise": 1.0}
    config["timm_fsr"] = {**config["timm_fsr"], "version": given, "dtype": given}
    return Bundle(config, found.report, found.recipe)


@pytest.mark.parametrize("recipe", [True, False])
def test_a_card_of_hostile_names(saved, recipe):
    """Each text in every place at once: nothing but words differs from the card of a harmless one."""
    plain = render_card(bundle(saved, "x", recipe=recipe), REPO, tag="x")
    expected, head = skeleton(ModelCard(plain).text), metadata(plain)
    for given in filter(None, HOSTILE):
        found = bundle(saved, given, recipe=recipe)
        card = render_card(found, REPO, tag=given)
        check_card(card, found, REPO)
        body = ModelCard(card).text
        assert skeleton(body) == expected, given
        assert one_line(given) in words(body)
        assert not any(AUTOLINK.search(run) for run in texts(body)), given
        assert metadata(card).keys() == head.keys(), given
        assert metadata(card)["license"] == "mit"


def metadata(card: str) -> dict[str, Any]:
    """By the first line that can end them, as every reader has it."""
    assert card.startswith("---\n")
    return yaml.safe_load(re.split(r"^---", card, flags=re.MULTILINE)[1])


class TestCheck:
    """A card by other hands may show the names as they are."""

    @pytest.mark.parametrize("given", ["<script>x()</script>", "[x](https://evil.example)", "x\n# heading", "```\nx"])
    def test_a_name_that_acts_is_refused(self, saved, given):
        found = bundle(saved, given)
        card = render_card(found, REPO)
        check_card(f"{card}\nMore *words* with [a link](https://a.org).\n", found, REPO)
        with pytest.raises(ValueError, match=r"from the model's files, so that it acts as Markdown; make it"):
            check_card(f"{card}\nClasses: {given}\n", found, REPO)

    def test_a_name_of_a_repository_has_one_line(self, saved):
        with pytest.raises(ValueError, match=r"is no name of a repository .*write user/name"):
            render_card(bundle(saved, "x"), f"{REPO}\n", CardOptions())
