"""timm-fsr evaluate: attack a model and report its robust accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from timm_fsr.cli.loading import default_device, given_device, load_model
from timm_fsr.cli.parsers.evaluate import EPS, NORM, evaluate_parser
from timm_fsr.cli.threat import check_data, fill_data, fill_threat
from timm_fsr.data.dataset import ImageData, load_data
from timm_fsr.data.decoding import BrokenImagesError
from timm_fsr.data.folders import other_class_order
from timm_fsr.data.sources import is_image_folder
from timm_fsr.evaluation.benchmark import PAGE, REPORT, assess, check_extras
from timm_fsr.evaluation.classes import judged_data, read_classes
from timm_fsr.evaluation.display import evaluation_display
from timm_fsr.evaluation.estimate import (
    estimate_attacks,
    estimate_corruptions,
    estimate_evidence,
    peak_memory,
    size,
    together,
)
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.registry import check_names
from timm_fsr.evaluation.saved_images import rescore
from timm_fsr.models.description import check_image_memory, check_runs, class_names, input_size, own_crop, size_text
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.models.saving import load, saved_here, training_recipe, training_report
from timm_fsr.reports.report import WORST_CASE, Report
from timm_fsr.utils.distributed import join_processes
from timm_fsr.utils.errors import ImageSizeError
from timm_fsr.utils.files import staged
from timm_fsr.utils.progress import bar


def evaluate_command(options: argparse.Namespace) -> None:
    """`timm-fsr evaluate MODEL`: attack a model, print the outcome, and write it to a folder if one is given."""
    if options.device is not None:
        options.device = given_device(options.device)
    console = Console(highlight=False, soft_wrap=True)
    if options.attacked:
        _check_attacked(options)
        _rescore(options, console)
        return
    _check_options(options)
    accelerator = join_processes()
    console.quiet = accelerator is not None and not accelerator.is_main_process
    device = default_device() if options.device is None else options.device
    if accelerator is not None:
        if options.device is not None:
            raise ValueError("--device is for one process; `accelerate launch` gives each its own: leave it out")
        device = accelerator.device
    model = load_model(options, device)
    own = None if options.checkpoint else training_report(options.model, model)
    recipe = None if own is None else training_recipe(options.model, own)
    for line in (*fill_threat(options, own), *fill_data(options, own, recipe)):
        console.print(line, markup=False)
    _check_threat(options)
    sources = {source: load(source, pretrained=True).to(device) for source in options.transfer_from}
    data = _load_images(options, model, progress=not console.quiet)
    for line in check_data(options, data, own):
        console.print(line, markup=False)
    classes = None if options.classes is None else read_classes(options.classes)
    noted = _say_before(options, model, data, classes, console)
    if options.dry_run:
        _dry_run(options, model, data, sources, 1 if accelerator is None else accelerator.num_processes, console)
        return
    common: dict[str, Any] = {
        "norm": options.norm,
        "eps": options.eps,
        "attacks": options.attacks,
        "seed": options.seed,
        "name": options.model,
        "transfer_from": sources,
        "classes": classes,
        "batch_size": options.batch_size,
        "accelerator": accelerator,
    }
    share = len(data) // (1 if accelerator is None else accelerator.num_processes)
    with evaluation_display(console, share) as display:
        if options.output:
            report = assess(
                model,
                data,
                options.output,
                **common,
                evidence_images=options.evidence,
                corruption_images=options.corruptions,
                trained=own,
                overwrite=options.overwrite,
                save_images=options.save_images,
                progress=display.attacked,
                advance=display.part,
            )
        else:
            report = evaluate(model, data, **common, progress=display.attacked)
    _print_report(report, options, console, noted)


def _dry_run(
    options: argparse.Namespace,
    model: nn.Module,
    data: ImageData,
    sources: Mapping[str, nn.Module],
    processes: int,
    console: Console,
) -> None:
    """Print what the evaluation would take and write."""
    with bar(console, "timing passes", None):
        passes, found = estimate_attacks(
            model,
            data,
            norm=options.norm,
            eps=options.eps,
            attacks=options.attacks,
            seed=options.seed,
            transfer_from=sources,
            batch_size=options.batch_size,
            processes=processes,
        )
        if options.evidence:
            found.append(estimate_evidence(passes, min(options.evidence, len(data))))
        if options.corruptions:
            found.append(estimate_corruptions(data, passes, min(options.corruptions, len(data))))
    memory = peak_memory(device_of(model))
    right, robust = (f"{100 * share:.0f} %" for share in (passes.clean, passes.robust))
    rows = [
        ("images", f"{len(data):,}, in batches of {options.batch_size}"),
        ("speed", f"{1 / passes.forward:,.0f} images/s forward, {1 / passes.gradient:,.0f} forward and back"),
        (
            "timed images",
            f"{passes.images}: {right} right, {robust} under PGD-10",
        ),
        *((one.name, str(one)) for one in found),
        ("together", str(together(found))),
        ("peak memory", "unknown on this system" if memory is None else size(memory)),
        ("would write", f"{options.output}/: {REPORT}, {PAGE}, ..." if options.output else "nothing: no --output"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    console.print("a dry run: nothing was attacked or written", markup=False)
    console.print("\n".join(f"{name:<{width}}{text}" for name, text in rows), markup=False)
    console.print(
        "Later attacks work on what earlier ones left: 'about' takes the share that PGD-10 left of the timed images, "
        "'at most' breaks none.",
        markup=False,
    )


def _check_attacked(options: argparse.Namespace) -> None:
    """Refuse what --attacked, which attacks nothing and writes nothing, has no use for."""
    parser = evaluate_parser()
    used = ("model", "checkpoint", "num_classes", "model_args", "attacked", "device", "classes")
    for name, value in vars(options).items():
        if name not in used and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing with --attacked, which only tries the images of another "
                "evaluation; leave it out"
            )


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot work before models and images are loaded."""
    norm = options.norm or NORM  # and what cannot work in the model's own ball is refused when that is known
    eps = EPS if options.norm is None or options.eps is None else options.eps
    check_names(options.attacks, norm, eps, sources=bool(options.transfer_from))
    if options.transfer_from and not {"adaptive", "transfer"} & set(options.attacks):
        raise ValueError("--transfer-from is for the attacks 'adaptive' and 'transfer'; name one with --attacks")
    check_extras(norm, evidence_images=options.evidence, corruption_images=options.corruptions)
    needs_folder = {
        "--save-images": options.save_images,
        "--evidence": options.evidence,
        "--corruptions": options.corruptions,
        "--overwrite": options.overwrite,
    }
    for flag, given in needs_folder.items():
        if given and not options.output:
            raise ValueError(f"{flag} needs a folder to write to; add --output FOLDER")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size} must be 1 or more")
    if options.output:
        if Path(options.output).suffix in (".json", ".html") or Path(options.output).is_file():
            raise ValueError(f"--output takes a folder, for several files, but {options.output} is a file's name")
        with nullcontext() if options.dry_run else staged(Path(options.output)):
            pass  # a folder that cannot be written is better known before the attacks run than after


