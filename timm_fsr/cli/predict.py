"""timm-fsr predict: ask a model about images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from timm_fsr.cli.loading import default_device, given_device, load_model
from timm_fsr.data.pictures import find_pictures
from timm_fsr.evaluation.classes import read_classes
from timm_fsr.evaluation.flips import attacks_in_words
from timm_fsr.evaluation.prediction import (
    Prediction,
    check_drawable,
    chosen_norm,
    predict,
)
from timm_fsr.models.saving import training_report
from timm_fsr.reports.report import Report, format_eps
from timm_fsr.utils.files import staged, write_text
from timm_fsr.utils.progress import bar

_FORMATS = (".csv", ".json")


def predict_command(options: argparse.Namespace) -> None:
    """`timm-fsr predict MODEL IMAGE...`: print a table of the likeliest classes, and write it to a file if asked to."""
    if options.device is not None:
        options.device = given_device(options.device)
    _check_options(options)
    console = Console(highlight=False)
    paths = find_pictures(options.images)
    classes = None if options.classes is None else read_classes(options.classes)
    model = load_model(options, options.device or default_device())
    if options.mask:
        check_drawable(model)
    own = None if options.checkpoint else training_report(options.model, model)
    norm = _norm(options, own, console) if options.robustness else None
    skipped: list[str] = []
    with bar(console, "images", len(paths)) as show:
        found = predict(
            model,
            paths,
            topk=options.topk,
            robustness=options.robustness,
            norm=norm,
            masks=options.mask,
            classes=classes,
            size=options.size,
            batch_size=options.batch_size,
            precision=options.precision,
            seed=options.seed,
            skip=skipped.append if len(paths) > 1 else None,
            progress=show.update,
        )
    console.print(_table(found, norm))
    for line in (*_notes(found, norm, model, own), *(f"left out: {line}" for line in skipped)):
        console.print(line, markup=False, soft_wrap=True)
    if options.output:
        _write(Path(options.output), options.model, found, norm)
        console.print(f"written: {options.output}", markup=False, soft_wrap=True)
    if options.mask:
        console.print(f"masks: {len(found)} picture(s) in {options.mask}", markup=False, soft_wrap=True)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot work before images are looked for and a model is loaded."""
    for name in ("topk", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be 1 or more")
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size={options.size} must be 1 or more: it is a side in pixels")
    device = options.device or default_device()
    if options.precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 is for GPUs; use bf16 or fp32 on a CPU")
    if options.robustness and options.precision != "fp32":
        raise ValueError("--robustness is found in float32, as half precision hides weak spots; leave out --precision")
    if options.norm and not options.robustness:
        raise ValueError("--norm is that of --robustness; add --robustness, or leave out --norm")
    _check_files(options)


def _check_files(options: argparse.Namespace) -> None:
    """Refuse files and folders that cannot be written: better known now than after the attacks."""
    if options.output and Path(options.output).suffix.lower() not in _FORMATS:
        raise ValueError(f"--output {options.output} must end in .csv or .json, which says what is written")
    if options.mask and Path(options.mask).is_file():
        raise ValueError(f"--mask takes a folder, but {options.mask} is a file")
    for folder in (Path(options.output).parent if options.output else None, options.mask):
        if folder is not None:
            with staged(Path(folder)):
                pass


def _norm(options: argparse.Namespace, own: Report | None, console: Console) -> str:
    """The norm of the smallest eps; says so where nobody has chosen it."""
    norm = chosen_norm(options.norm, own)
    if options.norm is None and own is None:
        console.print(
            f"the model says nothing of its threat model; distances are in {norm.capitalize()}, --norm chooses",
            soft_wrap=True,
        )
    return norm


def _table(found: Sequence[Prediction], norm: str | None) -> Table:
    """One row per image and class; it fits the terminal, or 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    if norm:
        table.add_column(f"flips at {norm.capitalize()}", justify="right", no_wrap=True)
        table.add_column("to", overflow="fold")
    names = [Path(one.image).name for one in found]
    if len(set(names)) < len(names):
        names = [one.image for one in found]
    for name, one in zip(names, found, strict=True):
        for rank, (label, share) in enumerate(zip(one.classes, one.probabilities, strict=True)):
            cells = [name if rank == 0 else "", label, f"{100 * share:.1f} %"]
            if one.flip is not None:
                cells += _flip_cells(one) if rank == 0 else ["", ""]
            table.add_row(*map(Text, cells))
    return table


def _flip_cells(one: Prediction) -> list[str]:
    assert one.flip is not None
    if one.flip.to is None:
        return ["not found", ""]
    return [_eps(one.flip.eps, one.flip.norm), one.flip.to]


def _eps(eps: float, norm: str) -> str:
    """A distance as the table has it: in Linf always in 255ths."""
    return f"{255 * eps:.2f}/255" if norm == "linf" else f"{eps:.3f}"


def _notes(found: Sequence[Prediction], norm: str | None, model: nn.Module, own: Report | None) -> list[str]:
    """What a reader of the distances has to know."""
    if norm is None:
        return []
    notes = [
        f"{norm.capitalize()} distances are upper bounds, found by {attacks_in_words(model, norm)}; a stronger attack "
        "may need less"
    ]
    if own is not None and own.norm == norm:
        kept = sum(one.flip is not None and one.flip.eps > own.eps for one in found)
        notes.append(
            f"at the model's own {norm.capitalize()} {format_eps(own.eps, norm)} these attacks leave the answer to "
            f"{kept} of {len(found)} image(s) as it is"
        )
    return notes


def _write(path: Path, model: str, found: Sequence[Prediction], norm: str | None) -> None:
    if path.suffix.lower() == ".json":
        about: dict[str, Any] = {"model": model, **({"norm": norm} if norm else {})}
        text = json.dumps({**about, "images": [_as_json(one) for one in found]}, indent=2, ensure_ascii=False)
    else:
        text = _as_csv(found, norm)
    write_text(path, text)


def _as_json(one: Prediction) -> dict[str, Any]:
    rows = zip(one.classes, one.indices, one.probabilities, strict=True)
    known: dict[str, Any] = {
        "image": one.image,
        "classes": [{"class": name, "index": index, "probability": share} for name, index, share in rows],
    }
    if one.flip is not None:
        eps = None if math.isinf(one.flip.eps) else one.flip.eps
        known |= {"smallest_eps_found": eps, "flips_to": one.flip.to, "attacks": one.flip.attacks}
    return known | ({"mask": one.drawing} if one.drawing else {})


def _as_csv(found: Sequence[Prediction], norm: str | None) -> str:
    """One line per image; empty cells where no attack changed the answer."""
    ranks = range(1, len(found[0].classes) + 1)
    header = ["image", *(f"{key}_{rank}" for rank in ranks for key in ("class", "probability"))]
    header += ["norm", "smallest_eps_found", "flips_to"] if norm else []
    header += ["mask"] if found[0].drawing else []
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(header)
    for one in found:
        cells: list[object] = [one.image]
        for name, share in zip(one.classes, one.probabilities, strict=True):
            cells += [name, f"{share:.6f}"]
        if one.flip is not None:
            cells += [one.flip.norm, "" if math.isinf(one.flip.eps) else f"{one.flip.eps:.6g}", one.flip.to or ""]
        lines.writerow([*cells, *([one.drawing] if one.drawing else [])])
    return buffer.getvalue()
