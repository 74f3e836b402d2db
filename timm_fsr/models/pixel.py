"""Models in pixel space: a timm model's mean and std in front of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_fsr.hooks.placement import pretrained_cfg_of


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
        config = pretrained_cfg_of(model)
        channels = getattr(model, "in_chans", None) or (config.get("input_size") or (3,))[0]
        mean, std = (per_channel(config.get(key, default), channels, key) for key, default in _PLAIN.items())
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
    return wrapped.to(device_of(model))


def mean_and_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the first `PixelModel` in `model` subtracts and divides by, one number for each channel."""
    pixel = next(module for module in model.modules() if isinstance(module, PixelModel))
    return tuple(pixel.mean.flatten().tolist()), tuple(pixel.std.flatten().tolist())


def per_channel(values: object, channels: int, key: str) -> Tensor:
    """The mean or std of a configuration, a float32 tensor (channels,).

    Args:
        values: one for each channel of the source of the weights, or one for all.
        channels: that the model takes.
        key: "mean" or "std", for the message.

    Raises:
        ValueError: there are others than that.
    """
    tensor = torch.as_tensor(values, dtype=torch.float32).flatten()
    if tensor.numel() == channels:
        return tensor
    if len(set(tensor.tolist())) == 1 or channels == 1:  # timm's custom: a grey image is normalised by the average
        return tensor.mean().expand(channels).clone()
    raise ValueError(
        f"pretrained_cfg[{key!r}] has {tensor.numel()} values but the model takes {channels} channels; "
        f"set pretrained_cfg[{key!r}] to {channels} values"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def base_model(model: nn.Module) -> nn.Module:
    """The timm model inside wrappers (DDP, compiled, PixelModel)."""
    for attribute in ("module", "_orig_mod"):
        inner = model._modules.get(attribute)
        if inner is not None:
            return base_model(inner)
    return base_model(model.model) if isinstance(model, PixelModel) else model
