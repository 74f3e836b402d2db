"""Collation: the report of what all processes have found, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from timm_fsr.autoattack import implementation_version
from timm_fsr.outcomes import CLEAN, KnownSuite
from timm_fsr.report import Report
from timm_fsr.suites import AUTOATTACK_SUITES, ENSEMBLE, OFFICIAL

_SQUARE_GAP = 0.002  # AutoAttack's own threshold for calling white-box attacks unreliable

Stages = Mapping[str, Tensor]


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


def put_together(parts: Sequence[Part], norm: str, eps: float, seed: int) -> Report:
    """The report of what all processes found, in the order of the batches.

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
    notes = dict.fromkeys([*own, *(suite.note for suite in suites.values() if suite.note), *gaps])
    return Report(
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
            **({"autoattack": implementation_version()} if set(attacks) & set(AUTOATTACK_SUITES) else {}),
        },
    )


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
