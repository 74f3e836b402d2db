"""Trains and attacks the same network with each feature layer at an equal budget, and draws one table and one plot.

    python recipes/compare/compare.py --config recipes/compare/fashion_mnist.yaml
    python recipes/compare/compare.py --config recipes/compare/cifar10.yaml --methods none fsr fsr:mode=separation cas
        --places own same --seeds 0 1 --images 1000 --output runs/compare --data.source=FOLDER --optim.epochs=12

A method is "none" (the plain network), a feature layer, or one with arguments ("fsr:tau=1.0,noise=false"), with the
objective in front if it is not the configuration's ("trades/none", "trades/fsr"). "own" puts each layer where its paper
does, "same" all of them behind the last stage. All else is the configuration's and equal for all: images, epochs,
attack, optimizer, schedule, seeds, and the rule that keeps the checkpoint (PGD on held-out training images). Every
model is then attacked on the same balanced test images; what counts is the worst case over all attacks. Terms that a
layer's paper puts into the training attack come with the layer, and with their cost.

Killed at any time, the same command goes on where it was; `--part 1/2` and `--part 2/2` in two shells share the work,
and `--minutes` ends it by itself, with exit status 75 if something is left to do. The table is written after each
model, from the models that are finished. "afd" is fine-tuning of a trained model and no such method: it needs
`objective.name=afd` and `model.name=FOLDER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
import yaml

import timm_fsr
from timm_fsr.assessment import assess
from timm_fsr.data import ImageData
from timm_fsr.engine import InterruptedRunError
from timm_fsr.files import write_text
from timm_fsr.layers import layer_class
from timm_fsr.page import mcnemar
from timm_fsr.recipe import Recipe
from timm_fsr.report import WORST_CASE, Report
from timm_fsr.suites import check_names, expand_names

PLAIN, OWN, SAME = "none", "own", "same"
SAME_PLACE = (-1,)
NOT_TRAINED_FROM_SCRATCH = ("afd",)
COLUMNS = {
    "clean": "clean",
    "pgd20": "PGD-20",
    "pgd100": "PGD-100",
    "cw30": "C&W",
    "official-ensemble": "official Ensemble",
    "autoattack": "AutoAttack",
    "adaptive": "adaptive",
    WORST_CASE: "worst",
}
UNFINISHED = 75  # what sysexits.h calls a temporary failure: to be tried again


class TimeIsUpError(Exception):
    """The minutes given are over, or SIGTERM came, outside of a training."""


@dataclass(frozen=True)
class Entry:
    """One model of the comparison.

    Attributes:
        method: as given on the command line.
        place: "own" or "same"; the plain network has "own".
        seed: of everything random in its training and in its attacks.
    """

    method: str
    place: str
    seed: int

    @property
    def objective(self) -> str | None:
        """Name of the objective, if it is not the configuration's."""
        return self.method.partition(":")[0].rpartition("/")[0] or None

    @property
    def layer(self) -> str | None:
        """Name of the feature layer."""
        name = self.method.partition(":")[0].rpartition("/")[2]
        return None if name == PLAIN else name

    @property
    def layer_args(self) -> dict[str, Any]:
        """Arguments that the method's name gives."""
        pairs = [pair.partition("=") for pair in filter(None, self.method.partition(":")[2].split(","))]
        return {key: yaml.safe_load(value) for key, _, value in pairs}

    @property
    def plain(self) -> Entry:
        """The same training of the plain network."""
        return Entry(f"{self.objective}/{PLAIN}" if self.objective else PLAIN, OWN, self.seed)

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return "_".join([re.sub("[:=,/]", "-", self.method), self.place, str(self.seed)])

    def recipe(self, base: Recipe, output: Path) -> Recipe:
        """The configuration with this method's layer, place and seed."""
        model = dataclasses.replace(base.model, layer=self.layer, at=None)
        if self.layer is not None:
            args = {
                **base.model.layer_args,
                self.layer: {**base.model.layer_args.get(self.layer, {}), **self.layer_args},
            }
            model = dataclasses.replace(model, layer_args=args)
        if self.place == SAME:
            model = dataclasses.replace(model, at=list(SAME_PLACE))
        if self.objective is not None:
            base = dataclasses.replace(base, objective=dataclasses.replace(base.objective, name=self.objective))
        folder = str(output / self.folder / "training")
        return dataclasses.replace(base, model=model, seed=self.seed, output=folder, resume=True, overwrite=False)


def entries(methods: Sequence[str], places: Sequence[str], seeds: Sequence[int]) -> Iterator[Entry]:
    """The models to be compared; a layer whose own place is the common one is trained once."""
    for seed in seeds:
        for method in methods:
            for place in places:
                entry = Entry(method, place, seed)
                if entry.layer is None or layer_class(entry.layer).default_at == SAME_PLACE:
                    entry = Entry(method, OWN, seed)
                yield entry


