"""timm-fsr evaluate: attack a model and report its robust accuracy."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from timm_fsr.cli.extensions import IMPORT_HELP
from timm_fsr.cli.help import HelpFormatter
from timm_fsr.cli.threat import EPS, NORM, check_data, fill_data, fill_threat
from timm_fsr.data.dataset import ON_ERROR, ImageData, load_data
from timm_fsr.data.decoding import BrokenImagesError
from timm_fsr.data.folders import CLASS_ORDERS, other_class_order
from timm_fsr.data.sources import EMBEDDED, is_image_folder
from timm_fsr.evaluation.benchmark import PAGE, REPORT, assess, check_extras
from timm_fsr.evaluation.classes import judged_data, read_classes
from timm_fsr.evaluation.evaluator import Standing, evaluate
from timm_fsr.evaluation.inference import BATCH_SIZE
from timm_fsr.evaluation.registry import check_names, list_attacks
from timm_fsr.evaluation.saved_images import rescore
from timm_fsr.models.description import check_runs, class_names, input_size, own_crop, size_text
from timm_fsr.models.pixel import as_pixel_model
from timm_fsr.models.saving import load, saved_here, training_recipe, training_report
from timm_fsr.reports.report import WORST_CASE, Report, format_eps
from timm_fsr.training.parsing import parse_number
from timm_fsr.utils.distributed import join_processes
from timm_fsr.utils.errors import ImageSizeError
from timm_fsr.utils.files import staged
from timm_fsr.utils.progress import bar

_EVALUATE = """Clean and robust accuracy of a model, and the evidence for it.

Norm, eps, data and split that are not given are those of the report that the model brings: the report.json in its
folder, its tag or its repository. The figure that counts is the per-image worst case of all attacks that are given.
With --output the outcomes are kept: the same command, given again after a kill or with more attacks, goes on where it
was. `accelerate launch -m timm_fsr evaluate` shares the images over processes.