def _check_threat(options: argparse.Namespace) -> None:
    """Refuse attacks that the norm and eps in use do not have."""
    check_names(options.attacks, options.norm, options.eps, sources=bool(options.transfer_from))
    check_extras(options.norm, evidence_images=options.evidence, corruption_images=options.corruptions)


def _load_images(options: argparse.Namespace, model: nn.Module, *, progress: bool) -> ImageData:
    """The images as the model was trained on them, as far as the flags do not say otherwise."""
    size, channels = options.size, options.channels
    crop = None
    known = input_size(model)
    if known is not None:
        channels = channels or (known[0] if known[0] in (1, 3) else None)
        if size is None and options.checkpoint is None:  # a file of weights does not say what they were trained on
            size = known[1:]
            crop = None if saved_here(options.model) else own_crop(model)
    if size is not None:  # before the images are decoded to it
        sides = (size, size) if isinstance(size, int) else size
        check_image_memory(as_pixel_model(model), (channels or 1, *sides))
    try:
        data = load_data(
            options.data,
            options.split,
            config=options.config,
            image_column=options.image_column,
            label_column=options.label_column,
            size=size,
            channels=channels,
            mixed_size=None if known is None else known[1:],
            crop=crop,
            class_order=_class_order(options, model),
            limit=options.limit,
            on_error=options.on_error,
            progress=progress,
        )
    except BrokenImagesError as error:
        raise BrokenImagesError(error.found, "add --on-error skip to go on without such images") from error
    try:
        check_runs(as_pixel_model(model), data.image_size)
    except ImageSizeError as error:
        raise ValueError(f"{error}; choose another side with --size") from error
    return data


