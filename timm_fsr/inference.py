"""Inference as evaluation wants it: batch by batch, in float32, with outputs that are checked."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_fsr.attacks import attack_mode
from timm_fsr.hub import base_model
from timm_fsr.pixels import as_pixel_model
from timm_fsr.soundness import check_finite

Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
BATCH_SIZE = 250


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 arithmetic without TF32 and without autocast: half precision would hide weak spots."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with attack_mode(pixel_model), full_precision(device):
        pairs = [(pixel_model(images.to(device)).cpu(), labels.cpu()) for images, labels in as_batches(data)]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def as_batches(data: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an iterable, or a pair of tensors cut into batches.

    Raises:
        ValueError: not pairs of tensors, or not one label per image.
    """
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels; give one label per image")
        data = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    for batch in data:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise ValueError(
                f"data gives {type(batch).__name__} where (images, labels) belong; give two tensors or an iterable "
                "of such pairs of tensors"
            )
        yield batch[0], batch[1]


def check_channels(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError for images with another number of channels than the model takes."""
    channels = getattr(base_model(model), "in_chans", images.shape[1])
    if images.shape[1] != channels:
        raise ValueError(f"images have {images.shape[1]} channels but the model takes {channels}; convert the images")
