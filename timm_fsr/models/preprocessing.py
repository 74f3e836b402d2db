"""Preprocessing: a picture as a model was made to see it, but for mean and std, and the names of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from timm_fsr.data.decoding import MODES
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.description import INTERPOLATION, class_names, input_size
from timm_fsr.models.pixel import base_model

Preprocess = Callable[[Image.Image], Tensor]


def preprocessing(model: nn.Module, size: int | None = None) -> tuple[Preprocess, int]:
    """How a picture becomes the model's input.

    By timm's transform for validation: interpolation, crop_pct and crop_mode of the model's `pretrained_cfg`. For a
    model that was trained here these are the pixels that `timm_fsr.load_data` gives.

    Args:
        model: a timm model, or a wrapper of one.
        size: another side of the images than the model's own.

    Returns:
        A function from a picture of mode "L" or "RGB" to a uint8 tensor (C, H, W), and C.

    Raises:
        ValueError: the model does not say the size of its images and none is given, or takes neither 1 nor 3 channels.
    """
    model = base_model(model)
    config = pretrained_cfg_of(model)
    known = input_size(model)
    channels = getattr(model, "in_chans", None) or (known[0] if known else 3)
    if channels not in MODES:
        raise ValueError(f"the model takes images of {channels} channels, but pictures have 1 (grey) or 3 (RGB)")
    if size is None and known is None:
        raise ValueError("the model does not say the size of its images; give the side of the square with size")
    sides = (size, size) if size is not None else known[1:] if known is not None else (0, 0)
    if min(sides) < 1:
        raise ValueError(f"size={size} must be 1 or more: it is a side in pixels")
    transform: Any = create_transform(
        (channels, *sides),
        is_training=False,
        interpolation=config.get("interpolation") or INTERPOLATION,
        crop_pct=config.get("crop_pct"),
        crop_mode=config.get("crop_mode"),
        normalize=False,
    )
    return transform, channels


def output_names(model: nn.Module) -> tuple[str, ...] | None:
    """What to call the model's outputs: its own class names, or ImageNet's where their number is; None if unknown."""
    model = base_model(model)
    config = pretrained_cfg_of(model)
    names = class_names(model)
    if names is not None:
        described = config.get("label_descriptions")
        return tuple(str(described.get(name, name)) for name in names) if isinstance(described, dict) else names
    subset = infer_imagenet_subset(model)
    if subset is None or getattr(model, "num_classes", None) != config.get("num_classes"):
        return None
    return tuple(ImageNetInfo(subset).label_descriptions())
