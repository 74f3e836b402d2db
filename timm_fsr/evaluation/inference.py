"""Inference as evaluation wants it: batch by batch, in float32, with outputs that are checked."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode
from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.model_checks import check_finite
from timm_fsr.models.pixel import as_pixel_model, base_model, device_of
from timm_fsr.utils import defaults

Batches = Images | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
BATCH_SIZE = defaults.BATCH_SIZE


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 arithmetic without TF32 and without autocast: half precision would hide weak spots."""
    switches = _precision_switches()
    before = [getattr(holder, name) for holder, name, _ in switches]
    try:
        for holder, name, exact in switches:
            setattr(holder, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (holder, name, _), value in zip(switches, before, strict=True):
            setattr(holder, name, value)


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """Each of torch's settings of float32 arithmetic as (holder, name, exact value).

    Where torch has `fp32_precision`, by that alone: its older flags refuse to be read once both kinds have been set.
    """
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    holders = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    holders += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    return [(holder, "fp32_precision", "ieee") for holder in holders]


def hardware(device: torch.device, processes: int) -> str:
    """Where something ran, for reports."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return f"{name}, {torch.get_num_threads()} threads, {processes} process(es)"


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, kind: str) -> Tensor:
    """Predicted classes (N,); ValueError for NaN or infinite logits of these `kind` images."""
    logits = model(images)
    check_finite(logits, kind)
    return logits.argmax(dim=1)


@torch.no_grad()
def clean_logits(model: nn.Module, data: Batches) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) of clean images and their labels (N,), on the CPU, for calibration."""
    pixel_model = as_pixel_model(model)
    device = device_of(model)
    with attack_mode(pixel_model), full_precision(device):
        pairs = [(pixel_model(images.to(device)).cpu(), labels.cpu()) for images, labels in as_batches(data)]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def as_batches(data: Batches, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an iterable, or a pair of tensors, `ImageData` or `StreamedData` cut into batches.

    Raises:
        ValueError: not pairs of tensors, or not one label per image.
    """
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels; give one label per image")
        data = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    elif isinstance(data, Images):
        data = data.batches(batch_size)
    for batch in data:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise ValueError(
                f"data gives {type(batch).__name__} where (images, labels) belong; give what timm_fsr.load_data "
                "returns, two tensors, or an iterable of such pairs of tensors"
            )
        yield as_float(batch[0]), batch[1]


def as_float(images: Tensor) -> Tensor:
    """Images in float32, in which models are evaluated, if they are floating point at all."""
    return images.float() if images.is_floating_point() else images


def check_channels(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError for images with another number of channels than the model takes."""
    channels = getattr(base_model(model), "in_chans", images.shape[1])
    if images.shape[1] != channels:
        raise ValueError(f"images have {images.shape[1]} channels but the model takes {channels}; convert the images")
