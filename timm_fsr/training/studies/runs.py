"""Runs as a set: found in folders, set side by side in a table, with means over seeds."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from timm_fsr.reports.charts import Line
from timm_fsr.reports.report import Report
from timm_fsr.reports.runs_page import Cell, Column, Table, render_runs_page
from timm_fsr.reports.statistics import mean_interval
from timm_fsr.training.lock import is_locked
from timm_fsr.training.metrics import read_metrics
from timm_fsr.training.output import how_it_ended, is_concluded
from timm_fsr.training.state import flatten
from timm_fsr.training.studies.study import EVALUATION, TRAINING, say
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.files import write_text

ROBUST, CLEAN = "held_out.robust_accuracy", "held_out.clean_accuracy"
_NOT_COMPARED = ("output", "overwrite", "resume", "imports")
_NO_RUNS = ("best", "last", "checkpoints", "trackers", EVALUATION)  # folders of a run that hold none


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One training run, finished or not.

    Attributes:
        name: its folder, as short as the others allow.
        folder: of the run.
        recipe: flat, {"optim.lr": 0.1, ...}.
        metrics: a line for each epoch.
        state: "running", "finished", "failed", "pruned", or where it stopped.
        report: of the test images; None if there is none.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    state: str
    report: Report | None

    @property
    def best(self) -> Mapping[str, float]:
        """The line of the epoch whose model was kept; {} before the first validation."""
        return best_of(self.metrics)

    @property
    def seconds(self) -> float:
        """Time of training so far."""
        return sum(line["seconds"] for line in self.metrics)

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None if the number of classes is not known."""
        try:
            config = json.loads((self.folder / "best" / "config.json").read_text(encoding="utf-8"))
            return 1 / int(config["num_classes"])
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            return None


