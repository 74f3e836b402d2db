"""The command line: timm-fsr train | evaluate | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from timm_fsr.data import EMBEDDED, load_data
from timm_fsr.demo import run_demo
from timm_fsr.engine import InterruptedRunError, train
from timm_fsr.evaluation import evaluate
from timm_fsr.files import staged
from timm_fsr.hub import load
from timm_fsr.notation import parse_number
from timm_fsr.progress import bar
from timm_fsr.recipe import parse_arguments, recipe_parser

Command = Callable[[Sequence[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 2 after printing what was wrong with the input, or 143 after a SIGTERM (128 + 15, as a shell says it).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="timm-fsr", description=__doc__)
    parser.add_argument("command", choices=list(_COMMANDS), help="see `timm-fsr COMMAND --help`")
    command = parser.parse_args(given[:1]).command
    try:
        _COMMANDS[command](given[1:])
    except InterruptedRunError as stopped:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: {stopped}", markup=False)
        return 143
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"timm-fsr {command}: error: {error}", markup=False)
        return 2
    return 0


def _train(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        recipe_parser().print_help()
        return
    train(parse_arguments(arguments))


def _evaluate(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="timm-fsr evaluate", description="Clean and robust accuracy of a model.")
    parser.add_argument("model", help="a folder that train wrote, or the timm name of a model with weights (hf-hub:)")
    parser.add_argument("--data", default=EMBEDDED, help="data set: embedded, folder, Parquet or Hub id")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="evaluate so many images, balanced, instead of all")
    parser.add_argument("--norm", default="linf", choices=["linf", "l2"])
    parser.add_argument("--eps", type=_number, default=8 / 255, help="radius in pixels of [0, 1], such as 8/255")
    parser.add_argument("--attacks", nargs="+", default=["fgsm", "pgd20"], help="fgsm, pgd20, pgd100, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--output", help="write the report as JSON to this file")
    options = parser.parse_args(arguments)
    if options.output:
        with staged(Path(options.output).parent):
            pass  # a folder that cannot be written is better known before the attacks run than after
    model = load(options.model, pretrained=True).to(options.device)
    data = load_data(options.data, options.split, limit=options.limit)
    console = Console(highlight=False, soft_wrap=True)
    with bar(console, "evaluation", len(data)) as show:
        report = evaluate(
            model,
            data.batches(250),
            norm=options.norm,
            eps=options.eps,
            attacks=options.attacks,
            seed=options.seed,
            name=options.model,
            data_name=data.name,
            progress=lambda done, correct: show(done, f"right under all so far: {correct}/{done}"),
        )
    if options.output:
        report.save(options.output)
    console.print(f"{options.model} on {data.name}: {report.summary()}")


def _demo(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="timm-fsr demo",
        description="Train a small network adversarially with and without FSR on embedded Fashion-MNIST, and compare.",
    )
    parser.add_argument("--output", default="timm_fsr_demo", help="folder of the results")
    parser.add_argument("--epochs", type=int, help="fewer or more than the default")
    parser.add_argument("--limit", type=int, help="use at most so many training and test images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run_demo(options.output, epochs=options.epochs, limit=options.limit, seed=options.seed)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; use cpu") from error


def _number(text: str) -> float:
    try:
        return parse_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_COMMANDS: dict[str, Command] = {"train": _train, "evaluate": _evaluate, "demo": _demo}
