"""Report pages in a real browser: narrow and wide, light and dark, one model and several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.browser import shown
from support.tiny import images, labels, tiny_resnet, with_fsr

import timm_fsr
from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation.examples import draw_examples
from timm_fsr.reports.page import Entry, render_page
from timm_fsr.reports.report import Report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NARROW, WIDE = 400, 1280
TITLES = ("resnet_tiny_cifar, none (own place), seed 0", "resnet_tiny_cifar_fsr." + 60 * "x", "c", "d", "e")

# What is wider than the window, or than what it lies in; what only screen readers see is no matter.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(e => !e.closest(".hidden, thead, svg, summary")
  && (e.getBoundingClientRect().right > innerWidth + 1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0))
  .map(e => e.outerHTML.slice(0, 80))"""
PLACES = """cells => cells.map(cell => { const at = cell.getBoundingClientRect();
  return {left: at.left, right: at.right, top: at.top, bottom: at.bottom, text: cell.innerText}; })"""
# The ratio of WCAG between text and what lies behind it.
CONTRAST = """texts => { const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...texts.map(text => { const style = getComputedStyle(text);
    const ink = light(text.closest("svg") ? style.fill : style.color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); })); }"""


@pytest.fixture(scope="module")
def report() -> Report:
    """A real one, which has every part."""
    folder = files("timm_fsr") / "models/embedded/resnet_tiny_cifar_fsr.at_fashion_mnist"
    return timm_fsr.Report.load(Path(str(folder)) / "report.json")


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    names = [f"class {index}" for index in range(10)]
    return draw_examples(with_fsr(tiny_resnet()).eval(), images(8), labels(8), names, PGD(eps=0.1, steps=1))


@pytest.fixture(scope="module")
def pages(report: Report, examples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pages by the number of models on them."""
    folder = tmp_path_factory.mktemp("pages")
    short = dataclasses.replace(report, evidence={}, calibration={})  # quickly drawn
    entries = [Entry(TITLES[0], report, examples), Entry(TITLES[1], report), *(Entry(t, short) for t in TITLES[2:])]
    for count in (1, 2, 5):
        (folder / f"{count}.html").write_text(render_page(entries[:count]), encoding="utf-8")
    return {count: folder / f"{count}.html" for count in (1, 2, 5)}


def places(page: Page, selector: str) -> list[dict[str, Any]]:
    return page.eval_on_selector_all(selector, PLACES)


@pytest.mark.parametrize(("count", "width"), [(1, 320), (2, NARROW), (2, WIDE), (5, NARROW), (5, WIDE)])
def test_nothing_is_wider_than_the_screen(browser: Browser, pages: dict[int, Path], count: int, width: int) -> None:
    with shown(browser, pages[count], width=width) as page:
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width


def lines(found: Sequence[dict[str, Any]]) -> int:
    """On how many lines things stand."""
    return len({round(place["top"]) for place in found})


@pytest.mark.parametrize(("count", "width", "stacked"), [(2, WIDE, False), (2, NARROW, True), (5, NARROW, True)])
def test_models_stack_on_narrow_screens(
    browser: Browser, pages: dict[int, Path], count: int, width: int, stacked: bool
) -> None:
    with shown(browser, pages[count], width=width) as page:
        cells = places(page, "#comparison tbody tr:first-child td")
        assert len(cells) == count
        assert lines(cells) == (count if stacked else 1)
        assert all(0 <= cell["left"] < cell["right"] <= width for cell in cells), "each is on the screen"
        assert [title in cell["text"] for title, cell in zip(TITLES, cells, strict=False)] == [stacked] * count
        assert [place["bottom"] - place["top"] > 2 for place in places(page, "#comparison thead")] == [not stacked]
        assert all("83.7 %" in cell["text"] for cell in cells)


def test_many_models_stand_in_columns_that_fit(browser: Browser, pages: dict[int, Path]) -> None:
    with shown(browser, pages[5], width=WIDE) as page:
        cells = places(page, "#comparison tbody tr:first-child td")
        assert all(title in cell["text"] for title, cell in zip(TITLES, cells, strict=True))
        assert 1 < lines(cells) < 5


def test_dark_is_dark_and_both_can_be_read(browser: Browser, pages: dict[int, Path]) -> None:
    papers = {}
    for scheme in ("light", "dark"):
        with shown(browser, pages[2], scheme=scheme) as page:
            papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert page.eval_on_selector_all("h1, p:not(.caution), td, th, dt, dd, li span", CONTRAST) >= 4.5
            assert page.eval_on_selector_all(".chart text", CONTRAST) >= 4.5
            assert page.eval_on_selector_all("h1, tbody th[scope=row]", CONTRAST) >= 7
    light, dark = (sum(map(int, papers[scheme][4:-1].split(", "))) for scheme in ("light", "dark"))
    assert light > 700
    assert dark < 100


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_masks_lie_over_their_images(browser: Browser, pages: dict[int, Path], width: int) -> None:
    with shown(browser, pages[1], width=width) as page:
        under, over = places(page, ".laid img:first-child"), places(page, ".laid img:last-child")
        assert len(under) == 6 * 3
        for one, other in zip(under, over, strict=True):
            for side in ("left", "right", "top", "bottom"):
                assert one[side] == pytest.approx(other[side], abs=1)
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.eval_on_selector(".laid img:last-child", "over => getComputedStyle(over).opacity") == "0.62"


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_text_in_charts_can_be_read(browser: Browser, pages: dict[int, Path], width: int) -> None:
    with shown(browser, pages[2], width=width) as page:
        found = [text for text in places(page, ".chart text") if text["bottom"] > text["top"]]
        assert len(found) > 50
        assert min(text["bottom"] - text["top"] for text in found) >= 12, "lines of 11 pixels or more"
        frames = places(page, ".charts .chart")
        assert len(frames) == 3 * 3


@pytest.mark.parametrize("sites", [1, 2])
def test_no_half_of_a_wide_page_is_empty(browser: Browser, report: Report, tmp_path: Path, sites: int) -> None:
    masks = report.evidence["masks"] * sites
    several = dataclasses.replace(report, evidence={**report.evidence, "masks": masks})
    (tmp_path / "page.html").write_text(render_page([Entry("m", several)]), encoding="utf-8")
    with shown(browser, tmp_path / "page.html", width=WIDE) as page:
        for row in (".charts", ".halves"):
            for number in range(page.locator(row).count()):
                (whole,) = places(page, f"{row} >> nth={number}")
                inside = page.locator(f"{row} >> nth={number} >> xpath=./*").evaluate_all(PLACES)
                assert max(one["right"] for one in inside) > whole["right"] - 120
                last = [one for one in inside if one["bottom"] > inside[-1]["top"]]
                assert max(one["right"] for one in last) > whole["right"] - 120, inside[-1]["text"][:40]
