"""Outcomes on disk: what an evaluation has found so far, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_fsr.digests import text_digest
from timm_fsr.files import staged, write_text
from timm_fsr.stages import Stage, Suite

CLEAN = "clean"
_JOURNALS, _ATTACKED = "outcomes", "attacked"


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
                continue
            for line in lines:
                record = json.loads(line)
                self._found[tuple(record["of"])] = _to_flags(record["correct"])
            if path == self._path:
                own += lines
        write_text(self._path, "\n".join(own) + "\n")  # without a line that was cut off

    def __len__(self) -> int:
        return len(self._found)

    def get(self, *of: str) -> Tensor | None:
        """The flags (N,) noted for that batch, suite and stage, or None."""
        return self._found.get(of)

    def put(self, correct: Tensor, *of: str) -> None:
        """Note the flags (N,) of a batch, suite and stage; on the disk when this returns."""
        self._found[of] = correct.cpu()
        if self._path is None:
            return
        line = json.dumps({"of": of, "correct": "".join("01"[flag] for flag in correct.tolist())})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def suite_key(suite: Suite, stage: Stage) -> tuple[str, str]:
    """The names under which the outcome of a stage is noted; other parameters give another one."""
    return f"{suite.name} {text_digest(suite.detail)}", stage.name


def save_attacked(folder: Path, suite: str, index: int, images: Tensor, labels: Tensor) -> None:
    """Keep a batch of attacked images (N, C, H, W) as float32, since rounding to 8 bits would change the attack."""
    with staged(folder / _ATTACKED / _file_name(suite)) as scratch:
        tensors = {"images": images.detach().float().cpu().contiguous(), "labels": labels.cpu()}
        save_file(tensors, scratch / f"{index:06d}.safetensors", metadata={"suite": suite})


def load_attacked(folder: Path, suite: str, index: int) -> Tensor | None:
    """The images (N, C, H, W) that `save_attacked` kept of a batch, or None."""
    path = folder / _ATTACKED / _file_name(suite) / f"{index:06d}.safetensors"
    return _read_attacked(path)["images"] if path.is_file() else None


def attacked_suites(folder: Path) -> list[str]:
    """The folders' names of the suites whose attacked images were kept in the folder of an evaluation.

    Raises:
        FileNotFoundError: none were.
    """
    found = sorted(path.name for path in (folder / _ATTACKED).glob("*") if any(path.glob("*.safetensors")))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no attacked images; give the --output folder of an evaluation with --save-images"
        )
    return found


def attacked_batches(folder: Path, suite: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The attacked images (N, C, H, W) and labels (N,) of a suite, batch by batch in their order."""
    for path in sorted((folder / _ATTACKED / _file_name(suite)).glob("*.safetensors")):
        tensors = _read_attacked(path)
        yield tensors["images"], tensors["labels"]


def _read_attacked(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); attack the images again") from error


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


def _file_name(suite: str) -> str:
    return re.sub(r"[^\w.-]+", "_", suite)
