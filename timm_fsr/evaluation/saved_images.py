"""Attacked images on disk, and other models tried on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode
from timm_fsr.evaluation.classes import match_labels
from timm_fsr.evaluation.inference import check_channels, full_precision, predict
from timm_fsr.evaluation.model_checks import check_model
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.utils.files import staged

_ATTACKED = "attacked"
_CLASSES = "classes"
_TENSORS = ("images", "labels", "perturbed")


class AttackedBatch(NamedTuple):
    """What an attack has made of a batch.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) true classes.
        perturbed: (N,) bool: is the image another one than the clean one? Some attacks leave those as they were that
            they cannot break, or that are wrong already.
    """

    images: Tensor
    labels: Tensor
    perturbed: Tensor


def save_attacked(
    folder: Path,
    suite: str,
    index: int,
    batch: AttackedBatch,
    *,
    of: str,
    stages: int,
    classes: Sequence[str] | None = None,
) -> None:
    """Keep a batch, its images as float32, since rounding to 8 bits would change the attack.

    Args:
        folder: of the evaluation.
        suite: its name.
        index: of the batch.
        batch: to keep.
        of: names the suite with its parameters, and the clean batch.
        stages: number of stages of the suite that have been run on it.
        classes: the names of the labels, if they are known.
    """
    metadata = {"of": of, "stages": str(stages), **({_CLASSES: json.dumps(list(classes))} if classes else {})}
    with staged(folder / _ATTACKED / _file_name(suite)) as scratch:
        tensors = {"images": batch.images.float(), "labels": batch.labels, "perturbed": batch.perturbed}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, scratch / f"{index:06d}.safetensors", metadata=metadata)


def load_attacked(folder: Path, suite: str, index: int, *, of: str) -> tuple[Tensor, int] | None:
    """The images (N, C, H, W) that `save_attacked` kept of a batch, and after how many stages.

    None if there are none, or if they are of another batch or of other parameters.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _ATTACKED / _file_name(suite) / f"{index:06d}.safetensors"
    if not path.is_file():
        return None
    batch, metadata = _read(path)
    return (batch.images, int(metadata.get("stages", 0))) if metadata.get("of") == of else None


def keep_attacked(folder: Path, suite: str, count: int) -> None:
    """Remove what an earlier evaluation on more batches than `count` has left of a suite."""
    for path in (folder / _ATTACKED / _file_name(suite)).glob("*.safetensors"):
        if int(path.stem) >= count:
            path.unlink()


def forget_attacked(folder: Path) -> None:
    """Remove all that was kept in the folder of an evaluation."""
    shutil.rmtree(folder / _ATTACKED, ignore_errors=True)


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


def attacked_batches(folder: Path, suite: str) -> Iterator[AttackedBatch]:
    """What was kept of a suite, batch by batch in their order.

    Raises:
        ValueError: a file is damaged.
    """
    for path in _files(folder, suite):
        yield _read(path)[0]


def attacked_classes(folder: Path, suite: str) -> tuple[str, ...] | None:
    """The names of the labels in what was kept of a suite; None if they are not known.

    Raises:
        ValueError: a file is damaged.
    """
    names = _read(_files(folder, suite)[0])[1].get(_CLASSES)
    return _classes_in_report(folder) if names is None else tuple(json.loads(names))


def _files(folder: Path, suite: str) -> list[Path]:
    return sorted((folder / _ATTACKED / _file_name(suite)).glob("*.safetensors"))


def _classes_in_report(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes in the report beside the images, which alone had them once."""
    try:
        names = json.loads((folder / "report.json").read_bytes())["conditions"]["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names))


def _read(path: Path) -> tuple[AttackedBatch, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            batch = AttackedBatch(*(file.get_tensor(name) for name in _TENSORS))
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the folder {_ATTACKED} around it and attack the images again"
        ) from error
    if batch.images.ndim != 4 or not len(batch.images) == len(batch.labels) == len(batch.perturbed):
        raise ValueError(
            f"{path} is damaged ({len(batch.images)} images have {len(batch.labels)} labels); remove the folder "
            f"{_ATTACKED} around it and attack the images again"
        )
    return batch, metadata


def _file_name(suite: str) -> str:
    return re.sub(r"[^\w.-]+", "_", suite)


def perturbed(attacked: Tensor, images: Tensor) -> Tensor:
    """(N,) bool: has an attack changed the image?"""
    return torch.ne(attacked, images).flatten(1).any(dim=1)


@dataclass(frozen=True, eq=False)
class Rescored:
    """What has become of one attack's images.

    Attributes:
        correct: (N,) bool: was the attacked image classified correctly?
        perturbed: (N,) bool: had the attack changed the image at all?
        notes: what a reader has to know about how the labels were read.
    """

    correct: Tensor
    perturbed: Tensor
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Both in words."""
        count, changed = len(self.correct), int(self.perturbed.sum())
        text = f"{100 * int(self.correct.sum()) / count:.2f} % right ({count} images)"
        if changed == count:
            return text
        right = int((self.correct & self.perturbed).sum())
        share = f", of which {100 * right / changed:.2f} % are right" if changed else ""
        return (
            f"{text}; the attack changed {changed} of them{share}: for a fair transfer save images of an attack that "
            "changes every one, such as pgd100 or apgd100"
        )


def rescore(model: nn.Module, folder: str | Path, *, classes: Sequence[str] | None = None) -> dict[str, Rescored]:
    """Try the attacked images of an earlier evaluation with `save_images` on a model, be it the same or another.

    Args:
        model: a timm model or a pixel-space model.
        folder: of the evaluation. Its labels are brought into the order of the model's classes by their names.
        classes: the names of the model's outputs, in their order, where it does not know them.

    Returns:
        The outcome of each attack, by its folder's name.

    Raises:
        FileNotFoundError: there are no attacked images in the folder.
        ValueError: they are damaged, or they or their classes do not fit the model.
    """
    pixel_model = as_pixel_model(model)
    device = device_of(model)
    outcomes: dict[str, Rescored] = {}
    with attack_mode(pixel_model), full_precision(device):
        check_model(pixel_model)
        for suite in attacked_suites(Path(folder)):
            correct, perturbed = [], []
            notes: dict[str, None] = {}
            named = attacked_classes(Path(folder), suite)
            for batch in attacked_batches(Path(folder), suite):
                check_channels(pixel_model, batch.images)
                labels, notes_here = match_labels(model, batch.labels, named, f"the evaluation in {folder}", classes)
                notes |= dict.fromkeys(notes_here)
                found = predict(pixel_model, batch.images.to(device), suite).cpu()
                correct.append(found == labels)
                perturbed.append(batch.perturbed)
            outcomes[suite] = Rescored(torch.cat(correct), torch.cat(perturbed), tuple(notes))
    return outcomes
