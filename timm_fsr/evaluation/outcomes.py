"""Outcomes of an evaluation: kept on disk as they are found, then combined into a report."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_fsr.attacks.autoattack import implementation_version
from timm_fsr.evaluation.registry import ENSEMBLE, OFFICIAL, Suite
from timm_fsr.evaluation.saved_images import forget_attacked
from timm_fsr.evaluation.suites.autoattack import AUTOATTACK_SUITES
from timm_fsr.models.weights import tensor_bytes
from timm_fsr.reports.report import Report
from timm_fsr.utils.distributed import from_main
from timm_fsr.utils.files import write_text

CLEAN = "clean"
_JOURNALS = "outcomes"

_SQUARE_GAP = 0.002  # AutoAttack's own threshold for calling white-box attacks unreliable

Stages = Mapping[str, Tensor]


@dataclass(frozen=True)
class KnownSuite:
    """What is to be said of a suite besides its outcomes.

    Attributes:
        name: of the suite.
        detail: the suite written out.
        stages: their names, in their order.
        note: what a reader has to know about it.
    """

    name: str
    detail: str
    stages: tuple[str, ...]
    note: str

    @classmethod
    def of(cls, suite: Suite) -> KnownSuite:
        """What is to be said of `suite`."""
        return cls(suite.name, suite.detail, tuple(stage.name for stage in suite.stages), suite.note)


class Journal:
    """The outcome of every attack on every batch, one line each as soon as it is known.

    Each process appends to a file of its own and reads those of all. A line that a kill has cut off counts for nothing.

    Args:
        folder: of the evaluation; None keeps everything in memory.
        key: what decides the outcomes besides the images and the attack: the model's digest, seed, versions.
        rank: of this process.
        overwrite: replace the outcomes of another evaluation, if the folder holds such.

    Raises:
        ValueError: the folder holds the outcomes of another evaluation; the message says in what they differ.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], rank: int = 0, *, overwrite: bool = False) -> None:
        self._found: dict[tuple[str, ...], Tensor] = {}
        self.suites: dict[str, KnownSuite] = {}
        self._path = None if folder is None else folder / _JOURNALS / f"{rank}.jsonl"
        if folder is None or self._path is None:
            return
        key = json.loads(json.dumps(key))
        own = [json.dumps(key)]
        for path in sorted((folder / _JOURNALS).glob("*.jsonl")):
            first, *lines = _whole_lines(path) or [""]
            difference = _difference(json.loads(first), key) if first else ""
            if difference and not overwrite:
                raise ValueError(
                    f"{folder} holds the outcomes of another evaluation: {difference}; choose another folder, or "
                    "replace them by --overwrite"
                )
            if difference:
                path.unlink()
                forget_attacked(folder)
                continue
            for line in lines:
                self._read(json.loads(line))
            if path == self._path:
                own += lines
        write_text(self._path, "\n".join(own) + "\n")  # without a line that was cut off

    def __len__(self) -> int:
        return len(self._found)

    def get(self, *of: str) -> Tensor | None:
        """The flags (N,) noted for that batch, suite and stage, or None."""
        return self._found.get(of)

    def stages(self, batch: str, suite: str) -> dict[str, Tensor] | None:
        """The flags (N,) noted after each stage of a suite, or None if any is missing."""
        found = {name: self.get(batch, suite, name) for name in self.suites[suite].stages}
        whole = {name: flags for name, flags in found.items() if flags is not None}
        return whole if len(whole) == len(found) else None

    def put(self, correct: Tensor, *of: str) -> None:
        """Note the flags (N,) of a batch, suite and stage; on the disk when this returns."""
        self._found[of] = correct.cpu().clone()  # the caller goes on with its own
        self._append({"of": of, "correct": "".join("01"[flag] for flag in correct.tolist())})

    def introduce(self, suite: Suite) -> None:
        """Note what a suite is, so that its outcomes count also where it is not asked for again."""
        key = suite_key(suite)
        if key not in self.suites:
            self.suites[key] = KnownSuite.of(suite)
            self._append({"suite": key, **asdict(self.suites[key])})

    def _read(self, record: Mapping[str, Any]) -> None:
        if "suite" in record:
            stages = tuple(record["stages"])
            self.suites[record["suite"]] = KnownSuite(record["name"], record["detail"], stages, record["note"])
        else:
            self._found[tuple(record["of"])] = _to_flags(record["correct"])

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def open_journal(
    folder: str | Path | None, key: Mapping[str, Any], accelerator: Accelerator | None, *, overwrite: bool
) -> Journal:
    """The journal of this process; the main one opens its own first, as it may remove what the others would read.

    Raises:
        ValueError, OSError: see `Journal`; on every process.
    """
    path = None if folder is None else Path(folder)
    first: list[Journal] = []
    from_main(accelerator, lambda: first.append(Journal(path, key, overwrite=overwrite)))
    if first:
        return first[0]
    assert accelerator is not None
    return Journal(path, key, accelerator.process_index, overwrite=overwrite)


def suite_key(suite: Suite) -> str:
    """The name under which the outcomes of a suite are noted; other parameters give another one."""
    return f"{suite.name} {text_digest(suite.detail)}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of a journal up to the first that is not whole."""
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n"):
            break
        whole.append(line.rstrip("\n"))
    return whole


