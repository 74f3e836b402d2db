"""Reports: what an evaluation found, with the conditions it was found under."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_fsr.reports.statistics import clopper_pearson, collapse, per_class_accuracy
from timm_fsr.utils.documents import DocumentError, read_json
from timm_fsr.utils.files import write_text

SCHEMA_VERSION = 2
"""Version 1 had no stages, labels, calibration, evidence, corruptions and notes; it is still read."""

WORST_CASE = "worst_case"

STRONG_ATTACKS = ("autoattack", "plus", "rand", "adaptive")
"""A robust accuracy that none of these attacks has tested is only an upper bound."""

NORMS = ("linf", "l2", "l1")
"""Of threat models."""

_FILE = "report.json"

_SPOKEN = {"fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "apgd": "APGD"}  # attacks whose names end in numbers of steps


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report:
    """Per-image outcomes of an evaluation, and everything that decided them; docs/report.md describes its JSON.

    Attributes:
        correct: for "clean" and each attack by name, (N,) bool: was the image classified correctly?
        stages: for attacks that are several in a row ("autoattack"), by the name of each, (N,) bool: was the image
            still classified correctly after it? Each stage attacks what those before it left.
        attacks: each attack by name, written out with its parameters.
        norm: of the threat model.
        eps: its radius, in pixels of [0, 1].
        seed: of the random starts.
        labels: (N,) int64 true classes.
        conditions: model, data, its fingerprint, versions, hardware, batch size, precision, what chose the checkpoint.
        notes: plain sentences about what a reader has to know, such as an attack that had to be changed.
        calibration: for "clean", what `timm_fsr.reports.statistics.calibration` gives.
        evidence: what `timm_fsr.evaluation.gradient_masking.gather_evidence` gives; {} if it was not asked for.
        corruptions: accuracy in [0, 1] by corruption and severity; {} if not asked for.
    """

    correct: dict[str, Tensor]
    attacks: dict[str, str]
    norm: str
    eps: float
    seed: int
    stages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    labels: Tensor | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    corruptions: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """For "clean" and each attack, the share of images classified correctly, in [0, 1]."""
        return {name: _share(outcome) for name, outcome in self.correct.items()}

    @property
    def robust(self) -> Tensor:
        """(N,) bool: was the image classified correctly clean and under every attack?"""
        return torch.stack(list(self.correct.values())).all(dim=0)

    @property
    def worst_case(self) -> float:
        """The share of images classified correctly clean and under every attack, in [0, 1]."""
        return _share(self.robust)

    def flags_of(self, name: str) -> Tensor:
        """(N,) bool of "clean", an attack or "worst_case": was the image classified correctly?"""
        return self.robust if name == WORST_CASE else self.correct[name]

    def accuracy_of(self, name: str) -> float:
        """Accuracy under "clean", an attack or "worst_case", in [0, 1]."""
        return _share(self.flags_of(name))

    def interval(self, name: str) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of `accuracy_of(name)`, from the number of images."""
        return clopper_pearson(int(self.flags_of(name).sum()), self.count)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.correct["clean"])

    @property
    def num_classes(self) -> int | None:
        """The number of classes, as far as the report says; None if it has neither their names nor labels."""
        named = len(self.conditions.get("classes") or ())
        return named or (None if self.labels is None else int(self.labels.max()) + 1)

    @property
    def threat(self) -> str:
        """The threat model in the field's notation: "Linf 8/255"."""
        return f"{self.norm.capitalize()} {format_eps(self.eps, self.norm)}"

    @property
    def upper_bound(self) -> str:
        """One sentence if only weak attacks were run, so that stronger ones may lower the worst case; else ""."""
        if set(self.correct) & set(STRONG_ATTACKS):
            return ""
        ran = [_spoken(name) for name in self.attacks if not name.endswith("-ensemble")]  # of others that are named
        named = " and ".join(filter(None, [", ".join(ran[:-1]), *ran[-1:]]))
        tried = f"{named} only" if ran else "no attack was run"
        return f"upper bound: {tried}; AutoAttack and adaptive attacks usually lower it"

    @property
    def collapsed(self) -> str:
        """One sentence if the model answers one class for nearly all images or guesses; else ""; see `collapse`."""
        if self.labels is None:
            return ""
        right, total = self.labels[self.correct["clean"]], self.labels
        size = int(total.max()) + 1
        names = self.conditions.get("classes") or ()
        found = collapse(right.bincount(minlength=size).tolist(), total.bincount(minlength=size).tolist(), names)
        return f"the model does not work: {found}" if found else ""

    def per_class(self, name: str = WORST_CASE) -> list[float | None]:
        """Accuracy of each class under one attack, "clean" or all of them; None for a class without images.

        Raises:
            ValueError: the report has no labels (schema version 1).
        """
        if self.labels is None:
            raise ValueError("this report was written without labels; evaluate the model again")
        assert self.num_classes is not None
        return per_class_accuracy(self.flags_of(name), self.labels, self.num_classes)

    def __str__(self) -> str:
        model, data = self.conditions.get("model"), self.conditions.get("data")
        return f"{model or 'a model'} on {data or 'unnamed images'}: {self.summary()}"

    def __repr__(self) -> str:
        return f"<Report: {self}>"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; `from_dict` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "threat_model": {"norm": self.norm, "eps": self.eps},
            "seed": self.seed,
            "images": self.count,
            "accuracy": {**self.accuracy, WORST_CASE: self.worst_case},
            "interval_95": {name: list(self.interval(name)) for name in (*self.correct, WORST_CASE)},
            "attacks": self.attacks,
            "notes": list(self.notes),
            "conditions": self.conditions,
            "calibration": self.calibration,
            "evidence": self.evidence,
            "corruptions": self.corruptions,
            "labels": None if self.labels is None else self.labels.tolist(),
            "correct": {name: _to_text(flags) for name, flags in self.correct.items()},
            "stages": {name: {key: _to_text(f) for key, f in parts.items()} for name, parts in self.stages.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Rebuild a report written by `to_dict`, also by an older version of it.

        Raises:
            ValueError: written by a newer version, incomplete, or with values that no evaluation writes.
        """
        if values.get("schema_version") not in range(1, SCHEMA_VERSION + 1):
            raise ValueError(
                f"the report has schema version {values.get('schema_version')!r}, this timm_fsr reads 1 to "
                f"{SCHEMA_VERSION}; update timm_fsr"
            )
        try:
            labels = values.get("labels")
            report = cls(
                correct={name: _from_text(flags) for name, flags in values["correct"].items()},
                stages={
                    name: {key: _from_text(flags) for key, flags in parts.items()}
                    for name, parts in values.get("stages", {}).items()
                },
                attacks=dict(values["attacks"]),
                norm=values["threat_model"]["norm"],
                eps=values["threat_model"]["eps"],
                seed=values["seed"],
                labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
                conditions=dict(values["conditions"]),
                notes=tuple(values.get("notes", ())),
                calibration=dict(values.get("calibration", {})),
                evidence=dict(values.get("evidence", {})),
                corruptions=dict(values.get("corruptions", {})),
            )
        except KeyError as error:
            raise ValueError(f"the report lacks the key {error}; evaluate the model again") from error
        except (TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"the report is damaged ({error}); evaluate the model again") from error
        damage = _damage(report)
        if damage:
            raise ValueError(f"the report is damaged ({damage}); evaluate the model again")
        return report

    def to_json(self) -> str:
        """The text of `report.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write JSON to `path`, atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote.

        Args:
            path: of the file, or of a folder that holds it as `report.json`: of an evaluation, a run or a saved model.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no such report in it.
        """
        if Path(path).is_dir():
            if not (Path(path) / _FILE).is_file():
                raise FileNotFoundError(
                    f"{path} holds no {_FILE}; give the folder of an evaluation, of a run or of a saved model"
                )
            path = Path(path) / _FILE
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no report {path}; give the report.json that an evaluation has written")
        try:
            values = read_json(Path(path).read_bytes())
        except DocumentError as error:
            raise ValueError(f"{path} is damaged ({error}); evaluate the model again") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); evaluate the model again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no report; evaluate the model again")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def summary(self) -> str:
        """One line: every accuracy in percent, the threat model, and what takes meaning from the worst case."""
        parts = [f"{name} {100 * value:.2f} %" for name, value in self.accuracy.items()]
        line = f"{', '.join(parts)}, worst case {100 * self.worst_case:.2f} % ({self.threat}, {self.count} images)"
        return "; ".join(filter(None, [line, self.collapsed, self.upper_bound]))


def format_eps(eps: float, norm: str = "linf") -> str:
    """A radius as the field writes it: in Linf as a fraction of 255 ("8/255"), elsewhere as a decimal ("0.5").

    A Linf radius that is a short decimal ("0.1") stays one; of others the numerator is rounded ("6.25/255").
    """
    scaled = eps * 255
    whole = abs(scaled - round(scaled)) < 1e-6
    if norm != "linf" or eps == 0 or (not whole and abs(eps - float(f"{eps:.3g}")) < 1e-12):
        return f"{eps:.4g}"
    return f"{round(scaled)}/255" if whole else f"{scaled:.3g}/255"


def _spoken(name: str) -> str:
    """An attack as the field writes it: "pgd100x5" is "PGD-100 with 5 restarts"; other names stay as they are."""
    found = re.fullmatch(r"([a-z]+)(\d+)?(?:x(\d+))?", name)
    if found is None or found[1] not in _SPOKEN:
        return name
    steps = f"-{found[2]}" if found[2] else ""
    return f"{_SPOKEN[found[1]]}{steps}{f' with {found[3]} restarts' if found[3] else ''}"


def _damage(report: Report) -> str:
    """What in a report that was read no evaluation can have written; "" if nothing."""
    lengths = {len(flags) for flags in report.correct.values()}
    lengths |= {len(flags) for parts in report.stages.values() for flags in parts.values()}
    if "clean" not in report.correct or len(lengths) != 1 or lengths == {0}:
        return f"'correct' has outcomes of {', '.join(map(str, sorted(lengths))) or 'no'} images"
    if report.labels is not None and (report.labels.shape != (report.count,) or int(report.labels.min()) < 0):
        return f"'labels' are not the classes of {report.count} images"
    known: dict[str, Any] = {  # what is looked into by those who read reports
        "threat_model.eps": (report.eps, (int, float)),
        "attacks": (list(report.attacks.values()), [str]),
        "notes": (list(report.notes), [str]),
        "conditions.classes": (report.conditions.get("classes"), [str]),
        "conditions.recipe": (report.conditions.get("recipe"), dict),
        "calibration": (list(report.calibration.values()), [dict]),
        "evidence.findings": (report.evidence.get("findings"), [dict]),
        "corruptions": (list(report.corruptions.values()), [dict]),
    }
    for key, (value, kind) in known.items():
        if value is not None and not _is_of(value, kind):
            return f"{key!r} is {textwrap.shorten(repr(value), 80, placeholder=' ...')}"
    if report.norm not in NORMS:
        return f"'threat_model.norm' is {report.norm!r}"
    if report.eps is None or not 0 <= report.eps < float("inf"):
        return f"'threat_model.eps' is {report.eps!r}"
    return ""


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value has this type, or is a list of values of the one type in `kind`."""
    if isinstance(kind, list):
        return isinstance(value, (list, tuple)) and all(isinstance(entry, kind[0]) for entry in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _share(outcome: Tensor) -> float:
    return int(outcome.sum()) / len(outcome)  # exact, as a mean in float32 is not


def _to_text(flags: Tensor) -> str:
    return "".join("01"[flag] for flag in flags.tolist())


def _from_text(text: Iterable[str]) -> Tensor:
    return torch.tensor([flag == "1" for flag in text], dtype=torch.bool)