def best_of(metrics: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The line of the epoch that the held-out images prefer; {} before the first validation."""
    validated = [line for line in metrics if ROBUST in line]
    return max(validated, key=lambda line: (line[ROBUST], line[CLEAN]), default={})


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run in the folders and below them, in the order of their paths.

    Raises:
        FileNotFoundError: there is no such folder, or no run in any of them.
        ValueError: a run's files are damaged.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; give the --output of a training, or one above it")
        for path, inside, files in os.walk(folder):
            if {"recipe.yaml", "metrics.jsonl"} <= set(files):
                found.append(Path(path))
            inside[:] = sorted(name for name in inside if name not in _NO_RUNS and not name.startswith("."))
    unique = list(dict.fromkeys(path.resolve() for path in found))
    if not unique:
        listed = ", ".join(map(str, folders))
        raise FileNotFoundError(f"there is no training run in {listed}; a run has recipe.yaml and metrics.jsonl")
    return [_read(path, name) for path, name in zip(unique, _names(unique), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths below the one that all are in."""
    shown = [path.parent if path.name == TRAINING else path for path in folders]
    if len(set(shown)) < len(shown):
        shown = list(folders)
    above = Path(os.path.commonpath([path.parent for path in shown]))
    return [path.relative_to(above).as_posix() for path in shown]


def _read(folder: Path, name: str) -> Run:
    try:
        recipe = flatten(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
        metrics = read_metrics(folder)
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds a damaged run: {' '.join(str(error).split())}") from error
    reports = [folder.parent / EVALUATION / "report.json"] if folder.name == TRAINING else []
    report = next((path for path in [*reports, folder / "report.json"] if path.is_file()), None)
    return Run(
        name=name,
        folder=folder,
        recipe=recipe,
        metrics=metrics,
        state=_state(folder, recipe, len(metrics)),
        report=None if report is None else Report.load(report),
    )


def _state(folder: Path, recipe: Mapping[str, Any], epochs: int) -> str:
    if is_locked(folder):
        return "running"
    ended = how_it_ended(folder).get("state")
    if ended:
        return f"{ended} at {epochs}" if epochs else ended
    asked = bool(recipe.get("evaluation.attacks"))
    if is_concluded(folder, epochs=int(recipe.get("optim.epochs", 0)), evaluated=asked):
        return "finished"
    return f"stopped at {epochs}"


def table_of(runs: Sequence[Run], *, sort: str | None = None, reverse: bool = False) -> Table:
    """Runs side by side: the keys of their recipes that differ, and what came out.

    Args:
        runs: at least one.
        sort: a column's key or heading; None: the worst case on test images, or else the accuracy on held-out ones.
        reverse: turn the order round. Accuracies have their best first, all else is in rising order.

    Raises:
        ValueError: there is no such column.
    """
    shared, left_out = _shared_attacks(runs)
    keys = differing_keys(runs)
    columns = [
        Column("run", ("", "run"), kind="text"),
        *(Column(key, ("", short), kind="recipe") for key, short in zip(keys, _short(keys), strict=True)),
        Column("held_out.clean", ("held-out", "clean"), kind="share"),
        Column("held_out.robust", ("held-out", "robust"), kind="share"),
        *_test_columns(runs, shared),
        Column("seconds", ("", "time"), kind="time"),
        Column("state", ("", "state"), kind="text"),
    ]
    rows = [_row(run, keys, shared) for run in runs]
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    notes = []
    if left_out:
        notes.append(f"left out, because not every run has met them: {', '.join(left_out)}")
    counts = {(run.report.count, run.report.threat) for run in runs if run.report is not None}
    if len(counts) > 1:
        listed = "; ".join(f"{count} images, {threat}" for count, threat in sorted(counts))
        notes.append(f"test accuracies are not comparable: {listed}")
    return _sorted(Table(columns, rows, tuple(notes)), sort, reverse)


def _test_columns(runs: Sequence[Run], shared: Sequence[str]) -> list[Column]:
    if not any(run.report is not None for run in runs):
        return []
    attacks = [name for name in shared if name != "clean"]
    first = [Column(f"test.{name}", ("test", name), kind="share") for name in ["clean", *attacks[:1]]]
    return [*first, Column("test.worst", ("test", "worst"), kind="share")] if attacks else first[:1]


def _shared_attacks(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """What all reports have, clean images among it, and what only some have: a worst case has to be over the same."""
    judged = [list(run.report.correct) for run in runs if run.report is not None]
    shared = [name for name in judged[0] if all(name in names for names in judged)] if judged else []
    return shared, sorted({name for names in judged for name in names} - set(shared))


def _row(run: Run, keys: Sequence[str], shared: Sequence[str]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"run": run.name, **{key: _plain(run.recipe.get(key)) for key in keys}}
    row |= {"held_out.clean": run.best.get(CLEAN), "held_out.robust": run.best.get(ROBUST)}
    if run.report is not None:
        row |= {f"test.{name}": run.report.accuracy_of(name) for name in shared}
        row["test.worst"] = _worst(run.report, shared)
    return {**row, "seconds": round(run.seconds, 1), "state": run.state}


def _worst(report: Report, shared: Sequence[str]) -> float:
    flags = report.flags_of("clean")
    for name in shared:
        flags = flags & report.flags_of(name)
    return int(flags.sum()) / report.count


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of the recipes that are not the same in all runs, in the order of a recipe."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    first = runs[0].recipe
    return [
        key
        for key in keys
        if key not in _NOT_COMPARED and any(run.recipe.get(key) != first.get(key) for run in runs[1:])
    ]


def _short(keys: Sequence[str]) -> list[str]:
    """The last part of each key where that is enough to tell it from the others."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]


def _plain(value: Any) -> Cell:
    """A recipe's value as it is written there."""
    if value is None or isinstance(value, (int, float, str)):
        return "null" if value is None else value
    return json.dumps(value)


def _sorted(table: Table, sort: str | None, reverse: bool) -> Table:
    columns = {column.key: column for column in table.columns}
    columns = {**{column.head[1]: column for column in reversed(table.columns)}, **columns}  # "clean" is held-out
    if sort is None:
        sort = next(key for key in ("test.worst", "held_out.robust", "run") if key in columns)
    if sort not in columns:
        raise ValueError(unknown("column", sort, list(columns)))
    return table.sorted_by(columns[sort], reverse=reverse)


def over_seeds(runs: Sequence[Run]) -> str:
    """A line for each recipe that was run with several seeds: mean and 95 % interval; "" if there is none.

    By Student's t, on the finished runs: what to expect of a further seed's mean, not of other data.
    """
    keys = [key for key in differing_keys(runs) if key != "seed"]
    shared, _ = _shared_attacks(runs)
    groups: dict[tuple[Cell, ...], list[Run]] = {}
    for run in runs:
        if run.state == "finished":
            groups.setdefault(tuple(_plain(run.recipe.get(key)) for key in keys), []).append(run)
    lines: list[tuple[float, str]] = []
    for values, members in groups.items():
        held_out = [run.best[ROBUST] for run in members if ROBUST in run.best]
        worst = [_worst(run.report, shared) for run in members if run.report is not None and len(shared) > 1]
        parts = [
            f"{what} {100 * found[0]:.1f} % [{100 * max(0.0, found[1]):.1f}, {100 * min(1.0, found[2]):.1f}]"
            for what, some in (("held-out robust", held_out), ("test worst case", worst))
            if (found := mean_interval(some)) is not None
        ]
        if parts:
            named = ", ".join(f"{key}={value}" for key, value in zip(_short(keys), values, strict=True)) or "all runs"
            seeds = ", ".join(str(run.recipe.get("seed")) for run in members)
            lines.append((sum(held_out) / len(held_out), f"{named} (seeds {seeds}): {'; '.join(parts)}"))
    if not lines:
        return ""
    head = "Means over seeds with 95 % intervals by Student's t:"
    return "\n".join([head, *(f"  {line}" for _, line in sorted(lines, key=lambda line: -line[0]))])


def curves(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Learning curves of the runs, by what they show; runs without a value are left out."""
    shown = {
        "held-out images, attacked": ROBUST,
        "held-out images, clean": CLEAN,
        "training images, attacked": "train.robust_accuracy",
    }
    found = {}
    for title, key in shown.items():
        points = {run.name: [(line["epoch"], line[key]) for line in run.metrics if key in line] for run in runs}
        lines = [Line(name, *zip(*some, strict=True)) for name, some in points.items() if some]
        if lines:
            found[title] = lines
    return found


def to_csv(table: Table) -> str:
    """Every column under its key, accuracies in [0, 1] and times in seconds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    writer.writerows([row.get(column.key) for column in table.columns] for row in table.rows)
    return file.getvalue()


def show_runs(
    runs: Sequence[Run],
    width: int,
    *,
    sort: str | None = None,
    reverse: bool = False,
    csv_file: Path | None = None,
    page: Path | None = None,
) -> None:
    """Print the table and the means over seeds; write the table and the page where asked for.

    Args:
        runs: at least one.
        width: of the terminal, in characters.
        sort: see `table_of`, as for `reverse`.
        reverse: the other way round.
        csv_file: for every column.
        page: for every column and the learning curves.

    Raises:
        ValueError: there is no such column.
        OSError: a file cannot be written.
    """
    table = table_of(runs, sort=sort, reverse=reverse)
    say(table.to_text(width))
    means = over_seeds(runs)
    if means:
        say(f"\n{means}")
    if csv_file is not None:
        write_text(csv_file, to_csv(table))
        say(f"table: {csv_file}")
    if page is not None:
        chances = {run.chance for run in runs}
        chance = chances.pop() if len(chances) == 1 else None
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        write_text(page, render_runs_page(table, curves(runs), title=title, chance=chance))
        say(f"page: {page}")