Attacks (numbers are steps, "x5" restarts; "standard" is AutoAttack, "official" what the FSR repository tests):
{attacks}"""


def evaluate_command(arguments: Sequence[str]) -> None:
    """`timm-fsr evaluate MODEL`: attack a model, print the outcome, and write it to a folder if one is given."""
    options = _evaluate_parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.attacked:
        _check_attacked(options)
        _rescore(options, console)
        return
    _check_options(options)
    accelerator = join_processes()
    console.quiet = accelerator is not None and not accelerator.is_main_process
    device = _default_device() if options.device is None else options.device
    if accelerator is not None:
        if options.device is not None:
            raise ValueError("--device is for one process; `accelerate launch` gives each its own: leave it out")
        device = accelerator.device
    model = _load_model(options, device)
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
    with bar(console, "evaluation", share) as show:

        def progress(now: Standing) -> None:
            show(now.images, f"at most {100 * now.bound:.1f} % robust, {now.stage}")

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
                progress=progress,
                announce=lambda part: console.print(f"now: {part}"),
            )
        else:
            report = evaluate(model, data, **common, progress=progress)
    _print_report(report, options, console, noted)


def _evaluate_parser() -> argparse.ArgumentParser:
    attacks = textwrap.fill(", ".join(list_attacks()), 110, initial_indent="  ", subsequent_indent="  ")
    parser = argparse.ArgumentParser(
        prog="timm-fsr evaluate",
        description=_EVALUATE.format(attacks=attacks),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "model", help="a folder such as train's OUTPUT/best, or the timm name of a model with weights (hf-hub:)"
    )
    parser.add_argument(
        "--checkpoint",
        help="file of weights (.safetensors or .pth) for a model given by its timm name (default: the model's own)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        help="classes of a model whose weights come from --checkpoint (default: the architecture's)",
    )
    data = parser.add_argument_group("data")
    kinds = "a folder (images, Parquet, IDX), a file (Parquet, npz) or a Hub id"
    data.add_argument(
        "--data", help=f"{EMBEDDED} (embedded), {kinds} (default: that of the model's report, else {EMBEDDED})"
    )
    data.add_argument("--split", help="of the data (default: that of the model's report, else test)")
    data.add_argument(
        "--config", help="configuration of a Hub data set (default: the one of the model's recipe, or its only one)"
    )
    data.add_argument("--image-column", help="column of the images (default: found by its usual names)")
    data.add_argument("--label-column", help="column of the labels (default: found by its usual names)")
    data.add_argument(
        "--size", type=int, help="scale and centre-crop the images to this side (default: that of the model's training)"
    )
    data.add_argument("--channels", type=int, choices=[1, 3], help="default: those that the model takes")
    data.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, where neither model nor data know them"
    )
    data.add_argument(
        "--class-order",
        choices=CLASS_ORDERS,
        help="order of class folders for a model that does not know the names of its classes (default: timm for "
        "--checkpoint and timm's models, codepoint for models saved by timm_fsr)",
    )
    data.add_argument(
        "--limit",
        type=int,
        help="evaluate this many images, balanced (default: as many as the model's report, else all)",
    )
    data.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="stop",
        help="images that cannot be used, such as broken files: name them all and stop, or skip and count them "
        "(default: stop)",
    )
    attack = parser.add_argument_group("attacks")
    attack.add_argument(
        "--norm", choices=["linf", "l2", "l1"], help=f"of the ball (default: that of the model's report, else {NORM})"
    )
    attack.add_argument(
        "--eps",
        type=_number,
        help=f"radius in pixels of [0, 1], such as 8/255 (default: that of the model's report, else {format_eps(EPS)})",
    )
    attack.add_argument("--attacks", nargs="*", default=["fgsm", "pgd20"], help="see above")
    attack.add_argument(
        "--transfer-from", nargs="+", default=[], metavar="MODEL", help="models to transfer attacks from"
    )
    attack.add_argument(
        "--attacked",
        metavar="FOLDER",
        help="only try the images that another evaluation has saved (default: run the attacks)",
    )
    attack.add_argument("--seed", type=int, default=0, help="of everything random in the attacks")
    attack.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"images per pass, to fit the memory (default {BATCH_SIZE})"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", help=f"folder for {REPORT}, {PAGE} and the outcomes to resume from (default: nothing is written)"
    )
    results.add_argument("--overwrite", action="store_true", help="replace what the folder holds of another evaluation")
    results.add_argument("--save-images", action="store_true", help="keep the attacked images, for --attacked")
    results.add_argument(
        "--evidence",
        type=int,
        default=0,
        metavar="IMAGES",
        help="images for the gradient masking checks",
    )
    results.add_argument(
        "--corruptions",
        type=int,
        default=0,
        metavar="IMAGES",
        help="images for common corruptions (15 kinds, 5 severities)",
    )
    parser.add_argument("--import", metavar="FILE_OR_MODULE", help=IMPORT_HELP)
    parser.add_argument("--device", type=_device, help=f"cpu, cuda, ... (default {_default_device()})")
    return parser


def _check_attacked(options: argparse.Namespace) -> None:
    """Refuse what --attacked, which attacks nothing and writes nothing, has no use for."""
    parser = _evaluate_parser()
    used = ("model", "checkpoint", "num_classes", "attacked", "device", "classes")
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
        with staged(Path(options.output)):
            pass  # a folder that cannot be written is better known before the attacks run than after


def _check_threat(options: argparse.Namespace) -> None:
    """Refuse attacks that the norm and eps in use do not have."""
    check_names(options.attacks, options.norm, options.eps, sources=bool(options.transfer_from))
    check_extras(options.norm, evidence_images=options.evidence, corruption_images=options.corruptions)


def _load_model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    if options.checkpoint is None:
        if options.num_classes is not None:
            raise ValueError("--num-classes belongs to --checkpoint; other weights bring their own number of classes")
        return load(options.model, pretrained=True).to(device)
    classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
    if not Path(options.checkpoint).is_file():
        raise FileNotFoundError(f"there is no file {options.checkpoint}; check the path given with --checkpoint")
    return load(options.model, pretrained=False, checkpoint_path=options.checkpoint, **classes).to(device)


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
    model = _load_model(options, options.device or _default_device())
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


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
