"""Charts map values to the right places, and escape what they are given."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from timm_fsr.reports.charts import HEIGHT, WIDTH, Line, bar_chart, heat_map, line_chart

TICKS = [(0.0, "none"), (1.0, "one"), (4.0, "four")]


def parse(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{drawing}</div>")


def positions(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter("circle")]


class TestLineChart:
    def test_values_are_where_they_belong(self):
        root = parse(line_chart("title", [Line("a", [0, 1, 4], [1.0, 0.5, 0.0])], TICKS, "x"))
        (left, top), (middle, half), (right, bottom) = positions(root)
        assert left < middle < right <= WIDTH
        assert (middle - left) / (right - left) == pytest.approx(1 / 4, abs=0.01)
        assert 0 <= top < bottom <= HEIGHT
        assert half == pytest.approx((top + bottom) / 2, abs=0.1)
        labels = {text.text: (float(text.get("x", 0)), float(text.get("y", 0))) for text in root.iter("text")}
        assert labels["one"][0] == pytest.approx(middle, abs=0.1)
        assert labels["50 %"][1] == pytest.approx(half, abs=5)

    def test_each_line_differs_without_its_colour(self):
        lines = [Line(name, [0, 4], [0.1, 0.2]) for name in "abcd"]
        root = parse(line_chart("title", lines, TICKS, "x"))
        dashes = [line.get("stroke-dasharray") for line in root.iter("polyline")]
        assert len(set(dashes)) == 4
        assert ["".join(item.itertext()) for item in root.iter("li")] == ["a", "b", "c", "d"]

    def test_one_line_needs_no_legend_and_one_tick_no_width(self):
        assert not list(parse(line_chart("t", [Line("a", [2], [0.5])], [(2.0, "two")], "x")).iter("li"))

    def test_labels_that_would_touch_are_left_out_never_the_last(self):
        ticks = [(index / 100, f"{index}/255") for index in range(101)]
        root = parse(line_chart("t", [Line("a", [0], [0])], ticks, "x"))
        shown = [(float(t.get("x", 0)), t.text or "") for t in root.iter("text") if "/255" in (t.text or "")]
        assert any(label == "100/255" for _, label in shown)
        places = sorted(x for x, _ in shown)
        assert min(b - a for a, b in itertools.pairwise(places)) > 40


class TestBarChart:
    def test_heights_are_in_proportion(self):
        root = parse(bar_chart("t", [("a", [0.2, None, 0.4]), ("b", [0.1, 0.0, 0.2])], [0, 0.4, 0.8, 1.0], "x"))
        heights = [float(bar.get("height", 0)) for bar in root.iter("rect")]
        assert len(heights) == 5, "a bin without any has a bar"
        assert heights[1] == pytest.approx(2 * heights[0], rel=0.02)
        assert heights[2] == pytest.approx(heights[0] / 2, rel=0.02)

    def test_the_legend_shows_bars(self):
        drawing = bar_chart("t", [("a", [0.2]), ("b", [0.1])], [0, 1.0], "x")
        legend = parse(drawing).find("ul")
        assert [mark.get("class") for mark in legend.iter("path")] == ["bar s0", "bar s1"]
        assert not list(legend.iter("line"))
        lines = line_chart("t", [Line("a", [0], [0]), Line("b", [0], [0])], [(0.0, "0")], "x")
        assert [mark.get("class") for mark in parse(lines).find("ul").iter("line")] == ["line s0", "line s1"]

    def test_the_axis_reaches_just_beyond_the_largest(self):
        root = parse(bar_chart("t", [("a", [0.03, 0.05])], [0, 0.5, 1.0], "x"))
        assert "8 %" in [text.text for text in root.iter("text")]


def test_heat_map_shows_the_sign_and_the_first_row_at_the_bottom():
    root = parse(heat_map("t", [[-1.0, -2.0], [1.0, 2.0]]))
    cells = [(r.get("class"), float(r.get("fill-opacity", 0)), float(r.get("y", 0))) for r in root.iter("rect")]
    assert [cell[0] for cell in cells] == ["negative", "negative", "positive", "positive"]
    assert cells[1][1] > cells[0][1]
    assert cells[0][2] > cells[2][2]


def test_text_is_escaped():
    nasty = "<script>alert(1)</script>"
    drawings = [
        line_chart(nasty, [Line(nasty, [0], [0]), Line("b", [0], [0])], [(0.0, nasty)], nasty),
        bar_chart(nasty, [(nasty, [0.5])], [0, 1], nasty),
        heat_map(nasty, [[1.0]]),
    ]
    for drawing in drawings:
        assert "<script" not in drawing
        parse(drawing)
