"""Trains, attacks and packs robust checkpoints by one command, which goes on where it was until all is done.

    python recipes/checkpoints.py --config recipes/cifar10_resnet18_one_cycle.yaml --data.source=FOLDER --speed
        --methods none fsr trades/none trades/fsr --release fsr trades/fsr --suffix cifar10 --seeds 0 --images 1000
        --attacks pgd20 pgd100 official standard adaptive --official CODE --minutes 9 --output OUTPUT

The options of compare/compare.py are options here too. In their order, and each only if it has not been done:

1. `--speed`: the training step is timed, beside that of the official code if `--official` has a checkout of it, and the
   share of the machine's peak that it reaches is measured (`speed.json`, `peak.json`).
2. The comparison (see compare/compare.py), then images per second and share of the peak of each training
   (`throughput.json`).
3. For each method of `--release`: of its seeds, the one with the best robust accuracy on the *held-out* images, its
   weights rounded to half precision, and these attacked anew. Rounding that costs images of the worst case beyond
   chance (McNemar's test) is given up. `hub/<architecture>.<objective>_<suffix>/` then has weights, configuration,
   report, recipe and card, and `baseline.json` beside them if the plain network was compared.
4. `--pack 15`: everything but the states to resume from in one archive, in parts of at most 15 MiB, with checksums:
   `cat results.tar.* | tar x`, `sha256sum -c SHA256SUMS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from compare.compare import UNFINISHED, Entry, TimeIsUpError, compare, parse_args, parser, test_images, time_limit
from cost import forward_flops, passes

import timm_fsr
from timm_fsr.assessment import assess
from timm_fsr.cards import check_card, render_card
from timm_fsr.engine import InterruptedRunError
from timm_fsr.files import write_text
from timm_fsr.hub import load
from timm_fsr.page import mcnemar
from timm_fsr.parts import publishable, read_parts
from timm_fsr.recipe import Recipe
from timm_fsr.report import WORST_CASE, Report

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NOT_PACKED = ("checkpoints", "last", "pack")


def measure_speed(base: Recipe, args: argparse.Namespace) -> None:
    """Time the training step and measure the peak, each in a process of its own."""
    device, batch = args.device, str(base.optim.batch_size)
    compiled = [f"--compile={base.compile}"] if base.compile else []
    common = ["--device", device, "--batch", batch, "--steps", str(base.attack.steps), *compiled]
    model = ["--model", base.model.name]
    official = ["--official", str(args.official)] if args.official else model
    own = [*model, "--precision", base.mixed_precision]
    for script, name, arguments in (("training_step", "speed", official), ("profile_step", "peak", own)):
        path = args.output / f"{name}.json"
        if not path.exists():
            command = [str(BENCHMARKS / f"{script}.py"), *common, *arguments, "--rounds", "3", "--json", str(path)]
            subprocess.run([sys.executable, *command], check=True)


def measure_throughput(base: Recipe, entries: Sequence[Entry], args: argparse.Namespace) -> None:
    """Images per second of each training, validation included, and the share of the peak if that was measured."""
    peak = args.output / "peak.json"
    flops_per_second = json.loads(peak.read_text())["peak_flops"] if peak.exists() else None
    data, _ = base.data.build(seed=base.seed, progress=False)
    rows = {}
    for entry in entries:
        recipe, lines = entry.recipe(base, args.output), metrics(entry, args)
        seconds = sum(line["seconds"] for line in lines)
        images = len(data) * len(lines)
        flops = images * passes(recipe) * forward_flops(recipe, data.num_classes, data.image_size)
        rows[entry.folder] = {"images_per_second": round(images / seconds, 1), "flops_per_second": flops / seconds}
        share = ""
        if flops_per_second:
            rows[entry.folder]["share_of_peak"] = round(flops / seconds / flops_per_second, 4)
            share = f", {100 * flops / seconds / flops_per_second:.1f} % of the peak"
        print(f"{entry.folder}: {images / seconds:.0f} images per second{share}", flush=True)
    write_text(args.output / "throughput.json", json.dumps(rows, indent=1) + "\n")


def metrics(entry: Entry, args: argparse.Namespace) -> list[dict[str, float]]:
    """What training has noted of each epoch."""
    lines = (args.output / entry.folder / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def chosen(method: str, found: Sequence[Entry], args: argparse.Namespace) -> Entry:
    """Of a method's models, the one that the held-out images prefer; test images have no say."""

    def held_out(entry: Entry) -> tuple[float, float]:
        robust, clean = "held_out.robust_accuracy", "held_out.clean_accuracy"
        return max((line[robust], line[clean]) for line in metrics(entry, args) if robust in line)

    return max((entry for entry in found if entry.method == method), key=held_out)


