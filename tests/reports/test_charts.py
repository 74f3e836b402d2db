"""Charts map values to the right places, take the page's colours, and escape what they are given."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from timm_fsr.reports.charts import HEIGHT, WIDTH, Line, bar_chart, heat_map, line_chart

TICKS = [(0.0, "none"), (1.0, "one"), (4.0, "four")]
PLACE = re.compile(r"translate\(([\d.]+) ([\d.]+)\)")


def parse(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def noted(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The shape that has each note."""
    shapes = {group.findtext("title"): group.find(".//path") for group in root.iter("g")}
    return {note: shape for note, shape in shapes.items() if note and shape is not None}


def positions(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the dots are."""
    found = (PLACE.match(shape.get("transform", "")) for shape in noted(root).values())
    return [(float(place[1]), float(place[2])) for place in found if place]


def corners(shape: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", shape.get("d", ""))]


def size(shape: ElementTree.Element) -> tuple[float, float]:
    xs, ys = zip(*corners(shape), strict=True)
    return max(xs) - min(xs), max(ys) - min(ys)


def style(shape: ElementTree.Element) -> dict[str, str]:
    pairs = (entry.partition(":") for entry in shape.get("style", "").split(";") if entry.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}


def texts(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    return {text.text or "": (float(text.get("x", 0)), float(text.get("y", 0))) for text in root.iter("text")}


class TestLineChart:
    def test_values_are_where_they_belong(self):
        root = parse(line_chart("title", [Line("a", [0, 1, 4], [1.0, 0.5, 0.0])], TICKS, "x"))
        (left, top), (middle, half), (right, bottom) = positions(root)
        assert left < middle < right <= WIDTH
        assert (middle - left) / (right - left) == pytest.approx(1 / 4, abs=0.01)
        assert 0 <= top < bottom <= HEIGHT
        assert half == pytest.approx((top + bottom) / 2, abs=0.1)
        assert list(noted(root)) == ["a: 100.0 % at 0", "a: 50.0 % at 1", "a: 0.0 % at 4"]
        labels = texts(root)
        assert labels["one"][0] == pytest.approx(middle, abs=0.1)
        assert labels["50 %"][1] == pytest.approx(half, abs=5)

    def test_each_line_differs_without_its_colour(self):
        lines = [Line(name, [0, 4], [0.1, 0.2]) for name in "abcd"]
        root = parse(line_chart("title", lines, TICKS, "x"))
        drawn = [style(path) for path in root.iter("path") if style(path).get("stroke-width") == "2.5"]
        dashes = [found.get("stroke-dasharray") for found in drawn]
        assert len(dashes) == 2 * 4, "each in the chart and in the legend"
        assert len(set(dashes[:4])) == 4
        assert dashes[4:] == dashes[:4]
        legend = [text for text in texts(root) if text in "abcd"]
        assert legend == ["a", "b", "c", "d"]

    def test_one_line_needs_no_legend_and_one_tick_no_width(self):
        root = parse(line_chart("t", [Line("a", [2], [0.5])], [(2.0, "two")], "x"))
        assert "a" not in texts(root)
        assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"

    def test_labels_that_would_touch_are_left_out_never_the_last(self):
        ticks = [(index / 100, f"{index}/255") for index in range(101)]
        root = parse(line_chart("t", [Line("a", [0], [0])], ticks, "x"))
        shown = {label: x for label, (x, _) in texts(root).items() if "/255" in label}
        assert "100/255" in shown
        places = sorted(shown.values())
        assert min(b - a for a, b in itertools.pairwise(places)) > 40

    def test_long_names_take_several_rows_of_the_legend(self):
        name = "a model of a very long name, without a layer, seed 0"
        root = parse(line_chart("t", [Line(name, [0], [0]), Line("b", [0], [0])], TICKS, "x"))
        rows = [text for text in texts(root) if text and text in name and len(text) > 9]
        assert len(rows) == 2
        assert " ".join(rows) == name
        assert float(root.get("viewBox", "").split()[3]) == HEIGHT + 3 * 20

    def test_chance_is_marked_where_it_belongs(self):
        lines = [Line("a", [0, 4], [0.25, 0.5])]
        root = parse(line_chart("t", lines, TICKS, "x", chance=0.25))
        (_, left), (_, right) = corners(noted(root)["chance: 25.0 %"])
        assert left == right == pytest.approx(positions(root)[0][1], abs=0.1)
        assert "chance" in texts(root)
        assert "chance" not in line_chart("t", lines, TICKS, "x")


class TestBarChart:
    def test_heights_are_in_proportion(self):
        root = parse(bar_chart("t", [("a", [0.2, None, 0.4]), ("b", [0.1, 0.0, 0.2])], [0, 0.4, 0.8, 1.0], "x"))
        heights = [size(bar)[1] for bar in noted(root).values()]
        assert len(heights) == 5, "a bin without any has a bar"
        assert heights[1] == pytest.approx(2 * heights[0], rel=0.02)
        assert heights[2] == pytest.approx(heights[0] / 2, rel=0.02)

    def test_the_legend_shows_bars(self):
        """Also where the first bin has none."""
        root = parse(bar_chart("t", [("a", [None, 0.2]), ("b", [0.1, 0.1])], [0, 0.5, 1.0], "x"))
        bars = [path for path in root.iter("path") if "--s" in style(path).get("fill", "")]
        marks = [bar for bar in bars if bar not in noted(root).values()]
        assert ["--s0" in style(marks[0])["fill"], "--s1" in style(marks[1])["fill"]] == [True, True]
        assert len(marks) == 2
        assert all(height > 5 for _, height in map(size, marks)), "a bar, not a line"
        assert all(min(y for _, y in corners(mark)) > HEIGHT for mark in marks), "below the chart"
        assert {"a", "b"} <= texts(root).keys()

    def test_chance_is_marked_where_bars_are_accuracies(self):
        groups = [("a", [0.2, 0.4])]
        assert "chance: 10.0 %" in noted(parse(bar_chart("t", groups, [0, 0.5, 1.0], "x", chance=0.1)))
        assert "chance" not in bar_chart("t", groups, [0, 0.5, 1.0], "x")

    def test_the_axis_reaches_just_beyond_the_largest(self):
        root = parse(bar_chart("t", [("a", [0.03, 0.05])], [0, 0.5, 1.0], "x"))
        assert "8 %" in texts(root)


def test_heat_map_shows_the_sign_and_the_first_row_at_the_bottom():
    root = parse(heat_map("t", [[-1.0, -2.0], [1.0, 2.0]]))
    cells = [path for path in root.iter("path") if style(path).get("fill", "").startswith(("var(--pos", "var(--neg"))]
    kinds = [style(cell)["fill"].partition("--")[2].partition(",")[0] for cell in cells]
    assert kinds == ["negative", "negative", "positive", "positive"]
    strength = [float(style(cell).get("fill-opacity", 1)) for cell in cells]
    assert strength[1] > strength[0]
    assert corners(cells[0])[0][1] > corners(cells[2])[0][1]


def drawings(text: str) -> list[str]:
    return [
        line_chart(text, [Line(text, [0], [0]), Line("b", [0], [0])], [(0.0, text)], text, chance=0.1),
        bar_chart(text, [(text, [0.5]), ("b", [0.1])], [0, 1], text),
        heat_map(text, [[1.0]]),
    ]


@pytest.mark.parametrize("nasty", ["<script>alert(1)</script>", "$x^$ & '\"", "\u4e2d\u6587"])
def test_text_is_escaped_and_taken_literally(nasty):
    for drawing in drawings(nasty):
        assert "<script" not in drawing
        root = parse(drawing)
        assert (root.findtext("title"), root.get("role")) == (nasty, "img")
        if "chart" in (root.get("class") or ""):
            assert nasty in texts(root)


def test_several_in_a_page_do_not_disturb_each_other_and_are_always_the_same():
    for drawing in drawings("t"):
        assert " id=" not in drawing
        assert "url(" not in drawing
        assert "href" not in drawing
        assert "metadata" not in drawing
    assert drawings("t") == drawings("t")


def test_every_colour_is_the_pages():
    for drawing in drawings("t"):
        colours = {style(shape).get(kind) for shape in parse(drawing).iter() for kind in ("fill", "stroke")}
        assert all(colour.startswith("var(--") for colour in colours - {None, "none"}), colours
