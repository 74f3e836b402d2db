"""Errors and checks that every room shares: what was given, why it cannot work, what to do."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UnsoundError(RuntimeError):
    """A result would be meaningless, for example because a layer was never called."""


class ImageSizeError(ValueError):
    """A model does not run on images of a certain size."""


def unknown(what: str, given: str, known: list[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest known names, and all when they are few."""
    nearest = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    listing = f" (known: {', '.join(known)})" if len(known) <= 12 else ""
    return f"unknown {what} {given!r}{hint}{listing}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that the memory of the machine or of a GPU is full."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:  # an error that is kept and raised again may cause itself
        seen.add(id(found))
        text = str(found).lower()
        if isinstance(found, MemoryError) or (  # torch.OutOfMemoryError is a RuntimeError
            isinstance(found, RuntimeError)
            and any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))
        ):
            return True
        found = found.__cause__
    return False


def check_images(images: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> None:
    """Refuse what is no batch of pixels with its classes.

    Raises:
        ValueError: `images` not (N, C, H, W) floating point in [0, 1], or `labels` not (N,) integers in
            [0, num_classes).
    """
    import torch  # here: the command line's help needs this file, and not torch

    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}; give a floating-point batch "
            "(N, C, H, W) with pixels in [0, 1], for example images.float() / 255"
        )
    if images.numel() == 0:
        raise ValueError("the batch of images is empty; give at least one image")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # also true for NaN
        remedy = "do not normalise them: the model's mean and std are applied inside (timm_fsr.PixelModel)"
        if low >= 0 and 2 < high <= 255:
            remedy = "divide them by 255"
        raise ValueError(f"images lie in [{low:.4g}, {high:.4g}] but pixels must lie in [0, 1]; {remedy}")
    if labels is None:
        return
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give one int64 class per image, "
            f"shape ({len(images)},)"
        )
    low_label, high_label = (int(value) for value in torch.aminmax(labels))
    if low_label < 0:
        raise ValueError(f"labels run from {low_label} to {high_label}; use labels of 0 or more, one number per class")
    if num_classes is not None and high_label >= num_classes:
        raise ValueError(
            f"labels run from {low_label} to {high_label}, but the model has {num_classes} classes "
            f"(0 to {num_classes - 1}); create it with num_classes={high_label + 1}"
        )
