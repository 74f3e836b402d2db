"""The tables and the plot of a comparison: what its reports say of each model, by the attacks that all of them met."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from timm_fsr.evaluation.registry import ENSEMBLE
from timm_fsr.reports.charts import new_figure, save_png
from timm_fsr.reports.comparison import mcnemar
from timm_fsr.reports.report import WORST_CASE, Report
from timm_fsr.training.studies.entries import OWN, SAME, Entry
from timm_fsr.training.studies.study import TRAINING, say
from timm_fsr.utils.files import write_text

COLUMNS = {
    "clean": "clean",
    "pgd20": "PGD-20",
    "pgd100": "PGD-100",
    "cw30": "C&W",
    ENSEMBLE: "official Ensemble",
    "autoattack": "AutoAttack",
    "adaptive": "adaptive",
    WORST_CASE: "worst",
}

Row = dict[str, Any]


def render(found: Mapping[Entry, Report], output: Path, against: Sequence[str]) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.png` of the models that are finished, and print.

    Args:
        found: their reports, in the order of the table.
        output: folder of the comparison.
        against: methods that each model is set against.
    """
    reports, left_out = in_common(found)
    rows = [row(entry, reports, against, output) for entry in reports]
    text = f"{summary(rows)}\nEach model:\n\n{table(rows)}"
    if left_out:
        text += f"\nLeft out of all figures, because not every model has met them: {', '.join(left_out)}.\n"
    write_text(output / "comparison.json", json.dumps(rows, indent=1) + "\n")
    write_text(output / "comparison.md", text)
    plot(rows, output / "comparison.png")
    say(f"\n{text}")


def in_common(found: Mapping[Entry, Report]) -> tuple[dict[Entry, Report], list[str]]:
    """The reports with those attacks alone that all of them have, and the names of the others.

    A worst case over more attacks is lower: side by side they must be over the same.
    """
    every = [set(report.correct) for report in found.values()]
    shared = set.intersection(*every)
    return {entry: restricted(report, shared) for entry, report in found.items()}, sorted(set.union(*every) - shared)


def restricted(report: Report, names: set[str]) -> Report:
    """The report of these attacks alone."""
    return dataclasses.replace(
        report,
        correct={name: flags for name, flags in report.correct.items() if name in names},
        stages={name: stages for name, stages in report.stages.items() if name in names},
        attacks={name: detail for name, detail in report.attacks.items() if name in names},
    )


def row(entry: Entry, reports: Mapping[Entry, Report], against: Sequence[str], output: Path) -> Row:
    """What the tables and the plot show of one model: they are drawn from rows alone."""
    report, training = reports[entry], output / entry.name / TRAINING
    seconds = sum(json.loads(line)["seconds"] for line in (training / "metrics.jsonl").read_text().splitlines())
    model = timm.create_model(f"local-dir:{training / 'best'}", pretrained=True)
    accuracy = {**report.accuracy, WORST_CASE: report.worst_case}
    return {
        **dataclasses.asdict(entry),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "images": report.count,
        "collapsed": report.collapsed,
        "chance": round(1 / report.num_classes, 4) if report.num_classes else None,
        "accuracy": {name: round(accuracy[name], 4) for name in COLUMNS if name in accuracy},
        "interval_95": [round(bound, 4) for bound in report.interval(WORST_CASE)],
        "against": {method: pair(entry, method, reports) for method in against},
    }