def release(entry: Entry, reports: Mapping[Entry, Report], base: Recipe, args: argparse.Namespace) -> None:
    """Make the Hub-ready folder of one model, its weights in half precision if that costs nothing measurable."""
    training = args.output / entry.folder / "training"
    recipe = yaml.safe_load((training / "recipe.yaml").read_text())
    objective = recipe["objective"]["name"]
    model: Any = load(str(training / "best")).to(args.device)
    name = f"{model.pretrained_cfg['architecture']}.{objective}_{args.suffix}"
    folder = args.output / "hub" / name
    if (folder / "README.md").exists():
        return
    dtype = HALVES[args.dtype]
    timm_fsr.round_weights(model, dtype)
    rounded = attack(model, name, entry, base, args, args.output / entry.folder / args.dtype)
    gained, lost, chance = compared(reports[entry], rounded)
    print(f"{name} in {args.dtype}: {rounded.summary()}; +{gained} -{lost} images against float32", flush=True)
    kept = chance or gained >= lost
    report = rounded
    if not kept:
        model = load(str(training / "best")).to(args.device)
        report = attack(model, name, entry, base, args, args.output / entry.folder / "evaluation")
    timm_fsr.save_pretrained(model, folder, report=report, recipe=recipe, dtype=dtype if kept else None)
    baseline = reports.get(entry.plain) if entry.layer is not None else None
    parts, repository = read_parts(folder), f"{args.namespace}/{name}"
    card = render_card(parts, repository, baseline=baseline)
    if args.note:
        card = card.replace("\n## Use it\n", f"\n{args.note}\n\n## Use it\n", 1)
    check_card(card, parts, repository)
    if baseline is not None:
        publishable(baseline, parts.recipe).save(folder / "baseline.json")
    weights = folder / "model.safetensors"
    facts = {
        "method": entry.method,
        "seed": entry.seed,
        "dtype": args.dtype if kept else "float32",
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "worst_case": {"float32": reports[entry].worst_case, args.dtype: rounded.worst_case},
        "images_gained_and_lost_by_rounding": [gained, lost],
        "images": rounded.count,
    }
    write_text(folder / "release.json", json.dumps(facts, indent=1) + "\n")
    write_text(folder / "README.md", card)


def attack(model: Any, name: str, entry: Entry, base: Recipe, args: argparse.Namespace, folder: Path) -> Report:
    """The outcomes of all attacks on the comparison's test images, and the evidence that gradients are honest."""
    return assess(
        model,
        test_images(model, base, args),
        folder,
        norm=base.attack.norm,
        eps=base.attack.eps,
        attacks=args.attacks,
        seed=entry.seed,
        name=name,
        evidence_images=args.evidence,
        trained=Report.load(args.output / entry.folder / "training" / "report.json"),
        announce=print,
    )


def compared(before: Report, after: Report) -> tuple[int, int, bool]:
    """Images gained and lost in the worst case, and whether chance explains the difference."""
    gained, lost, more_than_chance = mcnemar(before, after, WORST_CASE)
    return gained, lost, not more_than_chance


class SplitFile:
    """A file to write to that is a row of files of at most `size` bytes each."""

    def __init__(self, folder: Path, stem: str, size: int) -> None:
        self.folder, self.stem, self.size = folder, stem, size
        self.digests: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._left = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`, beginning new files where one is full."""
        view = memoryview(data)
        while view:
            if self._left == 0:
                self.close()
                self._file, self._left = (self.folder / f"{self.stem}.{len(self.digests):02d}").open("wb"), self.size
                self.digests[Path(self._file.name).name] = ""
            assert self._file is not None
            taken = view[: self._left]
            self._file.write(taken)
            self._left -= len(taken)
            view = view[len(taken) :]
        return len(data)

    def close(self) -> None:
        """Finish the file that is written to, and note its checksum."""
        if self._file is not None:
            self._file.close()
            path = Path(self._file.name)
            self.digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            self._file = None


def pack(args: argparse.Namespace) -> None:
    """Put everything but what runs resume from into an archive in parts."""
    folder = args.output / "pack"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return None if Path(info.name).name in NOT_PACKED else info

    parts: Any = SplitFile(folder, "results.tar", int(args.pack * 2**20))
    with tarfile.open(fileobj=parts, mode="w|") as archive:
        archive.add(args.output, arcname="results", filter=wanted)
    parts.close()
    write_text(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in parts.digests.items()))
    print(f"{len(parts.digests)} part(s) in {folder}", flush=True)


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
    result.add_argument("--speed", action="store_true", help="time the training step first")
    result.add_argument(
        "--official", type=Path, metavar="FOLDER", help="a checkout of the official code to time beside"
    )
    result.add_argument("--pack", type=float, metavar="MIB", help="make an archive in parts of at most so many MiB")
    return result


def check(args: argparse.Namespace, base: Recipe) -> None:
    """Refuse what could not be released before anything is trained.

    Raises:
        ValueError: see above.
    """
    for method in args.release:
        if method not in args.methods:
            raise ValueError(f"--release {method} is none of --methods ({' '.join(args.methods)}); add it there")
    if args.release and not args.suffix:
        raise ValueError("--release needs --suffix, the data set's name in the checkpoint's tag, such as cifar10")
    if args.release and not base.evaluation.attacks:
        raise ValueError("a card needs the training's own report; set evaluation.attacks, such as [pgd20]")
    if args.release and args.shares > 1:
        raise ValueError("--release needs all models, but --part shares them out; leave it out of the last command")
    if args.places != ["own"]:
        raise ValueError("--places is for compare.py; checkpoints have their layers at their own places")
    if args.pack is not None and args.pack <= 0:
        raise ValueError(f"--pack={args.pack} leaves no room; give the MiB of a part")
    if args.official and not args.speed:
        raise ValueError("--official is timed by --speed; add it")


def main(arguments: Sequence[str]) -> int:
    """All of it in turn; 0 if all is done, 75 if the time was up before, 2 if it cannot work."""
    try:
        args, overrides = parse_args(options(), arguments)
        base = Recipe.load(args.config, overrides)
        args.output = args.output or base.folder
        check(args, base)
        args.output.mkdir(parents=True, exist_ok=True)
        code = 0
        try:
            with time_limit(args.minutes):
                if args.speed:
                    measure_speed(base, args)
                reports = compare(base, args)
                measure_throughput(base, list(reports), args)
                for method in args.release:
                    release(chosen(method, list(reports), args), reports, base, args)
        except (TimeIsUpError, InterruptedRunError):
            print("the time is up; the same command goes on from here", flush=True)
            code = UNFINISHED
        if args.pack:
            pack(args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
