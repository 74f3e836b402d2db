"""The whole assessment of a model in one folder: attacks, gradient masking checks, corruptions, examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from timm_fsr.attacks.autoattack import implementation
from timm_fsr.attacks.base import NORMS
from timm_fsr.attacks.pgd import PGD
from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.classes import match_classes
from timm_fsr.evaluation.corruptions import CORRUPTIONS, corruption_accuracy
from timm_fsr.evaluation.corruptions import library as corruption_library
from timm_fsr.evaluation.evaluator import Standing, evaluate
from timm_fsr.evaluation.examples import draw_examples
from timm_fsr.evaluation.foreign_attacks import AttackFunction
from timm_fsr.evaluation.gradient_masking import gather_evidence
from timm_fsr.evaluation.inference import BATCH_SIZE, clean_logits
from timm_fsr.evaluation.registry import Suite
from timm_fsr.models.pixel import device_of
from timm_fsr.reports.page import Entry, render_page
from timm_fsr.reports.report import Report
from timm_fsr.reports.statistics import calibration
from timm_fsr.utils import defaults
from timm_fsr.utils.files import write_text

REPORT, EXAMPLES, PAGE, CACHE = defaults.REPORT, "examples.json", defaults.PAGE, "memo.json"
_EXAMPLE_IMAGES = 200  # among which the examples are chosen
_TRAINING = (
    "training_data",
    "training_skipped_images",
    "checkpoint_rule",
    "checkpoint_epoch",
    "training",
    "training_seed",
    "training_seconds",
    "training_hardware",
    "recipe",
)

Announce = Callable[[str], None]
Advance = Callable[[str, float], None]


def assess(
    model: nn.Module,
    data: Images,
    folder: str | Path,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    attacks: Sequence[str | Suite | AttackFunction] = ("fgsm", "pgd20"),
    seed: int = 0,
    name: str = "",
    transfer_from: Mapping[str, nn.Module] | None = None,
    evidence_images: int = 0,
    corruption_images: int = 0,
    trained: Report | None = None,
    overwrite: bool = False,
    save_images: bool = False,
    classes: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    accelerator: Accelerator | None = None,
    progress: Callable[[Standing], None] | None = None,
    announce: Announce | None = None,
    advance: Advance | None = None,
) -> Report:
    """Evaluate a model and write `report.json`, `examples.json` and `report.html` into a folder.

    Args:
        model: a timm model or a pixel-space model.
        data: the images to evaluate on, in memory (`timm_fsr.load_data`) or streamed
            (`timm_fsr.data.streaming.stream_data`).
        folder: of the results; the same evaluation, started again, goes on there. What the folder has of other attacks,
            of evidence and of corruptions on the same model and images stays in the report.
        norm: see `timm_fsr.evaluate`, as are eps, attacks, seed, name, transfer_from, overwrite, save_images,
            accelerator and progress.
        eps: radius, in pixels of [0, 1].
        attacks: by name, or as `timm_fsr.evaluate` takes them.
        seed: of everything random.
        name: of the model.
        transfer_from: other models by name.
        evidence_images: number of images, balanced, for the gradient masking checks; 0 leaves them out.
        corruption_images: number of images, balanced, for 15 corruptions in 5 severities; 0 leaves them out.
        trained: the report that training has left beside the model; what chose the checkpoint is taken from it.
        overwrite: replace what the folder holds of another evaluation.
        save_images: keep the attacked images in the folder.
        classes: names that neither model nor data know; see `timm_fsr.evaluation.classes.match_classes`.
        batch_size: images per pass; bounds the memory. It is among what decides outcomes, as random starts do.
        accelerator: shares the attacks over its processes; the first one does the rest.
        progress: called after each attack on a batch.
        announce: called with the name of each later part before it begins.
        advance: called with the name of each later part, in words, and how much of it is done, in [0, 1].

    Returns:
        The report.

    Raises:
        ValueError, ModuleNotFoundError, UnsoundError: see `timm_fsr.evaluate`.
        ImportError: `imagecorruptions` does not run, or is one that cannot be repeated.
        OSError: the folder cannot be written.
    """
    if not isinstance(data, Images):
        raise ValueError(
            f"data is {type(data).__name__}; give what timm_fsr.load_data returns, or stream_data of "
            "timm_fsr.data.streaming"
        )
    check_extras(norm, evidence_images=evidence_images, corruption_images=corruption_images)
    folder = Path(folder)
    judged, _ = match_classes(model, data, classes)
    training = {key: trained.conditions[key] for key in _TRAINING if trained and key in trained.conditions}
    say, tell = announce or (lambda _: None), advance or (lambda _, __: None)
    report = evaluate(
        model,
        data,
        norm=norm,
        eps=eps,
        attacks=attacks,
        seed=seed,
        name=name,
        conditions=training,
        transfer_from=transfer_from,
        folder=folder,
        overwrite=overwrite,
        save_images=save_images,
        classes=classes,
        batch_size=batch_size,
        accelerator=accelerator,
        progress=progress,
    )
    if accelerator is not None and not accelerator.is_main_process:
        return report
    report = _with_earlier(report, folder)
    say("calibration")
    tell("calibration", 0.0)
    report = dataclasses.replace(
        report, calibration={"clean": calibration(*clean_logits(model, judged.batches(batch_size)))}
    )
    report.save(folder / REPORT)
    cache = Cache(folder / CACHE, {**_about(report), "versions": report.conditions["versions"]})
    if evidence_images:
        some = _some(model, judged, evidence_images)
        report = dataclasses.replace(report, evidence=_evidence(model, some, report, batch_size, cache, say, tell))
        report.save(folder / REPORT)
    if corruption_images:
        say("corruptions")
        some = _some(model, judged, corruption_images)
        report = dataclasses.replace(report, corruptions=_corruptions(model, some, seed, batch_size, cache, tell))
        report.save(folder / REPORT)
    say("examples")
    tell("examples and page", 0.0)
    some = _some(model, judged, min(_EXAMPLE_IMAGES, batch_size))
    examples = _examples(model, some, judged.classes, report) if norm in NORMS else {}
    write_text(folder / EXAMPLES, json.dumps(examples) + "\n")
    write_text(folder / PAGE, render_page([Entry(name or "model", report, examples)]))
    return report


def check_extras(norm: str, *, evidence_images: int, corruption_images: int) -> None:
    """Refuse evidence and corruptions that cannot be had, before hours of attacks.

    Raises:
        ValueError: a negative number of images, or evidence in a norm that has none.
        ImportError: they need a package that is not installed, or does not run.
    """
    if min(evidence_images, corruption_images) < 0:
        raise ValueError(
            f"{evidence_images} images for the evidence and {corruption_images} for corruptions must be 0 or more"
        )
    if evidence_images:
        if norm not in NORMS:
            raise ValueError(f"there is no evidence of honest gradients for norm={norm!r}, only for {', '.join(NORMS)}")
        implementation()  # of Square
    if corruption_images:
        corruption_library()


def _about(report: Report) -> dict[str, Any]:
    """What decides evidence and corruptions."""
    known = {key: report.conditions.get(key) for key in ("model_digest", "data_fingerprint")}
    known |= {key: report.conditions[key] for key in ("labels_fingerprint",) if key in report.conditions}
    return {"norm": report.norm, "eps": report.eps, "seed": report.seed, **known}


def _evidence(
    model: nn.Module,
    some: tuple[Tensor, Tensor],
    report: Report,
    batch_size: int,
    cache: Cache,
    announce: Announce,
    advance: Advance,
) -> dict[str, Any]:
    """The evidence of honest gradients, each part of it kept as soon as it is known."""
    found = gather_evidence(
        model,
        *some,
        norm=report.norm,
        eps=report.eps,
        seed=report.seed,
        batch_size=batch_size,
        announce=announce,
        advance=lambda words, share: advance(f"gradient masking checks: {words}", share),
        once=lambda part, make: cache.once(f"{part} on {len(some[0])} images by {batch_size}", make),
    )
    if report.collapsed:  # honest or not, its gradients say nothing
        found["findings"] = [{"level": "warning", "text": report.collapsed}, *found.get("findings", ())]
    return found


def _examples(model: nn.Module, some: tuple[Tensor, Tensor], classes: Sequence[str], report: Report) -> dict[str, Any]:
    """Attacked images to look at."""
    attack = PGD(norm=report.norm, eps=report.eps, steps=20)
    return draw_examples(model, *some, classes, attack, seed=report.seed)


def _with_earlier(report: Report, folder: Path) -> Report:
    """The report with the evidence and the corruptions that an earlier one in the folder has of the same thing."""
    try:
        earlier = Report.load(folder / REPORT)
    except (FileNotFoundError, ValueError):
        return report
    if _about(earlier) != _about(report):
        return report
    return dataclasses.replace(report, evidence=earlier.evidence, corruptions=earlier.corruptions)


def _corruptions(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int, batch_size: int, cache: Cache, advance: Advance
) -> dict[str, dict[str, float]]:
    """Accuracy by kind and severity, each kind kept as soon as it is known."""

    def accuracy(kind: str) -> dict[str, float]:
        number, words = CORRUPTIONS.index(kind), f"common corruptions: {kind.replace('_', ' ')}"

        def tell(done: int, _: int) -> None:
            advance(words, (number + done / len(data[0])) / len(CORRUPTIONS))

        tell(0, 0)
        batches = zip(*(tensor.split(batch_size) for tensor in data), strict=True)
        found = corruption_accuracy(model, batches, names=[kind], seed=seed, progress=tell)
        return {str(level): share for level, share in found[kind].items()}

    return {kind: cache.once(f"{kind} on {len(data[0])} images", partial(accuracy, kind)) for kind in CORRUPTIONS}


def load_entry(path: str | Path) -> Entry:
    """A report and its examples, from the folder of an assessment or from a report's own path.

    Raises:
        FileNotFoundError: there is no report.
        ValueError: it is damaged.
    """
    path, report = Path(path), Report.load(path)
    path = path / REPORT if path.is_dir() else path
    beside = path.parent / EXAMPLES
    examples = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return Entry(str(report.conditions.get("model") or path.parent.name), report, examples)


def _some(model: nn.Module, data: Images, count: int) -> tuple[Tensor, Tensor]:
    """So many images, each class in its share, and their labels, on the model's device."""
    device = device_of(model)
    chosen = data.subset(min(count, len(data)))
    images, labels = next(chosen.batches(len(chosen)))
    return images.to(device), labels.to(device)


class Cache:
    """Plain JSON values by name.

    Args:
        path: of the file; one that is damaged, or about something else, counts for nothing.
        key: what they are about.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        self._key = json.loads(json.dumps(key))
        self._known: dict[str, Any] = {}
        try:
            found = json.loads(path.read_bytes())
            if found["key"] == self._key:
                self._known = dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            return

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known as `name`, else what `make` gives, which is on the disk when this returns."""
        if name not in self._known:
            self._known[name] = make()
            write_text(self._path, json.dumps({"key": self._key, "parts": self._known}) + "\n")
        return json.loads(json.dumps(self._known[name]))  # a copy, and the same whether it was known or not
