"""Image classification data that is decoded when it is needed, for data sets that do not fit in memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_fsr.data.augment import ResizedCrop
from timm_fsr.data.dataset import Images, check_format, choose, digest_of, skipped_note
from timm_fsr.data.decoding import CHUNK, MODES, ModelCrop, Rows, check_range, chunk_starts, fit, mode_of, pixels_of
from timm_fsr.data.policy import Policy
from timm_fsr.data.sources import open_rows
from timm_fsr.data.timm_augment import image_seed
from timm_fsr.utils.random import derive_generator

_TOGETHER = 8  # images read at once: asking the table for one costs as much as decoding a small one


@dataclass(frozen=True, eq=False, repr=False)
class StreamedData(Images):
    """Images with one label each, read and decoded when they are asked for; otherwise as `ImageData`.

    Attributes:
        rows: the source of the images; its labels are not used.
        indices: int64 tensor (N,), the rows of the source that belong to this data, on the CPU.
        labels: int64 tensor (N,), 0 <= label < len(classes), on `device`.
        classes: the name of each class.
        name: where the images came from, for logs and reports.
        size: (height, width) that images are scaled to.
        mode: "L" for grey or "RGB".
        channels: 1 or 3 if that was asked for; None refuses a coloured image among grey ones.
        workers: processes that decode, at most one per processor core; 0 decodes in this process. The images do not
            depend on it. They start again for each pass, which takes seconds on systems that do not fork.
        device: where batches go.
        named: see `Images`, as are the next three.
        notes: see `named`.
        skipped: see `named`.
        crop: see `named`; the random part that `load` takes of an image is not affected.

    Raises:
        ValueError: there are no images, or labels do not fit them or the classes.
    """

    rows: Rows
    indices: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    size: tuple[int, int]
    mode: str = "RGB"
    channels: int | None = None
    workers: int = 4
    device: torch.device | str = "cpu"
    named: bool = True
    notes: tuple[str, ...] = ()
    skipped: int = 0
    crop: ModelCrop | None = None

    def __post_init__(self) -> None:
        if self.labels.shape != self.indices.shape or not len(self.labels):
            raise ValueError(
                f"{self.name} has {len(self.labels)} labels for {len(self.indices)} images; give one label to each "
                "image, and at least one image"
            )
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 or more; 0 decodes without further processes")
        check_range(self.labels, len(self.classes), self.name)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return (1 if self.mode == "L" else 3, *self.size)

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over count, image size, crop, class names, rows and labels.

        Pixels are not in it, as that would mean decoding every image: other images in the same order with the same
        labels have the same fingerprint.
        """
        about = (len(self), self.image_size, self.classes, *(() if self.crop is None else (str(self.crop),)))
        return digest_of(about, self.indices, self.labels)

    def to(self, device: torch.device | str) -> StreamedData:
        """The same data, whose batches go to another device."""
        return replace(self, labels=self.labels.to(device), device=torch.device(device))

    def take(self, indices: Tensor, *, name: str | None = None) -> StreamedData:
        """The images at `indices`, an int64 tensor (M,), in that order, under the same name or another."""
        labels = self.labels[indices.to(self.labels.device)]
        return replace(self, indices=self.indices[indices.cpu()], labels=labels, name=name or self.name)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Float images (M, C, H, W) in [0, 1] and int64 labels (M,) at `indices`, decoded in this process."""
        return next(replace(self, workers=0).load([indices]))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels in natural order; the last batch may be smaller."""
        return self.load(torch.arange(len(self)).split(batch_size))

    def load(
        self,
        batches: Iterable[Tensor],
        *,
        crop: ResizedCrop | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        epoch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decodes batch after batch, ahead of their use if there are workers.

        Args:
            batches: the images of each batch, int64 tensors (B,).
            crop: the random part of each image, drawn from (seed, epoch, its row in the source) and nothing else;
                None takes the centre.
            policy: what is done to each image after that; drawn likewise.
            seed: see `crop`.
            epoch: see `crop`.

        Yields:
            Float images (B, C, H, W) in [0, 1] and int64 labels (B,), on `device`.

        Raises:
            ValueError: images are broken, all of a batch being named together, or coloured among grey ones.
        """
        chosen = list(batches)
        loader = _loader(
            _Samples(self.rows, self.size, self.mode, self.channels, crop or self.crop, policy, seed, epoch),
            (self.indices[places.cpu()].tolist() for places in chosen),
            min(self.workers, len(chosen)),
            pin_memory=torch.device(self.device).type == "cuda",
        )
        for places, images in zip(chosen, loader, strict=True):
            if isinstance(images, Exception):
                raise images
            pixels = images.to(self.device, non_blocking=True)
            yield pixels.float().div_(255), self.labels[places.to(self.labels.device)]


def stream_data(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    size: int | tuple[int, int],
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    crop: ModelCrop | None = None,
    limit: int | None = None,
    on_error: str = "stop",
    workers: int = 4,
    progress: bool = True,
) -> StreamedData:
    """Opens one split of a data set without decoding it; the arguments are those of `timm_fsr.data.dataset.load_data`.

    Image folders are read where they lie. Hub data sets are mapped from the copy that `datasets` has downloaded.
    Parquet files are mapped from an Arrow copy of the same size that `datasets` makes once in its cache (the
    environment variable HF_DATASETS_CACHE moves it), as single rows of Parquet cannot be read quickly. IDX, `.npz` and
    the embedded data are in memory in any case.

    Args:
        source: see `load_data`, as are `split` and what is not described here.
        split: see `source`.
        size: (height, width), or both in one number, that images are scaled (bicubic) and centre-cropped to.
        config: see `source`.
        image_column: see `source`.
        label_column: see `source`.
        classes: see `source`.
        channels: 1 for grey or 3 for RGB; whichever the first image has if not given.
        crop: see `source`.
        limit: see `source`.
        on_error: "stop" meets images that cannot be used when they are needed, "skip" decodes all images once now, and
            leaves out and counts those.
        workers: processes that decode, at most one per processor core; 0 decodes in this process.
        progress: of the decoding that "skip" does: show on stderr how far it is.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the source, split, column, label or first image cannot be read; the message says what to change.
    """
    box = (size, size) if isinstance(size, int) else size
    check_format(box, channels, on_error)
    rows = open_rows(
        os.fspath(source), split, config=config, image_column=image_column, label_column=label_column, mapped=True
    )
    chosen = choose(rows, tuple(classes) if classes else None, limit)
    bare = replace(rows, labels=[])  # a list of a million would go to each worker
    broken = _find_broken(bare, chosen.indices, workers, progress) if on_error == "skip" else {}
    if len(broken) == len(chosen.indices):
        raise rows.broken_error(broken)
    whole = [place for place, index in enumerate(chosen.indices.tolist()) if index not in broken]
    indices, labels = chosen.indices[whole], chosen.labels[whole]
    mode = MODES[channels] if channels else mode_of(rows.read(indices[:1].tolist()))
    return StreamedData(
        bare,
        indices,
        labels,
        chosen.classes,
        chosen.name,
        box,
        mode,
        channels,
        workers,
        named=chosen.named,
        notes=(*chosen.notes, *skipped_note(rows, broken)),
        skipped=len(broken),
        crop=crop,
    )


def _find_broken(rows: Rows, indices: Tensor, workers: int, progress: bool) -> dict[int, str]:
    """Why images at `indices` cannot be used, by index; each is decoded once."""
    parts = indices.split(CHUNK)
    found: dict[int, str] = {}
    loader = iter(_loader(_Checks(rows), (part.tolist() for part in parts), min(workers, len(parts))))
    for _ in chunk_starts(len(indices), "looking for broken images", progress):
        found |= next(loader)
    return found


def _loader(
    samples: Dataset[Any], batches: Iterable[list[int]], workers: int, *, pin_memory: bool = False
) -> DataLoader[Any]:
    """Gives what `samples` makes of each of `batches`, ahead of its use if there are workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(workers, _cores()),
        collate_fn=_unchanged,
        worker_init_fn=_outlive_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one of its own it would draw from the global generator
    )


