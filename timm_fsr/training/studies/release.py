"""The release of robust checkpoints: trained, attacked, rounded, described by a card, and packed into an archive.

In this order, and each only if it has not been done:

1. With `speed`: the training step is timed, with that of the official code if there is a checkout of it, and the
   share of the machine's peak that it reaches is measured (`speed.json`, `peak.json`). It gets a third of the minutes.
2. The comparison, then the images per second of each training (`throughput.json`).
3. For each method to be released: of its seeds, the one with the best robust accuracy on its *held-out* images (which
   each seed draws again), its weights rounded to half precision, and these attacked again. Rounding that costs images
   of the worst case beyond chance (McNemar's test) is given up. `hub/<architecture>.<objective>_<suffix>/` then has
   weights, configuration, report, recipe and card, and `baseline.json` if the plain network was compared.
4. With `pack`: everything but the states to resume from in one archive, in parts of at most that many MiB, with
   checksums: `cat results.tar.* | tar x`, `sha256sum -c SHA256SUMS`. It is made whatever happened before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_fsr.evaluation.benchmark import assess, check_extras
from timm_fsr.evaluation.registry import ENSEMBLE, expand_names
from timm_fsr.hub.bundle import publishable, read_bundle
from timm_fsr.hub.card import CardOptions, check_card, check_license, check_repo_id, render_card
from timm_fsr.models.saving import load, round_weights, save_pretrained
from timm_fsr.reports.comparison import mcnemar
from timm_fsr.reports.report import WORST_CASE, Report
from timm_fsr.training.metrics import read_metrics
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies.compare import Comparison
from timm_fsr.training.studies.entries import OWN, Entry
from timm_fsr.training.studies.packing import pack
from timm_fsr.training.studies.speed import check_speed, measure_speed
from timm_fsr.training.studies.study import EVALUATION, TRAINING, Study, say
from timm_fsr.training.studies.tables import in_common, restricted
from timm_fsr.utils.files import file_digest, write_text

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LICENSE = "apache-2.0"  # as the package has
WEIGHTS, CARD, FACTS = "model.safetensors", "README.md", "release.json"


@dataclass(frozen=True)
class Checkpoint:
    """What becomes a folder for the Hub.

    Attributes:
        name: of the folder and the repository.
        entry: the model of the comparison that it is.
    """

    name: str
    entry: Entry

    @property
    def title(self) -> str:
        """What it is made of."""
        return f"{self.name} from {self.entry.title}"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Checkpoints of a comparison, made ready for the Hub.

    Attributes:
        comparison: which models are trained and attacked.
        methods: of its methods, those that become a folder.
        suffix: what follows the objective in a checkpoint's tag: the name of its data set.
        namespace: of the repositories that the cards name.
        note: a paragraph for each card.
        dtype: "float16" or "bfloat16", the half precision of the weights.
        evidence: images for the gradient masking checks; 0 leaves them out.
        corruptions: images for the accuracy under common corruptions; 0 leaves it out.
        speed: time the training step first, by the checkout's benchmarks.
        official: a checkout of the official code, to time it too.
        minutes: of the whole command, of which each timing gets a sixth; None sets no limit.
        license: of the weights, as the Hub names it.
        pack: MiB of a part of the archive; None makes none.
    """

    comparison: Comparison
    methods: Sequence[str] = ()
    suffix: str = ""
    namespace: str = "timm-fsr"
    note: str = ""
    dtype: str = "float16"
    evidence: int = 0
    corruptions: int = 0
    speed: bool = False
    official: Path | None = None
    minutes: float | None = None
    license: str = LICENSE
    pack: float | None = None

    @property
    def base(self) -> Recipe:
        """What all trainings have in common."""
        return self.comparison.base

    @property
    def output(self) -> Path:
        """Folder of the results."""
        return self.comparison.output

    def check(self) -> None:
        """Refuse what could not be released before anything is trained.

        Raises:
            ValueError: see above.
            ImportError: an evaluation needs a package that is not installed.
        """
        self.comparison.check()
        if list(self.comparison.places) != [OWN]:
            raise ValueError("--places is for `timm-fsr compare`; checkpoints have their layers at their own places")
        if self.pack is not None and self.pack <= 0:
            raise ValueError(f"--pack={self.pack} leaves no room; give the MiB of a part")
        if self.official and not self.speed:
            raise ValueError("--official is timed by --speed; add it")
        if self.comparison.part[1] > 1 and (self.methods or self.speed or self.pack):
            raise ValueError(
                "--part is for training and attacks alone; leave out --release, --speed and --pack, or leave out --part"
            )
        if self.speed:
            check_speed(self.base)
        if self.methods:
            self._check_methods()

    def run(self) -> None:
        """Do all of it but the archive. The errors are those of `Comparison.run` and `measure_speed`."""
        if self.speed:
            device = self.comparison.device
            measure_speed(self.base, self.output, device=device, official=self.official, minutes=self.minutes)
        found = self.comparison.run()
        self._measure_throughput(list(found))
        reports, _ = in_common(found)
        Study(
            folder=self.output / "hub",
            trials=[self._checkpoint(self._chosen(method, list(reports))) for method in self.methods],
            work=lambda checkpoint: release(checkpoint, reports, self),
            after=lambda _: None,
        ).run()

    def make_archive(self) -> None:
        """Pack what there is, if asked for."""
        if self.pack:
            pack(self.output, self.pack)

    def tag(self, entry: Entry) -> str:
        """What follows the architecture in a checkpoint's name."""
        return f"{entry.objective or self.base.objective.name}_{self.suffix}"

    def _checkpoint(self, entry: Entry) -> Checkpoint:
        config = json.loads((self.output / entry.name / TRAINING / "best" / "config.json").read_text())
        return Checkpoint(f"{config['architecture']}.{self.tag(entry)}", entry)

    def _check_methods(self) -> None:
        names: dict[tuple[str | None, str], str] = {}
        for method in self.methods:
            if method not in self.comparison.methods:
                listed = " ".join(self.comparison.methods)
                raise ValueError(f"--release {method} is none of --methods ({listed}); add it there")
            entry = Entry(method, OWN, 0)
            key = (entry.layer, self.tag(entry))
            if key in names:
                raise ValueError(f"--release {names[key]} and {method} would have the same name; release one of them")
            names[key] = method
            check_repo_id(f"{self.namespace}/{self.base.model.name}.{key[1]}")
        check_license(self.license)
        if not self.suffix:
            raise ValueError("--release needs --suffix, the data set's name in the checkpoint's tag, such as cifar10")
        if not expand_names(self.comparison.attacks):
            raise ValueError("--release needs --attacks: without any a card could not say how robust the model is")
        check_extras(self.base.attack.norm, evidence_images=self.evidence, corruption_images=self.corruptions)
        if not self.base.evaluation.attacks:
            raise ValueError("a card needs the training's own report; set evaluation.attacks, such as [pgd20]")

    def _measure_throughput(self, entries: Sequence[Entry]) -> None:
        """Images per second of each training, validation and saving included."""
        data, _ = self.base.data.build(seed=self.base.seed, progress=False)
        rows = {}
        for entry in entries:
            lines = self._metrics(entry)
            rows[entry.name] = round(len(data) * len(lines) / sum(line["seconds"] for line in lines), 1)
            say(f"{entry.name}: trained by {rows[entry.name]:.0f} images per second")
        write_text(self.output / "throughput.json", json.dumps(rows, indent=1) + "\n")

    def _metrics(self, entry: Entry) -> list[dict[str, float]]:
        """What training has noted of each epoch."""
        return read_metrics(self.output / entry.name / TRAINING)

    def _chosen(self, method: str, found: Sequence[Entry]) -> Entry:
        """Of a method's models, the one that its held-out images prefer; test images have no say."""

        def held_out(entry: Entry) -> tuple[float, float]:
            robust, clean = "held_out.robust_accuracy", "held_out.clean_accuracy"
            return max((line[robust], line[clean]) for line in self._metrics(entry) if robust in line)

        return max((entry for entry in found if entry.method == method), key=held_out)