def _class_order(options: argparse.Namespace, model: nn.Module) -> str:
    """How class folders are numbered: labels of a model that knows its classes are matched by name in any case."""
    if options.class_order is not None:
        return str(options.class_order)
    if class_names(model) is not None:
        return "codepoint"
    return "timm" if options.checkpoint is not None or not saved_here(options.model) else "codepoint"


def _say_before(
    options: argparse.Namespace,
    model: nn.Module,
    data: ImageData,
    classes: Sequence[str] | None,
    console: Console,
) -> tuple[str, ...]:
    """Print, before any attack, how labels are read; returns the sentences that the report will have too."""
    notes = judged_data(model, data, classes).notes
    order = _class_order(options, model)
    other = other_class_order(data.classes, order)
    if class_names(model) is None and classes is None and is_image_folder(options.data) and other is not None:
        console.print(
            f"the model knows no names of its classes: class folders are numbered in the order of {order} "
            f"({_few(data.classes)}); --class-order {other[0]} would be {_few(other[1])}",
            markup=False,
        )
    if (
        data.stored is not None
        and data.stored != data.image_size
        and (options.size is None or options.channels is None)
    ):
        before = size_text(data.stored)
        console.print(f"images are shown to the model as {size_text(data.image_size)}; the first is {before}")
    if data.crop is not None:
        console.print(
            f"images of another size are scaled and cropped as the model's configuration says ({data.crop}); --size "
            "scales them whole"
        )
    for note in notes:
        console.print(note, markup=False)
    return notes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _rescore(options: argparse.Namespace, console: Console) -> None:
    model = load_model(options, options.device or default_device())
    classes = None if options.classes is None else read_classes(options.classes)
    outcomes = rescore(model, options.attacked, classes=classes)
    for note in dict.fromkeys(note for outcome in outcomes.values() for note in outcome.notes):
        console.print(note, markup=False)
    for suite, outcome in outcomes.items():
        console.print(f"{options.model} on images attacked by {suite}: {outcome.sentence()}", markup=False)


def _print_report(report: Report, options: argparse.Namespace, console: Console, said: Sequence[str]) -> None:
    for name in (*report.correct, WORST_CASE):
        accuracy, (low, high) = report.accuracy_of(name), report.interval(name)
        console.print(
            f"{name.replace('_', ' '):>20}  {100 * accuracy:6.2f} %  [{100 * low:.1f}, {100 * high:.1f}]", markup=False
        )
    findings = [f"{finding['level']}: {finding['text']}" for finding in report.evidence.get("findings", ())]
    for line in (*(note for note in report.notes if note not in said), *findings):
        console.print(line, markup=False)
    console.print(f"{options.model} on {report.conditions['data']}: {report.summary()}", markup=False)
    if options.output:
        console.print(f"results in {options.output}: {REPORT}, {PAGE}", markup=False)
