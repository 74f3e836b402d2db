"""The page: a report, or several side by side, as one HTML file that needs no other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from timm_fsr.reports.charts import Line, bar_chart, heat_map, line_chart
from timm_fsr.reports.comparison import differences, listed, mcnemar
from timm_fsr.reports.report import SCHEMA_VERSION, WORST_CASE, Report, format_eps
from timm_fsr.reports.wording import in_words, stages_in_words

_SHOWN_CLASSES = 20  # of more than these the best and the worst are shown
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")  # others would be fetched from somewhere
_FEW_COLUMNS = 3  # models that stand side by side on a wide screen; more are stacked on any
_HIDDEN = ("classes", "autoattack_nonstandard", "recipe")  # conditions that are shown elsewhere, or are too long


@dataclass(frozen=True, eq=False)
class Entry:
    """A model on the page.

    Attributes:
        title: what to call it.
        report: of its evaluation.
        examples: pictures, as `timm_fsr.evaluation.examples.draw_examples` gives them; {} is none.
    """

    title: str
    report: Report
    examples: dict[str, Any] = field(default_factory=dict)


def render_page(entries: Sequence[Entry]) -> str:
    """HTML of one model's report, or of several with a comparison first.

    Nothing is fetched when it is looked at: pictures, styles and charts are inside.

    Raises:
        ValueError: there is no entry.
    """
    if not entries:
        raise ValueError("there is no report to show; give at least one")
    environment = Environment(
        loader=PackageLoader("timm_fsr.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["picture"] = lambda source: source if _PICTURE.fullmatch(str(source)) else ""
    environment.filters["anchor"] = lambda index: f"model-{index}"
    return environment.get_template("report.html").render(
        title=", ".join(entry.title for entry in entries),
        heading=entries[0].title if len(entries) == 1 else f"{len(entries)} models side by side",
        models=[_model(entry) for entry in entries],
        comparison=_comparison(entries) if len(entries) > 1 else None,
        schema_version=SCHEMA_VERSION,
    )


def _model(entry: Entry) -> dict[str, Any]:
    """What the template shows of a model."""
    report = entry.report
    return {
        "title": entry.title,
        "report": report,
        "robust": _row(report, WORST_CASE),
        "clean": _row(report, "clean"),
        "rows": [_row(report, name) for name in report.correct],
        "collapsed": report.collapsed,
        "notes": [note for note in report.notes if note != report.collapsed],
        "upper_bound": report.upper_bound.removeprefix("upper bound: "),
        "chance": _chance([entry]),
        "curves": _curves([entry]),
        "noise": _noise(report.evidence),
        "surfaces": _surfaces(report.evidence),
        "masks": _masks(report.evidence),
        "flat": report.evidence.get("zero_gradients", {}).get("mask_elements"),
        "findings": report.evidence.get("findings", []),
        "examples": entry.examples,
        "example_attack": in_words(str(entry.examples.get("attack", ""))),
        "classes": _classes(report),
        "calibration": _calibration(report, _chance([entry])),
        "corruptions": _corruptions(report),
        "conditions": _conditions(report),
    }


def _row(report: Report, name: str) -> dict[str, Any]:
    """A line of the table of attacks, with the stages of an attack that has several."""
    low, high = report.interval(name)
    threat, detail = (report.norm, report.eps), report.attacks.get(name, "")
    known = report.stages.get(name, {})
    told = stages_in_words(detail, list(known), threat)
    stages = []
    before = report.correct["clean"]
    for key, flags in known.items():
        broken = int((before & ~flags).sum())
        accuracy = int(flags.sum()) / report.count
        stages.append({"name": key, "accuracy": accuracy, "broken": broken, "detail": told.get(key, "")})
        before = flags
    return {
        "name": name.replace("_", " "),
        "detail": "" if told else in_words(detail, threat),
        "accuracy": report.accuracy_of(name),
        "low": low,
        "high": high,
        "stages": stages,
    }


def _chance(entries: Sequence[Entry]) -> float | None:
    """The accuracy of guessing, if it is known and the same for all."""
    classes = {entry.report.num_classes or 0 for entry in entries}
    return 1 / max(classes) if len(classes) == 1 and max(classes) else None


def _curves(entries: Sequence[Entry], fewest: int = 1) -> list[dict[str, Any]]:
    """Robust accuracy over eps, steps and restarts, one line for each model, where at least `fewest` have them."""
    with_eps = [(e.title, e.report.evidence["eps"]) for e in entries if "eps" in e.report.evidence]
    charts = []
    chance = _chance(entries)
    if len(with_eps) >= fewest:
        radii = sorted({radius for _, found in with_eps for radius in found["eps"]})
        place = {radius: math.sqrt(radius) for radius in radii}  # small radii are many, large ones few
        lines = [Line(name, [place[r] for r in found["eps"]], found["accuracy"]) for name, found in with_eps]
        norm = next(entry.report.norm for entry in entries if "eps" in entry.report.evidence)
        ticks = [(place[radius], format_eps(radius, norm)) for radius in radii]
        label = "eps (PGD-50), square-root scale"
        chart = line_chart("Accuracy under PGD-50 over eps", lines, ticks, label, chance=chance)
        charts.append({"title": "A growing radius", "chart": chart, "text": "Accuracy has to fall to zero."})
    sentences = {
        "steps": ("More steps", "PGD steps", "After a hundred steps, more should hardly help."),
        "restarts": ("More restarts", "random restarts of PGD-20", "Restarts help much only on a rugged loss surface."),
    }
    for key, (title, label, text) in sentences.items():
        found = [(e.title, e.report.evidence[key]) for e in entries if key in e.report.evidence]
        if len(found) >= fewest:
            numbers = sorted({number for _, one in found for number in one[key]})
            lines = [Line(name, [numbers.index(n) for n in one[key]], one["accuracy"]) for name, one in found]
            ticks = [(index, str(number)) for index, number in enumerate(numbers)]
            chart = line_chart(title, lines, ticks, label, chance=chance)
            charts.append({"title": title, "chart": chart, "text": text})
    return charts


def _noise(evidence: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Accuracies beside which a white-box attack has to look strong."""
    names = {
        ("noise", "clean"): "clean",
        ("noise", "uniform"): "random points of the ball",
        ("noise", "corners"): "random points of its edge",
        ("noise", "pgd"): "PGD-20",
        ("square", "white_box"): "every white-box attack of the evidence",
        ("square", "after_square"): "these, then Square",
        ("noise_on", "clean"): "clean, with the layers' noise on",
        ("noise_on", "pgd_eot"): "PGD-20 through the noise, with the noise on",
    }
    return [(label, evidence[part][key]) for (part, key), label in names.items() if key in evidence.get(part, {})]


