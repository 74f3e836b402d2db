"""Outcomes on disk: what an evaluation has found so far, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_fsr.attacked import forget_attacked
from timm_fsr.digests import text_digest
from timm_fsr.files import write_text
from timm_fsr.sharing import from_main
from timm_fsr.stages import Suite

CLEAN = "clean"
_JOURNALS = "outcomes"


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
