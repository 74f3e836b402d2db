"""Trains, attacks and packs robust checkpoints by one command, which goes on where it was until all is done.

    python recipes/compare/checkpoints.py --config recipes/cifar10_resnet18_one_cycle.yaml --data.source=FOLDER --speed
        --methods none fsr trades/none trades/fsr --release fsr trades/fsr --suffix cifar10 --seeds 0 --images 1000
        --attacks pgd20 pgd100 official standard adaptive --official CODE --minutes 9 --output OUTPUT

The options of compare.py are options here too. In their order, and each only if it has not been done:

1. `--speed`: the training step is timed, beside that of the official code if `--official` has a checkout of it, and the
   share of the machine's peak that it reaches is measured (`speed.json`, `peak.json`). It gets a third of `--minutes`.
2. The comparison (see compare.py), then the images per second of each training (`throughput.json`).
3. For each method of `--release`: of its seeds, the one with the best robust accuracy on its *held-out* images (which
   each seed draws again), its weights rounded to half precision, and these attacked again. Rounding that costs images
   of the worst case beyond chance (McNemar's test) is given up. `hub/<architecture>.<objective>_<suffix>/` then has
   weights, configuration, report, recipe and card, and `baseline.json` if the plain network was compared.
4. `--pack 15`: everything but the states to resume from in one archive, in parts of at most 15 MiB, with checksums:
   `cat results.tar.* | tar x`, `sha256sum -c SHA256SUMS`. It is made whatever happened before, also after the minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compare import (
    ERRORS,
    STOPS,
    Entry,
    compare,
    parse_args,
    parser,
    stopped,
    test_images,
    time_limit,
)
from compare import check as check_comparison
from packing import pack
from tables import in_common, restricted

import timm_fsr
from timm_fsr.evaluation.benchmark import assess, check_extras
from timm_fsr.evaluation.registry import ENSEMBLE, expand_names
from timm_fsr.hub.bundle import publishable, read_bundle
from timm_fsr.hub.card import CardOptions, check_card, check_repo_id, render_card
from timm_fsr.models.saving import load
from timm_fsr.reports.comparison import mcnemar
from timm_fsr.reports.report import WORST_CASE, Report
from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.files import file_digest, write_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS, CARD, FACTS = "model.safetensors", "README.md", "release.json"


def measure_speed(base: Recipe, args: argparse.Namespace) -> None:
    """Time the training step and measure the peak, each in a process of its own."""
    compiled = [f"--compile={base.compile}"] if base.compile else []
    steps = str(getattr(base.attack.build(), "steps", 1))
    common = [
        "--device",
        args.device,
        "--batch",
        str(base.optim.batch_size),
        "--steps",
        steps,
        "--rounds",
        "3",
        *compiled,
    ]
    model = ["--model", base.model.name]
    official = ["--official", str(args.official)] if args.official else model
    jobs = {
        "speed": ["training_step.py", *common, *official, "--no-memory"],
        "peak": ["profile_step.py", *common, *model, "--precision", base.mixed_precision],
    }
    for name, command in jobs.items():
        path, fresh = args.output / f"{name}.json", args.output / f"{name}.new"
        if path.exists() and json.loads(path.read_text())["asked"] == command:
            continue
        try:
            limit = 60 * args.minutes / 6 if args.minutes else None
            script = [sys.executable, str(BENCHMARKS / command[0]), *command[1:], "--json", str(fresh)]
            subprocess.run(script, check=True, timeout=limit, start_new_session=True)  # Ctrl-C is for this one
        except subprocess.TimeoutExpired:
            print(f"{command[0]} takes longer than a sixth of --minutes={args.minutes}: not measured", flush=True)
            continue
        write_text(path, json.dumps({"asked": command, **json.loads(fresh.read_text())}, indent=1) + "\n")
        fresh.unlink()


def measure_throughput(base: Recipe, entries: Sequence[Entry], args: argparse.Namespace) -> None:
    """Images per second of each training, validation and saving included."""
    data, _ = base.data.build(seed=base.seed, progress=False)
    rows = {}
    for entry in entries:
        lines = metrics(entry, args)
        rows[entry.folder] = round(len(data) * len(lines) / sum(line["seconds"] for line in lines), 1)
        print(f"{entry.folder}: trained by {rows[entry.folder]:.0f} images per second", flush=True)
    write_text(args.output / "throughput.json", json.dumps(rows, indent=1) + "\n")


def metrics(entry: Entry, args: argparse.Namespace) -> list[dict[str, float]]:
    """What training has noted of each epoch."""
    lines = (args.output / entry.folder / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def chosen(method: str, found: Sequence[Entry], args: argparse.Namespace) -> Entry:
    """Of a method's models, the one that its held-out images prefer; test images have no say."""

    def held_out(entry: Entry) -> tuple[float, float]:
        robust, clean = "held_out.robust_accuracy", "held_out.clean_accuracy"
        return max((line[robust], line[clean]) for line in metrics(entry, args) if robust in line)

    return max((entry for entry in found if entry.method == method), key=held_out)