def _surfaces(evidence: Mapping[str, Any]) -> list[Any]:
    title = "Margin around image {}: right along the random direction, up along the gradient, two eps each way"
    return [heat_map(title.format(found["image"]), found["margin"]) for found in evidence.get("surface", [])]


def _masks(evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "site": found["site"],
            "saturated": found["saturated"],
            "chart": bar_chart(
                f"Mask values at {found['site']}",
                [("clean", found["clean"]), ("attacked", found["attacked"])],
                found["edges"],
                "mask (0 non-robust, 1 robust)",
            ),
        }
        for found in evidence.get("masks", [])
    ]


def _classes(report: Report) -> list[dict[str, Any]]:
    """Clean and worst-case accuracy of each class; of very many, of the best and the worst."""
    if report.labels is None:
        return []
    clean, robust = report.per_class("clean"), report.per_class()
    names = list(report.conditions.get("classes") or map(str, range(len(clean))))
    rows: list[dict[str, Any]] = [
        {"name": str(name), "clean": one, "robust": other}
        for name, one, other in zip(names, clean, robust, strict=True)
        if one is not None
    ]
    if len(rows) > _SHOWN_CLASSES:
        rows.sort(key=lambda row: row["robust"])
        rows = rows[: _SHOWN_CLASSES // 2] + rows[-_SHOWN_CLASSES // 2 :]
    return rows


def _calibration(report: Report, chance: float | None) -> dict[str, Any] | None:
    found = report.calibration.get("clean")
    if not found:
        return None
    bins = found["bins"]
    edges = [index / len(bins["count"]) for index in range(len(bins["count"]) + 1)]
    groups = [("confidence", bins["confidence"]), ("accuracy", bins["accuracy"])]
    chart = bar_chart("Confidence and accuracy by bins of confidence", groups, edges, "confidence", chance=chance)
    return {"values": {k: v for k, v in found.items() if k != "bins"}, "chart": chart}


def _corruptions(report: Report) -> list[dict[str, Any]]:
    rows = []
    for kind, found in report.corruptions.items():
        levels = [(level, found[level]) for level in sorted(found, key=int)]
        rows.append({"name": kind.replace("_", " "), "levels": levels, "mean": sum(found.values()) / len(found)})
    return rows


def _conditions(report: Report) -> list[tuple[str, str]]:
    """Everything else that decided the result, flattened."""
    flat: list[tuple[str, str]] = [("images", str(report.count)), ("seed", str(report.seed))]
    for key, value in report.conditions.items():
        if key in _HIDDEN or value in ("", None):
            continue
        value = in_words(value) if key == "training" and isinstance(value, str) else value
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        flat += [(f"{key} {inner}".replace("_", " ").strip(), str(shown)) for inner, shown in nested]
    return flat


def _comparison(entries: Sequence[Entry]) -> dict[str, Any]:
    """All models side by side, against the first one."""
    first = entries[0].report
    names = [n for n in (*first.correct, WORST_CASE) if all(n in (*e.report.correct, WORST_CASE) for e in entries)]
    rows = []
    for name in names:
        cells = [_row(entry.report, name) for entry in entries]
        for cell, entry in zip(cells, entries, strict=True):  # a model that does not work is ranked against none
            broken = entry.report.collapsed or first.collapsed
            cell["points"] = None if broken else 100 * (cell["accuracy"] - cells[0]["accuracy"])
        rows.append({"name": name.replace("_", " "), "cells": cells})
    return {
        "titles": [entry.title for entry in entries],
        "rows": rows,
        "sentences": [_sentence(entries[0], entry) for entry in entries[1:]],
        "warnings": _warnings(entries),
        "curves": _curves(entries, fewest=2),
        "stacked": len(entries) > _FEW_COLUMNS,
        "missing": sorted({n for e in entries for n in e.report.correct} - set(names)),
    }


def _sentence(first: Entry, other: Entry) -> str:
    """What the images on which two models differ say."""
    broken = [entry for entry in (first, other) if entry.report.collapsed]
    if broken:
        names = " and ".join(entry.title for entry in broken)
        return (
            f"{other.title} and {first.title} are not compared: {names} cannot classify, and no attack can change that."
        )
    if not _same_images(first.report, other.report):
        return f"{other.title} and {first.title} were tried on other images, so single images cannot be compared."
    gained, lost, certain = mcnemar(first.report, other.report, WORST_CASE)
    points = 100 * (gained - lost) / first.report.count
    meaning = "more than chance explains" if certain else "no more than chance explains"
    return (
        f"In the worst case {other.title} is {points:+.1f} points against {first.title}: {gained} images gained, "
        f"{lost} lost, {meaning} (McNemar's test, 5 %)."
    )


def _warnings(entries: Sequence[Entry]) -> list[str]:
    reports = [entry.report for entry in entries]
    warnings = [f"{entry.title}: {entry.report.collapsed}." for entry in entries if entry.report.collapsed]
    if len({report.threat for report in reports}) > 1:
        warnings.append(f"The threat models differ: {', '.join(report.threat for report in reports)}.")
    if not all(_same_images(reports[0], report) for report in reports):
        warnings.append("The models were tried on different images.")
    if len({tuple(report.correct) for report in reports}) > 1:
        warnings.append("Not all attacks were run on all models, so the worst cases do not mean the same.")
    for other in entries[1:]:
        if found := _trained_otherwise(entries[0].report, other.report):
            warnings.append(f"{entries[0].title} and {other.title} were trained differently, the layer aside: {found}.")
    return warnings


def _trained_otherwise(one: Report, other: Report) -> str:
    """What makes the budgets of two trainings unequal, as far as their reports say."""
    ours, theirs = one.conditions, other.conditions
    recipes = [conditions.get("recipe") for conditions in (ours, theirs)]
    keys = ["training_data", "checkpoint_rule", *([] if all(recipes) else ["training"])]  # which recipes tell better
    said = {
        key.replace("_", " "): (in_words(str(ours[key])), in_words(str(theirs[key])))
        for key in keys
        if key in ours and key in theirs and ours[key] != theirs[key]
    }
    return listed({**said, **differences(recipes[0] or {}, recipes[1] or {})})


def _same_images(one: Report, other: Report) -> bool:
    fingerprints = [report.conditions.get("data_fingerprint") for report in (one, other)]
    return one.count == other.count and fingerprints[0] == fingerprints[1] and fingerprints[0] is not None


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"
