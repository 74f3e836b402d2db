"""What training starts from: images, the number of steps, and a model with its first weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg
from torch import nn

from timm_fsr.data.dataset import ImageData, Images
from timm_fsr.data.sampling import epoch_steps
from timm_fsr.data.sources import is_image_folder
from timm_fsr.evaluation.classes import KindOfImages, match_classes
from timm_fsr.hooks.attach import reattach
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.models.description import check_runs, class_names, describe, size_text
from timm_fsr.models.memory import activation_bytes, weight_bytes
from timm_fsr.models.pixel import PixelModel, as_pixel_model
from timm_fsr.models.saving import saved_config
from timm_fsr.models.weights import check_finite_weights
from timm_fsr.training.objectives.base import Objective, check_soft_labels
from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.errors import ImageSizeError
from timm_fsr.utils.memory import check_memory
from timm_fsr.utils.random import own_randomness

_FIRST_WEIGHTS = 0.1  # the largest share of a running average that the weights it began with may keep

_COMPILED_VARIANTS = 64  # of the forward pass: modes, batch sizes, with and without gradients and recording


def read_images(recipe: Recipe, accelerator: Accelerator, console: Console) -> tuple[Images, ImageData | None, Images]:
    """Training images, extra ones if the recipe has any, and held-out images, on the device.

    Args:
        recipe: names them.
        accelerator: the device; the main process shows progress.
        console: says what was left out or changed as they were read.

    Raises:
        ValueError: there are too few images, or the test images for the final report do not fit.
        FileNotFoundError: there is no such data.
    """
    progress, device = accelerator.is_main_process, accelerator.device
    data, held_out = recipe.data.build(seed=recipe.seed, progress=progress, mixed_size=_input_side(recipe))
    recipe.data.check_crop(min(data.image_size[1:]))
    recipe.data.check_boxes(data.image_size)
    extra = recipe.data.build_extra(data.classes, data.image_size, progress=progress)
    for note in (*data.notes, *(() if extra is None else extra.notes)):
        console.print(note)
    _check_test_split(recipe, data, console)
    return data.to(device), None if extra is None else extra.to(device), held_out.to(device)


def with_input_of_model(recipe: Recipe, begun: Mapping[str, Any] | None, console: Console) -> Recipe:
    """The recipe with the image size and channels of the saved model that is fine-tuned, where it names none itself.

    A run that is resumed takes what it began with, the number of held-out images included.

    Args:
        recipe: of the run.
        begun: the fixed keys of the run that is resumed, flat, which goes on with what it began with; None: a new run.
        console: says what was taken.
    """
    data = recipe.data
    if begun is not None:
        taken = {key: begun.get(f"data.{key}") for key in ("size", "channels", "held_out")}
    else:
        channels, height, width = (saved_config(recipe.model.name).get("pretrained_cfg") or {}).get(
            "input_size", (None, None, None)
        )
        fits = height == width and "img_size" not in recipe.model.args
        taken = {"size": height if fits else None, "channels": recipe.model.args.get("in_chans", channels)}
        taken["channels"] = taken["channels"] if taken["channels"] in (1, 3) else None
    missing = {key: value for key, value in taken.items() if getattr(data, key) is None and value is not None}
    if not missing:
        return recipe
    if begun is None:
        keys = ", ".join(f"data.{key}={value}" for key, value in missing.items())
        console.print(f"{keys}, as {recipe.model.name} was trained; set them for other images")
    return dataclasses.replace(recipe, data=dataclasses.replace(data, **missing))


def count_steps(recipe: Recipe, images: int, held_out: int, processes: int) -> int:
    """Steps of an epoch; ValueError if the processes cannot share the images or a batch."""
    batch_size, parts = recipe.optim.batch_size, processes * recipe.optim.accumulate
    if batch_size % parts:
        raise ValueError(
            f"optim.batch_size={batch_size} does not divide among {processes} processes with "
            f"optim.accumulate={recipe.optim.accumulate}; make it a multiple of {parts}"
        )
    if recipe.data.mixes and batch_size // processes % 2:
        raise ValueError(
            f"optim.batch_size={batch_size} gives each of {processes} processes {batch_size // processes} images, but "
            f"mixup and CutMix mix them in pairs; make it a multiple of {2 * processes}"
        )
    if held_out < processes:
        raise ValueError(
            f"{held_out} held-out image(s) do not give each of {processes} processes one; raise data.held_out"
        )
    steps = epoch_steps(images, batch_size // processes, world_size=processes)
    if steps == 0:
        raise ValueError(
            f"of {images + held_out} training images {held_out} are held out (data.held_out), and the other {images} "
            f"do not fill a batch of {batch_size}; use more images, or lower optim.batch_size"
        )
    return steps


def build_model(
    recipe: Recipe, data: Images, device: torch.device, processes: int = 1, *, keep_order: bool = False
) -> nn.Module:
    """The timm model with its first weights, which the seed decides, on `device`.

    Args:
        recipe: of the run.
        data: training images.
        device: see above.
        processes: how many share each batch.
        keep_order: the model's outputs are described in the order of the data's classes in any case, also where it has
            been trained on the same classes in another order; see `in_order_of_head`.

    Raises:
        ValueError: it cannot be trained on these images, or not within the memory that there is.
    """
    torch.manual_seed(recipe.seed)
    try:
        timm_model: Any = recipe.model.build(num_classes=data.num_classes, image_size=data.image_size)
        known = class_names(timm_model)
        same = known is not None and set(known) == set(data.classes) and not keep_order
        describe(timm_model, classes=known if known and same else data.classes, image_size=data.image_size)
        _check_memory(recipe, timm_model, data, device, processes)
        logits = check_runs(as_pixel_model(timm_model), data.image_size)
    except ImageSizeError as error:
        raise ValueError(
            f"{error}: set data.size to a side that it takes, or build it for this one where it has the argument "
            f"(model.args.img_size={data.image_size[1]})"
        ) from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, data.num_classes):
        raise ValueError(
            f"{recipe.model.name} returns {f'shape {shape}' if shape else type(logits).__name__} for one image, not a "
            f"logit for each of {data.num_classes} classes; correct model.args={recipe.model.args}"
        )
    if recipe.data.mixes:  # a saved model may have come with layers
        check_soft_labels(recipe.objective.build(), feature_layers(timm_model), because="data.mixup and data.cutmix")
    check_finite_weights(timm_model, f"the first weights of {recipe.model.name}")
    if recipe.gradient_checkpointing:
        _checkpoint_gradients(timm_model)
    if recipe.channels_last:
        timm_model = timm_model.to(memory_format=torch.channels_last)
    if recipe.batch_norm == "sync":
        timm_model = reattach(convert_sync_batchnorm(timm_model))
    return timm_model.to(device)


def in_order_of_head(timm_model: nn.Module, data: KindOfImages, console: Console | None = None) -> KindOfImages:
    """The images with labels as the trained model that is fine-tuned has its outputs: it goes on with what it knows.

    Args:
        timm_model: from `build_model`.
        data: images of its classes.
        console: says so, if labels were moved.
    """
    if class_names(timm_model) == data.classes:
        return data
    moved, notes = match_classes(timm_model, data)
    if console is not None:
        for note in notes:
            console.print(note)
    return moved


def _check_memory(recipe: Recipe, timm_model: nn.Module, data: Images, device: torch.device, processes: int) -> None:
    """Refuse a training that cannot fit: weights, gradients, the average, images held, and feature maps of one pass."""
    count = recipe.optim.batch_size // recipe.optim.accumulate // processes
    recomputed = recipe.gradient_checkpointing or recipe.compile is not None
    maps = activation_bytes(timm_model, (count, *data.image_size), gradients=not recomputed)
    held = data.images.numel() if isinstance(data, ImageData) else 0
    copies = 1 if processes > 1 else 3 if recipe.optim.ema_decay else 2  # several processes may share all but the first
    needed = copies * weight_bytes(timm_model) + held
    check_memory(
        needed + (maps if recipe.mixed_precision == "no" else maps // 2),
        f"{recipe.model.name} and passes over {count} images of {size_text(data.image_size)}",
        "lower optim.batch_size or data.size, raise optim.accumulate, or choose a smaller model or layer",
        device=device,
    )


def check_first_pass(
    recipe: Recipe, timm_model: nn.Module, objective: Objective, data: Images, processes: int, device: torch.device
) -> None:
    """Try the training pass on one image, where each pass has no more, with a copy of the model.

    Raises:
        ValueError: a BatchNorm would see one value for each channel, and cannot be trained on it.
    """
    if recipe.optim.batch_size // recipe.optim.accumulate // processes > 1:
        return
    images, labels = data.batch(torch.arange(1))
    model = PixelModel(copy.deepcopy(timm_model)).to(device).train()
    attack = recipe.attack.build()
    try:
        with own_randomness(device):
            objective.terms(model, attack, images.to(device), images.to(device), labels.to(device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"optim.batch_size={recipe.optim.batch_size} on {processes} process(es) with "
            f"optim.accumulate={recipe.optim.accumulate} passes one image at a time, of which a BatchNorm of "
            f"{recipe.model.name} sees one value for each channel, which has no variance; raise optim.batch_size or "
            "lower optim.accumulate"
        ) from error


def cautions(recipe: Recipe, steps_per_epoch: int) -> list[str]:
    """What cannot come about in a run of this length, as sentences; it may be a short trial, so it is not refused."""
    optim, attack, found = recipe.optim, recipe.attack, []
    share = optim.ema_decay ** (optim.epochs * steps_per_epoch)
    if share > _FIRST_WEIGHTS and not optim.ema_warmup:
        found.append(
            f"optim.ema_decay={optim.ema_decay} is slow for {optim.epochs * steps_per_epoch} steps: at the end "
            f"{100 * share:.0f} % of the average, which is what is validated and saved, would still be the first "
            "weights; set optim.ema_warmup=true, or lower optim.ema_decay"
        )
    if attack.warmup_epochs >= optim.epochs and recipe.objective.build().attacks:
        found.append(
            f"attack.warmup_epochs={attack.warmup_epochs:g} of {optim.epochs} epochs: the full eps is never trained at"
        )
    if optim.schedule == "step" and optim.milestones and min(optim.milestones) >= optim.epochs:
        found.append(
            f"optim.milestones={optim.milestones} lie beyond the last of {optim.epochs} epochs: the rate never falls"
        )
    return found


@contextmanager
def compilation(backend: str | None) -> Iterator[None]:
    """Compile with this backend while the block runs, or fail: torch.compile itself would silently not compile."""
    if backend is None:
        yield
        return
    import torch._dynamo

    if torch._dynamo.config.disable:
        raise ValueError(
            f"compile={backend} was asked for, but torch.compile is switched off; unset "
            "TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, or leave out compile"
        )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=_COMPILED_VARIANTS):
        yield


def _input_side(recipe: Recipe) -> tuple[int, int] | None:
    """(height, width) of the images that the model is made for, if that is known."""
    side = recipe.model.args.get("img_size")
    if side is not None:
        return (side, side) if isinstance(side, int) else tuple(side)
    saved = saved_config(recipe.model.name).get("pretrained_cfg") or {}
    config = get_pretrained_cfg(recipe.model.name)
    size = saved.get("input_size") or (None if config is None else config.input_size)
    return tuple(size[1:]) if size else None


def _check_test_split(recipe: Recipe, data: Images, console: Console) -> None:
    """Open the test images that the final report needs; ValueError if they are missing or of another kind.

    It is said if they have another size than the training images, whose size they get.
    """
    if not recipe.evaluation.attacks:
        return
    options = recipe.data
    if options.test_split == options.train_split:
        raise ValueError(
            f"data.test_split={options.test_split} holds the training images, so the final report would say "
            "nothing about new ones; name another split, or leave the report out with evaluation.attacks=[]"
        )
    if options.streamed or not is_image_folder(options.source):  # else all are read, for single files may be broken
        options = dataclasses.replace(options, limit_test=1, on_error="stop")
    one = options.build_test(data.classes, progress=False, image_size=data.image_size)
    if one.image_size[0] != data.image_size[0]:
        raise ValueError(
            f"the test images have {one.image_size[0]} channels but the training images {data.image_size[0]}; set "
            "data.channels"
        )
    of_test, of_training = (images.stored if isinstance(images, ImageData) else None for images in (one, data))
    if of_test is None or of_training is None or of_training[1:] != data.image_size[1:]:  # all are scaled
        return
    if of_test[1:] != of_training[1:]:
        console.print(
            f"the first test image is {size_text(of_test)} but the first training image {size_text(of_training)}: test "
            "images are scaled and centre-cropped to the size of the training images"
        )


def _checkpoint_gradients(timm_model: Any) -> None:
    """Switch timm's gradient checkpointing on; ValueError for a model that has none."""
    try:
        timm_model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"{type(timm_model).__name__} has no gradient checkpointing in timm; leave out gradient_checkpointing and "
            "raise optim.accumulate to save memory"
        ) from error