def _difference(found: Mapping[str, Any], key: Mapping[str, Any]) -> str:
    """In what two evaluations differ, as words; "" if in nothing."""
    names = [name for name in {**found, **key} if found.get(name) != key.get(name)]
    return f"its {names[0]} is {found.get(names[0])!r}, this one's {key.get(names[0])!r}" if names else ""


def _to_flags(text: str) -> Tensor:
    return torch.tensor([flag == "1" for flag in text], dtype=torch.bool)


@dataclass
class BatchOutcome:
    """What was found for a batch.

    Attributes:
        labels: (N,) true classes.
        clean: (N,) bool.
        suites: by the key of a suite, (N,) bool after each of its stages; those that an earlier evaluation in the same
            folder knows of this batch are included.
    """

    labels: Tensor
    clean: Tensor
    suites: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Part:
    """What one process has found.

    Attributes:
        batches: by their number.
        asked: the suites that were asked for, by their keys.
        known: those that only an earlier evaluation in the same folder has run.
        notes: sentences for the reader.
    """

    batches: dict[int, BatchOutcome]
    asked: dict[str, KnownSuite]
    known: dict[str, KnownSuite]
    notes: list[str]


def put_together(
    parts: Sequence[Part],
    norm: str,
    eps: float,
    seed: int,
    conditions: Mapping[str, Any] | None = None,
    notes_on_data: Sequence[str] = (),
) -> Report:
    """The report of what all processes found, in the order of the batches, under further `conditions`.

    Raises:
        ValueError: there was no batch.
    """
    found = {index: batch for part in parts for index, batch in part.batches.items()}
    if not found:
        raise ValueError("there is no image to evaluate on; check the data's split and limit")
    batches = [found[index] for index in sorted(found)]
    suites, gaps = _suites(parts, batches)
    correct = {CLEAN: torch.cat([batch.clean for batch in batches])}
    stages = {}
    for key, suite in suites.items():
        flags = {name: torch.cat([batch.suites[key][name] for batch in batches]) for name in suite.stages}
        correct[suite.name] = flags[suite.stages[-1]]
        if len(flags) > 1:
            stages[suite.name] = flags
    attacks = {suite.name: suite.detail for suite in suites.values()}
    if all(name in correct for name in OFFICIAL):
        correct[ENSEMBLE] = torch.stack([correct[name] for name in (CLEAN, *OFFICIAL)]).all(dim=0)
        attacks[ENSEMBLE] = "right clean and under each of the official attacks"
    own = [note for part in parts for note in part.notes]
    notes = dict.fromkeys([*notes_on_data, *own, *(suite.note for suite in suites.values() if suite.note), *gaps])
    report = Report(
        correct=correct,
        stages=stages,
        attacks=attacks,
        norm=norm,
        eps=eps,
        seed=seed,
        labels=torch.cat([batch.labels for batch in batches]),
        notes=(*notes, *_square_notes(stages)),
        conditions={
            "batch_size": max(len(batch.labels) for batch in batches),
            "autoattack_nonstandard": next((note for note in notes if "non-standard" in note), ""),
            **({"autoattack": implementation_version()} if set(attacks) & AUTOATTACK_SUITES.keys() else {}),
            **(conditions or {}),
        },
    )
    return replace(report, notes=(report.collapsed, *report.notes)) if report.collapsed else report


def _suites(parts: Sequence[Part], batches: Sequence[BatchOutcome]) -> tuple[dict[str, KnownSuite], list[str]]:
    """The suites that the report is of, and sentences on those of the folder that it is not of.

    What was run on all of these images counts whether or not it was asked for this time: a robust accuracy must not
    rise because an attack was left out.
    """
    suites = {key: suite for part in parts for key, suite in part.asked.items()}
    notes = []
    for key, suite in {key: suite for part in parts for key, suite in part.known.items()}.items():
        covered = sum(key in batch.suites for batch in batches)
        taken = suite.name in {other.name for other in suites.values()}
        if covered == len(batches) and not taken:
            suites[key] = suite
        elif covered and taken:
            notes.append(
                f"the folder also knows outcomes of {suite.name!r} with other parameters, which do not count here; "
                "evaluate with those in a folder of their own"
            )
        elif covered:
            notes.append(
                f"the folder knows outcomes of {suite.name!r} on {covered} of {len(batches)} batches, which do not "
                "count; name it among the attacks to finish it"
            )
    if not suites:
        notes.append("no attack was run: the worst case is nothing but the clean accuracy")
    return suites, notes


def _square_notes(stages: Mapping[str, Stages]) -> Iterable[str]:
    """What it means that the black-box attack broke more than gradients did."""
    for suite, flags in stages.items():
        before = None
        for name, correct in flags.items():
            if name == "square" and before is not None:
                broken = int((before & ~correct).sum())
                if broken > _SQUARE_GAP * len(correct):
                    yield (
                        f"in {suite!r}, Square broke {broken} of {len(correct)} images "
                        f"({100 * broken / len(correct):.1f} %) that the attacks before it missed: suspect masked "
                        "gradients"
                    )
            before = correct


def batch_key(index: int, images: Tensor, labels: Tensor) -> str:
    """The name under which the outcomes of a batch are noted; other images, or others beside them, give another one."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for tensor in (images, labels):
        digest.update(tensor_bytes(tensor))
    return f"{index} {digest.hexdigest()[:16]}"


def text_digest(text: str) -> str:
    """The first 8 hexadecimal digits of a SHA-256 over a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