def judged(entry: Entry, base: Recipe, args: argparse.Namespace) -> Report:
    """Train the entry's model unless that is done, attack it unless that is done, and return the report."""
    recipe = entry.recipe(base, args.output)
    trained = recipe.folder / "report.json"
    finished = recipe.folder / "best" / "config.json"
    epochs = recipe.folder / "metrics.jsonl"
    done = epochs.exists() and len(epochs.read_text().splitlines()) >= recipe.optim.epochs and finished.exists()
    if not done:
        timm_fsr.train(recipe)
    model: Any = timm.create_model(f"local-dir:{recipe.folder / 'best'}", pretrained=True)
    return assess(
        model.to(args.device),
        test_images(model, base, args),
        args.output / entry.folder / "evaluation",
        norm=base.attack.norm,
        eps=base.attack.eps,
        attacks=args.attacks,
        seed=entry.seed,
        name=f"{base.model.name}, {entry.method} ({entry.place} place), seed {entry.seed}",
        trained=Report.load(trained) if trained.exists() else None,
        announce=print,
    )


def test_images(model: Any, base: Recipe, args: argparse.Namespace) -> ImageData:
    """The balanced test images that every model is attacked on."""
    classes = model.pretrained_cfg["label_names"]
    test = dataclasses.replace(base.data, limit_test=args.images).build_test(classes, progress=False)
    if not isinstance(test, ImageData):
        raise ValueError("the comparison needs its test images in memory; leave out data.streamed")
    return test


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """End what runs in it when the minutes are over or SIGTERM comes: a training saves first.

    Raises:
        TimeIsUpError: it ended outside of a training.
        InterruptedRunError: it ended a training, which is saved.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeIsUpError

    handlers = {signal.SIGTERM: end, signal.SIGALRM: lambda *_: signal.raise_signal(signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes if minutes else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def is_whole(report: Report, attacks: Sequence[str]) -> bool:
    """Whether a report has the outcomes of all these attacks, so that its worst case can be set beside others."""
    return set(expand_names(attacks)) <= set(report.correct)


def row(entry: Entry, report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """What the table and the plot show of one model."""
    training = args.output / entry.folder / "training"
    seconds = sum(json.loads(line)["seconds"] for line in (training / "metrics.jsonl").read_text().splitlines())
    model = timm.create_model(f"local-dir:{training / 'best'}", pretrained=True)
    accuracy = {**report.accuracy, WORST_CASE: report.worst_case}
    return {
        **dataclasses.asdict(entry),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "images": report.count,
        "accuracy": {name: round(accuracy[name], 4) for name in COLUMNS if name in accuracy},
        "interval_95": [round(bound, 4) for bound in report.interval(WORST_CASE)],
    }


def entry_of(one: dict[str, Any]) -> Entry:
    """The model that a row of the table is about."""
    return Entry(one["method"], one["place"], one["seed"])


def table(rows: Sequence[dict[str, Any]], reports: dict[Entry, Report]) -> str:
    """Markdown: one line a model, with intervals and the images gained and lost against the plain network."""
    names = columns(rows)
    lines = []
    known = {entry_of(one): one for one in rows}
    for entry, one in known.items():
        low, high = (100 * bound for bound in one["interval_95"])
        base = known.get(entry.plain)
        against, time = "", f"{one['training_seconds']:.0f} s"
        if base is not None and base is not one:
            gained, lost, more = mcnemar(reports[entry.plain], reports[entry], WORST_CASE)
            against = f"+{gained} -{lost}" + ("" if more else " (chance)")
            time = f"{one['training_seconds'] / base['training_seconds']:.2f} x"
        shares = [f"{100 * one['accuracy'][name]:.1f} %" for name in names]
        cells = [one["method"], one["place"], str(one["seed"]), *shares, f"{low:.1f} to {high:.1f}", against]
        lines.append([*cells, f"{one['parameters'] / 1e6:.3f} M", time])
    head = ["method", "place", "seed", *(COLUMNS[name] for name in names), "95 % interval", "against none"]
    return markdown([*head, "parameters", "training time"], lines)


def summary(rows: Sequence[dict[str, Any]], reports: dict[Entry, Report]) -> str:
    """Markdown: one line a method and place, means over its seeds, the best worst case first."""
    names = columns(rows)
    known = {entry_of(one): one for one in rows}
    found = []
    for method, place in dict.fromkeys((one["method"], one["place"]) for one in rows):
        mine = {entry: one for entry, one in known.items() if (entry.method, entry.place) == (method, place)}
        means = {name: statistics.mean(one["accuracy"][name] for one in mine.values()) for name in names}
        pairs = [entry for entry in mine if entry.plain in known and entry != entry.plain]
        points = [reports[entry].worst_case - reports[entry.plain].worst_case for entry in pairs]
        beyond = sum(mcnemar(reports[entry.plain], reports[entry], WORST_CASE)[2] for entry in pairs)
        times = [known[entry]["training_seconds"] / known[entry.plain]["training_seconds"] for entry in pairs]
        cells = [method, place, ", ".join(str(entry.seed) for entry in mine)]
        cells += [f"{100 * means[name]:.1f} %" for name in names]
        cells += [", ".join(f"{100 * point:+.1f}" for point in points), f"{beyond} of {len(pairs)}" if pairs else ""]
        cells += [f"{statistics.mean(times):.2f} x" if times else ""]
        found.append((means[WORST_CASE], cells))
    found.sort(key=lambda pair: -pair[0])
    head = ["method", "place", "seeds", *(COLUMNS[name] for name in names), "points of the worst case against none"]
    return markdown([*head, "more than chance", "training time"], [cells for _, cells in found])


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What every model has been judged by."""
    return [name for name in COLUMNS if all(name in one["accuracy"] for one in rows)]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *lines))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Worst-case accuracy against the time of training, relative to the plain network of the same seed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print('no plot: matplotlib is not installed; pip install "timm-fsr[report]"')
        return
    seconds = {entry_of(one): one["training_seconds"] for one in rows}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
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
    axes.set_xlabel("training time, relative to the plain network")
    axes.set_ylabel("worst-case robust accuracy, % (95 % interval)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def render(found: dict[Entry, Report], args: argparse.Namespace) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.png` of the models that are finished."""
    rows = [row(entry, report, args) for entry, report in found.items()]
    rows.sort(key=lambda one: (args.methods.index(one["method"]), one["place"], one["seed"]))
    text = f"{summary(rows, found)}\nEach model:\n\n{table(rows, found)}"
    write_text(args.output / "comparison.json", json.dumps(rows, indent=1) + "\n")
    write_text(args.output / "comparison.md", text)
    plot(rows, args.output / "comparison.png")
    print(f"\n{text}", flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison."""
    own = [name for name in timm_fsr.list_layers() if name not in NOT_TRAINED_FROM_SCRATCH]
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", required=True, help="what all methods have in common")
    options.add_argument("--methods", nargs="+", default=[PLAIN, *own], help="default: none and every layer")
    options.add_argument("--places", nargs="+", default=[OWN], choices=(OWN, SAME))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options.add_argument("--images", type=int, default=1000, help="balanced test images that are attacked")
    options.add_argument("--attacks", nargs="*", default=["pgd20", "standard", "adaptive"])
    options.add_argument("--output", type=Path, help="folder of the results; default: the configuration's")
    options.add_argument("--part", default="1/1", help="this shell's share of the models, such as 1/2")
    options.add_argument("--minutes", type=float, help="stop after so many, to go on another time")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def parse_args(options: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and what is left for the configuration.

    Raises:
        SystemExit: an option that cannot work.
    """
    args, rest = options.parse_known_args(arguments)
    share = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if share is None or not 1 <= int(share[1]) <= int(share[2]):
        options.error(f"--part={args.part} is no share of the work; write 1/2 in one shell and 2/2 in another")
    args.share, args.shares = int(share[1]), int(share[2])
    if args.minutes is not None and args.minutes <= 0:
        options.error(f"--minutes={args.minutes} leaves no time; give more than 0, or leave it out")
    for method in args.methods:
        entry = Entry(method, OWN, 0)
        for name in (entry.layer, entry.objective):
            if name in NOT_TRAINED_FROM_SCRATCH:
                options.error(f"{name} fine-tunes a trained model; train it by --objective.name={name} and evaluate it")
        if entry.layer is not None:
            layer_class(entry.layer)
    return args, rest


def compare(base: Recipe, args: argparse.Namespace) -> dict[Entry, Report]:
    """Train and attack what is not yet finished, draw what is, and return it.

    Raises:
        ValueError: something in the recipe cannot work with a method; raised before any is trained.
        TimeIsUpError, InterruptedRunError: see `time_limit`; what is finished is drawn.
    """
    check_names(args.attacks, base.attack.norm, base.attack.eps, sources=False)
    wanted = list(dict.fromkeys(entries(args.methods, args.places, args.seeds)))
    for entry in wanted:  # all of them before the first is trained
        entry.recipe(base, args.output).check()
    found: dict[Entry, Report] = {}
    drawn = 0
    try:
        for index, entry in enumerate(wanted):
            report = args.output / entry.folder / "evaluation" / "report.json"
            if index % args.shares == args.share - 1:
                print(f"== {entry.method}, {entry.place} place, seed {entry.seed}", flush=True)
                found[entry] = judged(entry, base, args)
                render(found, args)
                drawn = len(found)
            elif report.exists() and is_whole(known := Report.load(report), args.attacks):
                found[entry] = known
    finally:
        if len(found) > drawn:  # models of the other parts
            render(found, args)
    return found


def main(arguments: Sequence[str]) -> int:
    """Train, attack and draw; 0 if all is done, 75 if the time was up before, 2 if it cannot work."""
    try:
        args, overrides = parse_args(parser(__doc__), arguments)
        base = Recipe.load(args.config, overrides)
        args.output = args.output or base.folder
        with time_limit(args.minutes):
            compare(base, args)
    except (TimeIsUpError, InterruptedRunError):
        print("the time is up; the same command goes on from here", flush=True)
        return UNFINISHED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