def release(entry: Entry, reports: Mapping[Entry, Report], base: Recipe, args: argparse.Namespace) -> None:
    """Make the Hub-ready folder of one model, its weights in half precision if that costs nothing measurable.

    Args:
        entry: the model.
        reports: of all models, by the same attacks.
        base: what they have in common.
        args: the options.
    """
    best = args.output / entry.folder / "training" / "best"
    model: Any = load(str(best)).to(args.device)
    recipe = yaml.safe_load((best.parent / "recipe.yaml").read_text())
    name = f"{model.pretrained_cfg['architecture']}.{tag(entry, base, args)}"
    folder, repository = args.output / "hub" / name, f"{args.namespace}/{name}"
    baseline = reports.get(entry.plain) if entry.layer is not None else None
    asked = {
        "method": entry.method,
        "seed": entry.seed,
        "seeds": sorted(args.seeds),
        "trained_sha256": file_digest(best / WEIGHTS),
        "dtype": args.dtype,
        "attacks": list(reports[entry].attacks),
        "images": args.images,
        "evidence": args.evidence,
        "corruptions": args.corruptions,
        "repository": repository,
        "note": args.note,
        "baseline": None if baseline is None else baseline.conditions["weights_sha256"],
    }
    if (folder / CARD).exists() and json.loads((folder / FACTS).read_text())["asked"] == asked:
        return
    for stale in (CARD, FACTS, "baseline.json"):  # the card first: it is what calls a folder finished
        (folder / stale).unlink(missing_ok=True)
    report, dtype, measured = halved(model, name, entry, reports[entry], base, args)
    timm_fsr.save_pretrained(
        load(str(best)) if dtype is None else model,
        folder,
        report=report,
        recipe=recipe,
        license="apache-2.0",  # ours, as the package is
        dtype=dtype,
    )
    bundle = read_bundle(folder)
    card = render_card(bundle, repository, CardOptions(baseline=baseline))
    remarks = [args.note] if args.note else []
    if len(args.seeds) > 1:
        seeds = ", ".join(map(str, sorted(args.seeds)))
        remarks.append(
            f"Of the trainings with the seeds {seeds}, this is the one (seed {entry.seed}) with the best robust "
            "accuracy on its held-out training images."
        )
    card = card.replace("\n## Use it\n", "\n".join(f"\n{remark}\n" for remark in remarks) + "\n## Use it\n", 1)
    check_card(card, bundle, repository)
    if baseline is not None:
        publishable(baseline, bundle.recipe).save(folder / "baseline.json")
    file = {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": file_digest(folder / WEIGHTS)}
    write_text(folder / FACTS, json.dumps({"asked": asked, **measured, **file}, indent=1) + "\n")
    write_text(folder / CARD, card)


def tag(entry: Entry, base: Recipe, args: argparse.Namespace) -> str:
    """What follows the architecture in a checkpoint's name."""
    return f"{entry.objective or base.objective.name}_{args.suffix}"


def halved(
    model: Any, name: str, entry: Entry, report: Report, base: Recipe, args: argparse.Namespace
) -> tuple[Report, torch.dtype | None, dict[str, Any]]:
    """Round the model's weights, in place, and attack it again.

    Returns:
        What is to be published: the report, of the rounded model or the original one, and the precision of its weights
        (None is float32); and what rounding did.
    """
    worst_case = {"float32": report.worst_case}
    before: dict[str, Any] = {"images": report.count, "worst_case": worst_case}
    try:
        timm_fsr.round_weights(model, HALVES[args.dtype])
    except ValueError as error:
        print(f"{name} stays in float32: {error}", flush=True)
        return evidence(report, name, entry, base, args), None, {**before, "rounded": False}
    rounded = attack(model, name, entry, report, base, args, args.output / entry.folder / args.dtype)
    gained, lost, chance = compared(report, rounded)
    print(f"{name} in {args.dtype}: {rounded.summary()}; +{gained} -{lost} images against float32", flush=True)
    worst_case[args.dtype] = rounded.worst_case
    facts = {**before, "rounded": chance or gained >= lost, "images_gained_and_lost_by_rounding": [gained, lost]}
    if facts["rounded"]:
        return rounded, HALVES[args.dtype], facts
    return evidence(report, name, entry, base, args), None, facts


def evidence(report: Report, name: str, entry: Entry, base: Recipe, args: argparse.Namespace) -> Report:
    """The report of the unrounded model, with the evidence of honest gradients and the corruptions."""
    model = load(str(args.output / entry.folder / "training" / "best")).to(args.device)
    return attack(model, name, entry, report, base, args, args.output / entry.folder / "evaluation")


def attack(
    model: Any, name: str, entry: Entry, like: Report, base: Recipe, args: argparse.Namespace, folder: Path
) -> Report:
    """The outcomes of the attacks of another report on the comparison's test images, evidence and corruptions."""
    report = assess(
        model,
        test_images(model, base, args),
        folder,
        norm=base.attack.norm,
        eps=base.attack.eps,
        attacks=[key for key in like.attacks if key != ENSEMBLE],
        seed=entry.seed,
        name=name,
        evidence_images=args.evidence,
        corruption_images=args.corruptions,
        trained=Report.load(args.output / entry.folder / "training" / "report.json"),
        announce=print,
    )
    return restricted(report, set(like.correct))


def compared(before: Report, after: Report) -> tuple[int, int, bool]:
    """Images gained and lost in the worst case, and whether chance explains the difference."""
    gained, lost, more_than_chance = mcnemar(before, after, WORST_CASE)
    return gained, lost, not more_than_chance


def options() -> argparse.ArgumentParser:
    """The command line: that of compare.py and what belongs to releases."""
    result = parser(__doc__)
    result.add_argument(
        "--release", nargs="*", default=[], metavar="METHOD", help="of --methods, what becomes a folder"
    )
    result.add_argument("--suffix", default="", help="what follows the objective in a checkpoint's tag: its data set")
    result.add_argument("--namespace", default="timm-fsr", help="of the repositories that the cards name")
    result.add_argument("--note", default="", help="a paragraph for each card")
    result.add_argument("--dtype", default="float16", choices=HALVES, help="half precision of the weights")
    result.add_argument("--evidence", type=int, default=0, metavar="IMAGES", help="evidence of honest gradients")
    result.add_argument(
        "--corruptions", type=int, default=0, metavar="IMAGES", help="accuracy under common corruptions"
    )
    result.add_argument("--speed", action="store_true", help="time the training step first")
    result.add_argument(
        "--official", type=Path, metavar="FOLDER", help="a checkout of the official code to time beside"
    )
    result.add_argument("--pack", type=float, metavar="MIB", help="make an archive in parts of at most this many MiB")
    return result


def check(args: argparse.Namespace, base: Recipe) -> None:
    """Refuse what could not be released before anything is trained.

    Raises:
        ValueError: see above.
    """
    check_comparison(base, args)
    if args.places != ["own"]:
        raise ValueError("--places is for compare.py; checkpoints have their layers at their own places")
    if args.pack is not None and args.pack <= 0:
        raise ValueError(f"--pack={args.pack} leaves no room; give the MiB of a part")
    if args.official and not args.speed:
        raise ValueError("--official is timed by --speed; add it")
    if args.shares > 1 and (args.release or args.speed or args.pack):
        raise ValueError(
            "--part is for the training and the attacks; leave --release, --speed and --pack out beside it"
        )
    if args.speed and base.mixed_precision == "fp16":
        raise ValueError("--speed knows float32 and bf16; set mixed_precision=bf16, or leave --speed out")
    if args.release:
        _check_release(args, base)


def _check_release(args: argparse.Namespace, base: Recipe) -> None:
    names: dict[tuple[str | None, str], str] = {}
    for method in args.release:
        if method not in args.methods:
            raise ValueError(f"--release {method} is none of --methods ({' '.join(args.methods)}); add it there")
        entry = Entry(method, "own", 0)
        key = (entry.layer, tag(entry, base, args))
        if key in names:
            raise ValueError(f"--release {names[key]} and {method} would have the same name; release one of them")
        names[key] = method
        check_repo_id(f"{args.namespace}/{base.model.name}.{key[1]}")
    if not args.suffix:
        raise ValueError("--release needs --suffix, the data set's name in the checkpoint's tag, such as cifar10")
    if not expand_names(args.attacks):
        raise ValueError("--release needs --attacks: without any a card could not say how robust the model is")
    check_extras(base.attack.norm, evidence_images=args.evidence, corruption_images=args.corruptions)
    if not base.evaluation.attacks:
        raise ValueError("a card needs the training's own report; set evaluation.attacks, such as [pgd20]")


def work(base: Recipe, args: argparse.Namespace) -> None:
    """Everything but the archive."""
    if args.speed:
        measure_speed(base, args)
    found = compare(base, args)
    measure_throughput(base, list(found), args)
    reports, _ = in_common(found)
    for method in args.release:
        release(chosen(method, list(reports), args), reports, base, args)


def main(arguments: Sequence[str]) -> int:
    """All of it in turn; 0 if all is done, 75 if the time was up before, 2 if it cannot work, 130 after Ctrl-C."""
    try:
        args, overrides = parse_args(options(), arguments)
        base = Recipe.load(args.config, overrides)
        args.output = args.output or base.folder
        check(args, base)
        args.output.mkdir(parents=True, exist_ok=True)
        try:
            with time_limit(args.minutes):
                work(base, args)
        finally:
            if args.pack:
                pack(args.output, args.pack)
    except STOPS as stop:
        return stopped(stop)
    except (*ERRORS, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
