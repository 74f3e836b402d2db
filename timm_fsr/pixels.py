"""Pixel-space models: a timm model with its normalisation in front, from images in [0, 1] to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelModel(nn.Module):
    """Maps images in [0, 1] to logits: normalises by the timm model's `pretrained_cfg` mean and std, then calls it.

    Attacks, objectives and evaluation work on such a model, so that eps means pixels everywhere.

    Args:
        model: a timm model, or any module with a `pretrained_cfg` of `mean` and `std`; without one it gets the
            pixels as they are.

    Raises:
        ValueError: mean and std do not fit the model's number of input channels, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = getattr(model, "pretrained_cfg", None) or {}
        channels = getattr(model, "in_chans", None) or (config.get("input_size") or (3,))[0]
        mean, std = (_per_channel(config.get(key, default), channels, key) for key, default in _PLAIN.items())
        if not (std > 0).all():  # also true for NaN
            raise ValueError(
                f"pretrained_cfg['std'] must be positive to divide by, but it is {std.tolist()}; correct it"
            )
        self.is_identity = bool((mean == 0).all() and (std == 1).all())
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of `images` (N, C, H, W) in [0, 1]."""
        return self.model(images if self.is_identity else (images - self.mean) / self.std)


_PLAIN = {"mean": (0.0,), "std": (1.0,)}


def as_pixel_model(model: nn.Module) -> nn.Module:
    """`model` itself when it takes pixels already (a PixelModel, also inside a wrapper), else a PixelModel of it."""
    if any(isinstance(module, PixelModel) for module in model.modules()):
        return model
    wrapped = PixelModel(model)
    wrapped.training = model.training  # not train(), which would set each of the model's own modules too
    parameter = next(model.parameters(), None)
    return wrapped if parameter is None else wrapped.to(parameter.device)


def check_images(images: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> None:
    """Refuse what is no batch of pixels with its classes.

    Raises:
        ValueError: `images` not (N, C, H, W) floating point in [0, 1], or `labels` not (N,) integers in
            [0, num_classes).
    """
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


def _per_channel(values: object, channels: int, key: str) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float32).flatten()
    if tensor.numel() == channels:
        return tensor
    if len(set(tensor.tolist())) == 1 or channels == 1:  # timm's custom: a grey image is normalised by the average
        return tensor.mean().expand(channels).clone()
    raise ValueError(
        f"pretrained_cfg[{key!r}] has {tensor.numel()} values but the model takes {channels} channels; "
        f"set pretrained_cfg[{key!r}] to {channels} values"
    )
