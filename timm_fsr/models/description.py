"""What a model knows of its data: the names of its classes, in the order of its outputs, and its images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timm_fsr.data.decoding import ModelCrop
from timm_fsr.hooks.attach import watch_classifier
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.memory import activation_bytes
from timm_fsr.models.pixel import base_model, device_of
from timm_fsr.utils.errors import ImageSizeError, UnsoundError, is_out_of_memory
from timm_fsr.utils.memory import check_memory
from timm_fsr.utils.random import own_randomness

INTERPOLATION = "bicubic"
"""How `timm_fsr.load_data` scales images."""

_SMALL = 2**22
"""Numbers of an image that any machine can pass through any model; of a larger one the memory is estimated first."""

_OF_THE_SOURCE = ("test_input_size", "test_crop_pct", "test_pool_size", "label_descriptions", "label_offset")


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the model's classes in the order of its outputs; None if it knows none, or names of other classes.

    Args:
        model: a timm model, or a wrapper of one.
    """
    model = base_model(model)
    found = numbered_names(pretrained_cfg_of(model).get("label_names"))
    return found if found and len(found) == getattr(model, "num_classes", len(found)) else None


def numbered_names(names: object) -> tuple[str, ...] | None:
    """Names of classes in the order of their numbers, from either of timm's forms; None if there are none.

    Args:
        names: `label_names` of a configuration, a list or a dictionary by number.
    """
    if isinstance(names, Mapping):
        numbered = {int(number): name for number, name in names.items() if str(number).isdigit()}
        names = [numbered[number] for number in range(len(numbered)) if number in numbered]
    if not names or not isinstance(names, (list, tuple)):
        return None
    found = tuple(map(str, names))
    return found if len(set(found)) == len(found) else None


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that the model was made for; None if it does not say."""
    model = base_model(model)
    size = pretrained_cfg_of(model).get("input_size")
    if not size:
        return None
    channels, *sides = size
    height, width = getattr(model, "_traits", {}).get("img_size") or sides
    return getattr(model, "in_chans", None) or channels, height, width


def own_crop(model: nn.Module) -> ModelCrop | None:
    """How the model's configuration scales and crops images, where that is not as `timm_fsr.load_data` does by itself.

    Weights of timm have a way of their own (`crop_pct` below 1, bilinear scaling); models trained here have not.
    """
    config = pretrained_cfg_of(base_model(model))
    share, mode = config.get("crop_pct") or 1.0, config.get("crop_mode") or "center"
    interpolation = config.get("interpolation") or INTERPOLATION
    if (share, mode, interpolation) == (1.0, "center", INTERPOLATION):
        return None
    size = input_size(model)
    fill = _per_channel(config.get("mean") or (0.0,), size[0] if size else 3)
    return ModelCrop(float(share), mode, interpolation, fill)


def describe(model: nn.Module, *, classes: Sequence[str], image_size: tuple[int, int, int]) -> None:
    """Write into the model's configuration which images and classes it is trained on, so that both are saved with it.

    The configuration then makes timm prepare images as `timm_fsr.load_data` does: scaled to this size and not cropped
    further. Mean and std stay, one value for each channel. What it said of the source of its weights is removed.

    Args:
        model: a timm model, whose `pretrained_cfg` is changed.
        classes: the name of each class, in the order of the labels.
        image_size: channels, height and width of the images.
    """
    model = base_model(model)
    config = pretrained_cfg_of(model)
    assert isinstance(config, dict), "a model of timm"
    if tuple(config.get("input_size") or ())[1:] != tuple(image_size[1:]):
        config["pool_size"] = None
    for key in _OF_THE_SOURCE:
        config.pop(key, None)
    config |= {
        "num_classes": len(classes),
        "label_names": list(classes),
        "input_size": tuple(image_size),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": INTERPOLATION,
        "mean": _per_channel(config.get("mean") or (0.0,), image_size[0]),
        "std": _per_channel(config.get("std") or (1.0,), image_size[0]),
    }
    watch_classifier(model)


def forget_other_classes(model: nn.Module) -> None:
    """Remove names of classes that the model does not have, as after loading it for another number of classes."""
    config = pretrained_cfg_of(base_model(model))
    if isinstance(config, dict) and config.get("label_names") and class_names(model) is None:
        for key in ("label_names", "label_descriptions"):
            config.pop(key, None)


def check_image_memory(model: nn.Module, image_size: tuple[int, int, int]) -> None:
    """Refuse images so large that no machine like this passes one of them through the model.

    Args:
        model: a timm model or a pixel-space model.
        image_size: channels, height and width of an image.

    Raises:
        ValueError: one feature map alone needs more than the memory that there is.
    """
    if math.prod(image_size) > _SMALL:
        needed = activation_bytes(model, (1, *image_size), gradients=False)
        what = f"feature maps of images of {size_text(image_size)}"
        check_memory(needed, what, "choose a smaller size", device=device_of(model))


def check_runs(model: nn.Module, image_size: tuple[int, int, int]) -> Any:
    """Try the model on one blank image, in eval mode.

    Args:
        model: a timm model or a pixel-space model.
        image_size: channels, height and width of the image.

    Returns:
        What the model returns for it.

    Raises:
        ValueError: the model takes another number of channels, or the memory cannot hold its feature maps.
        ImageSizeError: the model does not run on images of this size.
    """
    channels = getattr(base_model(model), "in_chans", image_size[0])
    if channels != image_size[0]:
        raise ValueError(f"images have {image_size[0]} channels but the model takes {channels}; convert the images")
    device = device_of(model)
    check_image_memory(model, image_size)
    image = torch.zeros(1, *image_size, device=device)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), own_randomness(device):
            return model.eval()(image)
    except UnsoundError:  # of a layer that was left out, at any size
        raise
    except Exception as error:  # each network has its own for this: AssertionError, RuntimeError, ValueError ...
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ImageSizeError(
            f"{pretrained_cfg_of(base_model(model)).get('architecture') or type(base_model(model)).__name__} does not "
            f"take images of {size_text(image_size)} ({type(error).__name__}: {reason})"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def size_text(image_size: tuple[int, int, int]) -> str:
    """Such as "3x32x32"."""
    return "x".join(map(str, image_size))


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """As `PixelModel` normalises by them."""
    values = tuple(values)
    if len(values) == channels:
        return values
    if len(set(values)) == 1 or channels == 1:
        return (float(torch.tensor(values, dtype=torch.float32).mean()),) * channels
    return values  # PixelModel says what is wrong with them