def entry_of(one: Row) -> Entry:
    """The model that a row is about."""
    return Entry(one["method"], one["place"], one["seed"])


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a model, with intervals and the images gained and lost against others of the same seed."""
    names, lines = columns(rows), []
    known = {entry_of(one): one for one in rows}
    for entry, one in known.items():
        low, high = (100 * bound for bound in one["interval_95"])
        method = one["method"] + (" (does not work)" if one.get("collapsed") else "")
        cells = [method, one["place"], str(one["seed"])]
        cells += [f"{100 * one['accuracy'][name]:.1f} %" for name in names]
        cells.append(f"{low:.1f} to {high:.1f}")
        for found in one["against"].values():
            chance = "" if found is None or found["beyond_chance"] else " (chance)"
            cells.append(f"+{found['gained']} -{found['lost']}{chance}" if found else "")
        base, time = known.get(entry.plain), f"{one['training_seconds']:.0f} s"
        if base is not None and base is not one:
            time = f"{one['training_seconds'] / base['training_seconds']:.2f} x"
        lines.append([*cells, f"{one['parameters'] / 1e6:.3f} M", time])
    head = ["method", "place", "seed", *(COLUMNS[name] for name in names), "95 % interval"]
    return markdown(
        [*head, *(f"against {method}" for method in rows[0]["against"]), "parameters", "training time"], lines
    )


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a method and place, means over its seeds, the best worst case first.

    Models that do not work come last, whatever their figures. Against others: the points of the worst case, seed by
    seed, and in bold those beyond chance.
    """
    names, lines = columns(rows), []
    known = {entry_of(one): one for one in rows}
    for method, place in dict.fromkeys((one["method"], one["place"]) for one in rows):
        mine = {entry: one for entry, one in known.items() if (entry.method, entry.place) == (method, place)}
        means = {name: statistics.mean(one["accuracy"][name] for one in mine.values()) for name in names}
        cells = [method, place, ", ".join(str(entry.seed) for entry in mine)]
        cells += [f"{100 * means[name]:.1f} %" for name in names]
        for other in rows[0]["against"]:
            pairs = [(one["against"][other], one["images"]) for one in mine.values()]
            cells.append(", ".join(points(found, images) for found, images in pairs if found))
        based = [entry for entry in mine if entry.plain in known and entry != entry.plain]
        times = [known[entry]["training_seconds"] / known[entry.plain]["training_seconds"] for entry in based]
        broken = any(
            one.get("collapsed") for one in mine.values()
        )  # no attack changes answers that are always the same
        cells[0] += " (does not work)" if broken else ""
        lines.append(((not broken, means[WORST_CASE]), [*cells, f"{statistics.mean(times):.2f} x" if times else ""]))
    lines.sort(key=lambda line: line[0], reverse=True)
    head = ["method", "place", "seeds", *(COLUMNS[name] for name in names)]
    return markdown(
        [*head, *(f"against {method}" for method in rows[0]["against"]), "training time"],
        [cells for _, cells in lines],
    )


def points(found: Mapping[str, Any], images: int) -> str:
    """A difference in percentage points, in bold if it is beyond chance."""
    value = f"{100 * (found['gained'] - found['lost']) / images:+.1f}"
    return f"**{value}**" if found["beyond_chance"] else value


def pair(entry: Entry, method: str, reports: Mapping[Entry, Report]) -> dict[str, Any] | None:
    """Images of the worst case gained and lost against another method, and whether beyond chance (McNemar).

    None if that is not there or is the entry itself, or if one of both does not work.
    """
    other = entry.counterpart(method)
    if other not in reports or other == entry or reports[other].collapsed or reports[entry].collapsed:
        return None
    return dict(
        zip(("gained", "lost", "beyond_chance"), mcnemar(reports[other], reports[entry], WORST_CASE), strict=True)
    )


def columns(rows: Sequence[Row]) -> list[str]:
    """What every model has been judged by."""
    return [name for name in COLUMNS if all(name in one["accuracy"] for one in rows)]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *lines))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Worst-case accuracy against the time of training, relative to the plain network of the same seed."""
    seconds = {entry_of(one): one["training_seconds"] for one in rows}
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    labels = list(dict.fromkeys((one["method"], one["place"]) for one in rows))
    for index, (method, place) in enumerate(labels):
        mine = [one for one in rows if (one["method"], one["place"]) == (method, place)]
        cost = [one["training_seconds"] / seconds.get(entry_of(one).plain, math.nan) for one in mine]
        robust = [100 * one["accuracy"][WORST_CASE] for one in mine]
        bounds = [[100 * one["interval_95"][side] for one in mine] for side in (0, 1)]
        errors = [[abs(bound - value) for bound, value in zip(side, robust, strict=True)] for side in bounds]
        marker = {OWN: "o", SAME: "s"}[place]
        name = method if entry_of(mine[0]).layer is None else f"{method}, {place} place"
        axes.errorbar(cost, robust, yerr=errors, fmt=marker, color=f"C{index % 10}", capsize=3, label=name)
    for chance in {one["chance"] for one in rows if one.get("chance")}:  # rows of an older version lack it
        axes.axhline(100 * chance, color="#777777", linewidth=1, linestyle=":", label="chance")
    axes.set_xlabel("training time, relative to the plain network")
    axes.set_ylabel("worst-case robust accuracy, % (95 % interval)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save_png(figure, path, dpi=150)
