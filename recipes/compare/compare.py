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
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from entries import OWN, PLAIN, SAME, Entry, entries
from tables import render

import timm_fsr
from timm_fsr.data.dataset import ImageData
from timm_fsr.evaluation.benchmark import assess
from timm_fsr.evaluation.registry import check_names, expand_names
from timm_fsr.layers import layer_class
from timm_fsr.reports.report import Report
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import fixed_keys
from timm_fsr.training.step import InterruptedRunError
from timm_fsr.utils.errors import UnsoundError

NOT_TRAINED_FROM_SCRATCH = ("afd",)
ERRORS = (ValueError, OSError, FloatingPointError, ImportError, UnsoundError)
"""What is told in a sentence."""

UNFINISHED = 75  # what sysexits.h calls a temporary failure: to be tried again


class TimeIsUpError(BaseException):
    """The minutes given are over, or SIGTERM came, outside of a training; no `except Exception` is to swallow it."""


STOPS = (TimeIsUpError, InterruptedRunError, KeyboardInterrupt)
"""What ends a script that goes on later."""


def judged(entry: Entry, base: Recipe, args: argparse.Namespace) -> Report:
    """Train the entry's model unless that is done, attack it unless that is done, and return the report.

    Raises:
        ValueError: the folder holds a training by another recipe.
    """
    recipe = entry.recipe(base, args.output)
    report = recipe.folder / "report.json"
    if not is_trained(recipe):
        timm_fsr.train(recipe)
    model: Any = timm.create_model(f"local-dir:{recipe.folder / 'best'}", pretrained=True)
    method = entry.method.replace("/", " with ")  # a slash would make a path of it
    return assess(
        model.to(args.device),
        test_images(model, base, args),
        args.output / entry.folder / "evaluation",
        norm=base.attack.norm,
        eps=base.attack.eps,
        attacks=args.attacks,
        seed=entry.seed,
        name=f"{base.model.name}, {method} ({entry.place} place), seed {entry.seed}",
        trained=Report.load(report) if report.exists() else None,
        announce=print,
    )


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe's folder holds its finished training, the report of its own attacks included.

    Raises:
        ValueError: what is finished there was trained by another recipe.
    """
    epochs, kept = recipe.folder / "metrics.jsonl", recipe.folder / "recipe.yaml"
    if not (epochs.exists() and kept.exists() and (recipe.folder / "best" / "config.json").exists()):
        return False
    before, now = fixed_keys(Recipe.load(kept)), fixed_keys(recipe)
    changed = [f"{key} ({before.get(key)} -> {now.get(key)})" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise ValueError(
            f"{recipe.folder} holds a training by another recipe: {', '.join(changed)}; take another --output"
        )
    whole = len(epochs.read_text().splitlines()) >= recipe.optim.epochs
    return whole and ((recipe.folder / "report.json").exists() or not recipe.evaluation.attacks)


def test_images(model: Any, base: Recipe, args: argparse.Namespace) -> ImageData:
    """The balanced test images that every model is attacked on."""
    classes = model.pretrained_cfg["label_names"]
    test = dataclasses.replace(base.data, limit_test=args.images).build_test(classes, progress=False)
    assert isinstance(test, ImageData)  # see check
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

    handlers: dict[int, Any] = {signal.SIGTERM: end}
    if hasattr(signal, "SIGALRM"):  # not on Windows, where parse_args refuses --minutes
        handlers[signal.SIGALRM] = lambda *_: signal.raise_signal(signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if minutes:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        if minutes:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


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
    options.add_argument("--against", nargs="+", default=[PLAIN], help="methods that each model is set against")
    options.add_argument("--output", type=Path, help="folder of the results; default: the configuration's")
    options.add_argument("--part", default="1/1", help="this shell's share of the models, such as 1/2")
    options.add_argument("--minutes", type=float, help="stop after this time, to go on later")
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
    if args.minutes is not None and not hasattr(signal, "SIGALRM"):
        options.error(
            "--minutes needs alarm signals, which this system lacks; stop the run yourself, it goes on anyway"
        )
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
    """Train and attack what is not yet finished, draw all that is after each model, and return this part's reports.

    Raises:
        ValueError: something in the recipe cannot work with a method; raised before any is trained.
        TimeIsUpError, InterruptedRunError: see `time_limit`.
    """
    wanted = check(base, args)
    found: dict[Entry, Report] = {}
    for index, entry in enumerate(wanted):
        if index % args.shares == args.share - 1:
            print(f"== {entry.method}, {entry.place} place, seed {entry.seed}", flush=True)
            found[entry] = judged(entry, base, args)
            everything = {**others(wanted, found, base, args), **found}
            order = sorted(everything, key=lambda one: (args.methods.index(one.method), one.place, one.seed))
            render({one: everything[one] for one in order}, args.output, args.against)
    return found


def check(base: Recipe, args: argparse.Namespace) -> list[Entry]:
    """The models that are asked for, in the order of the tables.

    Raises:
        ValueError: one of them, or what is to be done with them, cannot work.
    """
    if args.images < 1:
        raise ValueError(f"--images={args.images} leaves nothing to attack; give 1 or more")
    if base.data.streamed:
        raise ValueError("a comparison needs its test images in memory; leave out data.streamed")
    for method in args.against:
        if method not in {part for one in args.methods for part in (one, one.rpartition("/")[2])} | {PLAIN}:
            raise ValueError(f"--against {method} is none of --methods ({' '.join(args.methods)}); add it there")
    check_names(args.attacks, base.attack.norm, base.attack.eps, sources=False)
    wanted = list(dict.fromkeys(entries(args.methods, args.places, args.seeds)))
    for entry in wanted:
        recipe = entry.recipe(base, args.output)
        recipe.check()
        is_trained(recipe)
    return wanted


def others(
    wanted: Sequence[Entry], found: Mapping[Entry, Report], base: Recipe, args: argparse.Namespace
) -> dict[Entry, Report]:
    """What other shells have finished: all attacks asked for, on the same images and in the same ball."""
    images = {report.conditions.get("data_fingerprint") for report in found.values()}
    asked = (args.images, base.attack.norm, base.attack.eps)
    result = {}
    for entry in wanted:
        path = args.output / entry.folder / "evaluation" / "report.json"
        if entry in found or not path.exists():
            continue
        report = Report.load(path)
        same = {report.conditions.get("data_fingerprint")} == images and asked == (
            report.count,
            report.norm,
            report.eps,
        )
        if same and set(expand_names(args.attacks)) <= set(report.correct):
            result[entry] = report
    return result


def stopped(stop: BaseException) -> int:
    """Say in a line what ended the script and how to go on; returns the exit status."""
    by_hand = isinstance(stop, KeyboardInterrupt) or getattr(stop, "number", None) == signal.SIGINT
    print(f"{'stopped by Ctrl-C' if by_hand else 'the time is up'}; the same command goes on from here", flush=True)
    return 130 if by_hand else UNFINISHED


def main(arguments: Sequence[str]) -> int:
    """Train, attack and draw; 0 if all is done, 75 if the time was up before, 2 if it cannot work, 130 after Ctrl-C."""
    try:
        args, overrides = parse_args(parser(__doc__), arguments)
        base = Recipe.load(args.config, overrides)
        args.output = args.output or base.folder
        with time_limit(args.minutes):
            compare(base, args)
    except STOPS as stop:
        return stopped(stop)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