def release(checkpoint: Checkpoint, reports: Mapping[Entry, Report], plan: Release) -> None:
    """Make the Hub-ready folder of one model, its weights in half precision if that costs nothing measurable.

    Args:
        checkpoint: the model, and what it is to be called.
        reports: of all models, by the same attacks.
        plan: what is released, and how.
    """
    name, entry = checkpoint.name, checkpoint.entry
    best = plan.output / entry.name / TRAINING / "best"
    folder, repository = plan.output / "hub" / name, f"{plan.namespace}/{name}"
    baseline = reports.get(entry.plain) if entry.layer is not None else None
    asked = _asked(entry, reports[entry], baseline, repository, plan)
    if (folder / CARD).exists() and json.loads((folder / FACTS).read_text())["asked"] == asked:
        return
    for stale in (CARD, FACTS, "baseline.json"):  # the card first: it is what calls a folder finished
        (folder / stale).unlink(missing_ok=True)
    model: Any = load(str(best)).to(plan.comparison.device)
    report, dtype, measured = halved(model, name, entry, reports[entry], plan)
    save_pretrained(
        load(str(best)) if dtype is None else model,
        folder,
        report=report,
        recipe=yaml.safe_load((best.parent / "recipe.yaml").read_text()),
        license=plan.license,
        dtype=dtype,
    )
    bundle = read_bundle(folder)
    card = _with_remarks(render_card(bundle, repository, CardOptions(baseline=baseline)), entry, plan)
    check_card(card, bundle, repository)
    if baseline is not None:
        publishable(baseline, bundle.recipe).save(folder / "baseline.json")
    file = {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": file_digest(folder / WEIGHTS)}
    write_text(folder / FACTS, json.dumps({"asked": asked, **measured, **file}, indent=1) + "\n")
    write_text(folder / CARD, card)


def _asked(entry: Entry, report: Report, baseline: Report | None, repository: str, plan: Release) -> dict[str, Any]:
    """What decides the contents of a folder, as plain values: one that was made of the same is finished."""
    return {
        "method": entry.method,
        "seed": entry.seed,
        "seeds": sorted(plan.comparison.seeds),
        "trained_sha256": file_digest(plan.output / entry.name / TRAINING / "best" / WEIGHTS),
        "dtype": plan.dtype,
        "attacks": list(report.attacks),
        "images": plan.comparison.images,
        "evidence": plan.evidence,
        "corruptions": plan.corruptions,
        "repository": repository,
        "note": plan.note,
        "baseline": None if baseline is None else baseline.conditions["weights_sha256"],
        **({} if plan.license == LICENSE else {"license": plan.license}),  # older folders do not name it
    }


def _with_remarks(card: str, entry: Entry, plan: Release) -> str:
    """The card with the user's note, and with how the model was chosen, above its use."""
    remarks = [plan.note] if plan.note else []
    if len(plan.comparison.seeds) > 1:
        seeds = ", ".join(map(str, sorted(plan.comparison.seeds)))
        remarks.append(
            f"Of the trainings with the seeds {seeds}, this is the one (seed {entry.seed}) with the best robust "
            "accuracy on its held-out training images."
        )
    return card.replace("\n## Use it\n", "\n".join(f"\n{remark}\n" for remark in remarks) + "\n## Use it\n", 1)


def halved(
    model: Any, name: str, entry: Entry, report: Report, plan: Release
) -> tuple[Report, torch.dtype | None, dict[str, Any]]:
    """Round the model's weights, in place, and attack it again.

    Returns:
        What is to be published: the report, of the rounded model or the original one, and the precision of its weights
        (None is float32); and what rounding did.
    """
    worst_case = {"float32": report.worst_case}
    before: dict[str, Any] = {"images": report.count, "worst_case": worst_case}
    try:
        round_weights(model, HALVES[plan.dtype])
    except ValueError as error:
        say(f"{name} stays in float32: {error}")
        return evidence(report, name, entry, plan), None, {**before, "rounded": False}
    rounded = attack(model, name, entry, report, plan, plan.output / entry.name / plan.dtype)
    gained, lost, chance = compared(report, rounded)
    say(f"{name} in {plan.dtype}: {rounded.summary()}; +{gained} -{lost} images against float32")
    worst_case[plan.dtype] = rounded.worst_case
    facts = {**before, "rounded": chance or gained >= lost, "images_gained_and_lost_by_rounding": [gained, lost]}
    if facts["rounded"]:
        return rounded, HALVES[plan.dtype], facts
    return evidence(report, name, entry, plan), None, facts


def evidence(report: Report, name: str, entry: Entry, plan: Release) -> Report:
    """The report of the unrounded model, with the evidence of honest gradients and the corruptions."""
    model = load(str(plan.output / entry.name / TRAINING / "best")).to(plan.comparison.device)
    return attack(model, name, entry, report, plan, plan.output / entry.name / EVALUATION)


def attack(model: Any, name: str, entry: Entry, like: Report, plan: Release, folder: Path) -> Report:
    """The outcomes of the attacks of another report on the comparison's test images, evidence and corruptions."""
    report = assess(
        model,
        plan.comparison.test_images(model),
        folder,
        norm=plan.base.attack.norm,
        eps=plan.base.attack.eps,
        attacks=[key for key in like.attacks if key != ENSEMBLE],
        seed=entry.seed,
        name=name,
        evidence_images=plan.evidence,
        corruption_images=plan.corruptions,
        trained=Report.load(plan.output / entry.name / TRAINING / "report.json"),
        announce=say,
    )
    return restricted(report, set(like.correct))


def compared(before: Report, after: Report) -> tuple[int, int, bool]:
    """Images gained and lost in the worst case, and whether chance explains the difference."""
    gained, lost, more_than_chance = mcnemar(before, after, WORST_CASE)
    return gained, lost, not more_than_chance