@dataclass(frozen=True, eq=False)
class _Checks(Dataset[Any]):
    """Decodes batches of rows, and keeps nothing but what is wrong with them."""

    rows: Rows

    def __getitems__(self, indices: list[int]) -> dict[int, str]:
        return {index: why for part in _parts(indices) for index, why in self.rows.attempt(part)[1].items()}


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[Tensor]):
    """What a worker needs to decode a batch of rows; picklable, for systems whose workers do not fork."""

    rows: Rows
    size: tuple[int, int]
    mode: str
    channels: int | None
    crop: ResizedCrop | ModelCrop | None
    policy: Policy | None
    seed: int
    epoch: int

    def __getitems__(self, indices: list[int]) -> Tensor | ValueError:
        """Uint8 images (B, C, H, W), or what is wrong with some: the loader would bury an exception in a traceback."""
        arrays, broken = list[np.ndarray](), dict[int, str]()
        for part in _parts(indices):
            read, reasons = self.rows.attempt(part)
            broken |= reasons
            pictures = [picture for picture in read if picture is not None]
            if broken:  # the others are still looked at, to name all that are broken
                continue
            try:
                self.rows.check_mode(pictures, self.mode, self.channels)
            except ValueError as error:
                return error
            arrays += [self._array(picture, index) for picture, index in zip(pictures, part, strict=True)]
        if broken:
            return self.rows.broken_error(broken)
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _array(self, picture: Image.Image, index: int) -> np.ndarray:
        if isinstance(self.crop, ResizedCrop):
            array = self._cropped(picture, index, self.crop)
        else:
            array = fit(picture, self.mode, self.size, self.crop)
        if self.policy is None:
            return array
        fitted = Image.fromarray(array[..., 0] if self.mode == "L" else array)
        (changed,) = self.policy.over([fitted], [image_seed("policy", index, seed=self.seed, epoch=self.epoch)])
        return pixels_of(changed)

    def _cropped(self, picture: Image.Image, index: int, crop: ResizedCrop) -> np.ndarray:
        generator = derive_generator(self.seed, self.epoch, index, 0, stream="crop")
        picture = picture if picture.mode == self.mode else picture.convert(self.mode)
        return pixels_of(crop(picture, self.size, generator))


def _parts(indices: list[int]) -> list[list[int]]:
    """A few images each, so that not all photographs of a batch are in memory in their full size."""
    return [indices[start : start + _TOGETHER] for start in range(0, len(indices), _TOGETHER)]


def _outlive_signals(_worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the training process: all get them, and torch takes a worker's death for a fault."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    """A batch as `_Samples` made it."""
    return batch


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
