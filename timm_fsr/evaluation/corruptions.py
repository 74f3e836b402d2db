"""Common corruptions: the 15 kinds of ImageNet-C and CIFAR-10-C at 5 severities, made on the fly.

The benchmark is that of Hendrycks and Dietterich (2019, arXiv 1903.12261); the package imagecorruptions-imaug (extra
"corruptions") makes the images. What that means for the figures:

- Its severities are those of ImageNet-C, made for 224x224 pixels. CIFAR-10-C has milder ones for 32x32, so figures on
  small images are lower than on CIFAR-10-C and must not be compared with those. Severities 1 to 5 of either:
  gaussian_noise .08 to .38 (CIFAR-10-C .04 to .10), contrast .4 to .05 (.75 to .15), the quality of jpeg_compression
  25 to 7 (80 to 40).
- Three kinds differ somewhat from ImageNet-C itself: motion_blur and snow add up shifted copies where that calls
  ImageMagick, elastic_transform has no affine part and moves pixels by a share of the image's size.
- Images pass through 8 bits and, in jpeg_compression alone, through a file format, as in the benchmark.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import eval_mode
from timm_fsr.evaluation.classes import judged_data
from timm_fsr.evaluation.inference import Batches, as_batches, full_precision
from timm_fsr.evaluation.model_checks import check_finite
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.utils.errors import check_images, unknown
from timm_fsr.utils.random import derive_generator

CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

_SMALLEST = 32  # pixels on a side; the library refuses smaller images
_OWN_SEED = ("impulse_noise", "glass_blur")  # those that do not draw from numpy's global state but take a seed


def corrupt(images: Tensor, name: str, severity: int, *, seed: int, first_index: int = 0) -> Tensor:
    """Corrupt each image.

    What is random in the result for an image depends on `seed`, `name`, `severity` and the image's position in the
    data set, and on nothing else: neither on the other images nor on how they are cut into batches. The random states
    of numpy and torch are left as they were. Do not call it from several threads at once: the library draws from
    numpy's one global state.

    Args:
        images: (N, C, H, W) floating point in [0, 1], with 1 or 3 channels. Below 32 pixels a side an image is padded
            by reflection, corrupted and cut out again. A grey image is made three equal channels, one of which is
            kept: the mean of all would make independent noise weaker by a factor of sqrt(3).
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of what is random.
        first_index: position of the first image in the data set, 0 or more.

    Returns:
        A new tensor in [0, 1] of the same shape, dtype and device; its values are multiples of 1/255.

    Raises:
        ValueError: an unknown name or severity, or images that are no such batch.
        ImportError: the extra is not installed, or does not work.
    """
    _check_kind(name, severity)
    check_images(images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; corruptions are defined for 1 (grey) and 3 (RGB)")
    module = library()
    pixels = images.detach().float().mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    with _numpy_state_kept():
        corrupted = [
            _corrupt_one(module, image, name, severity, _words(seed, name, severity, index))
            for index, image in enumerate(pixels.expand(-1, -1, -1, 3).numpy(), first_index)
        ]
    result = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2).double().div(255)
    if images.shape[1] == 1:
        result = result[:, :1]
    return result.to(images.dtype).to(images.device).contiguous()


class CorruptionAccuracy(dict[str, dict[int, float]]):
    """The share of images classified correctly, in [0, 1], by name and severity.

    Attributes:
        notes: what a reader has to know of how labels were read, as sentences.
    """

    notes: tuple[str, ...] = ()


def corruption_accuracy(
    model: nn.Module,
    data: Batches,
    *,
    severities: Sequence[int] = SEVERITIES,
    names: Sequence[str] = CORRUPTIONS,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CorruptionAccuracy:
    """Accuracy of a model under each corruption at each severity.

    The model runs in eval mode and in float32; its mode is restored. The module's docstring says how far the
    figures may be compared with those on CIFAR-10-C and ImageNet-C.

    Args:
        model: a timm model (its `pretrained_cfg` mean and std are put in front) or a pixel-space model.
        data: as in `timm_fsr.evaluate`: what `timm_fsr.load_data` returns, images (N, C, H, W) in [0, 1] with labels
            (N,), or an iterable of such batches.
        severities: out of 1 to 5.
        names: out of `CORRUPTIONS`.
        seed: of what is random in the corruptions; see `corrupt`.
        classes: as in `timm_fsr.evaluate`, as is `batch_size`.
        batch_size: see `classes`.
        progress: called with (images done, images correct under all corruptions so far) after each batch.

    Returns:
        The share of images classified correctly, in [0, 1], by name and severity. Its `notes` say how the labels of the
        data were read, where they are not in the order of the model's outputs.

    Raises:
        ValueError: an unknown name or severity, images or labels that do not fit the model, or no data.
        ImportError: the extra is not installed, or does not work.
    """
    for name in names:
        for severity in severities:
            _check_kind(name, severity)
    library()
    pixel_model = as_pixel_model(model)
    device = device_of(model)
    judged = judged_data(model, data, classes)
    right = {name: dict.fromkeys(severities, 0) for name in names}
    survivors = done = 0
    with eval_mode(pixel_model), torch.no_grad(), full_precision(device):
        for images, labels in as_batches(judged.batches, batch_size):
            alive = torch.ones(len(images), dtype=torch.bool)
            for name, counts in right.items():
                for severity in counts:
                    corrupted = corrupt(images, name, severity, seed=seed, first_index=done)
                    correct = _correct(pixel_model, corrupted.to(device), labels.to(device)).cpu()
                    counts[severity] += int(correct.sum())
                    alive &= correct
            done += len(images)
            survivors += int(alive.sum())
            if progress is not None:
                progress(done, survivors)
    if not done:
        raise ValueError("there is no image to corrupt; check the data's split and limit")
    found = CorruptionAccuracy(
        {name: {severity: count / done for severity, count in counts.items()} for name, counts in right.items()}
    )
    found.notes = judged.notes
    return found


def _check_kind(name: str, severity: int) -> None:
    if name not in CORRUPTIONS:
        raise ValueError(
            unknown("corruption", name, list(CORRUPTIONS)) + "; see timm_fsr.evaluation.corruptions.CORRUPTIONS"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} does not exist; use 1 (mildest), 2, 3, 4 or 5")


def library() -> Any:
    """The module `imagecorruptions`, of which the older package of that very name does not run any more."""
    remedy = 'install it with `pip install "timm-fsr[corruptions]"`'
    try:
        module = importlib.import_module("imagecorruptions")
    except ImportError as error:
        if error.name == "imagecorruptions":
            raise ModuleNotFoundError(f"corruptions need the package imagecorruptions-imaug; {remedy}") from error
        raise ImportError(
            f"imagecorruptions cannot be imported ({error}); if a libGL is missing, install the system's (libgl1) or "
            "opencv-python-headless; if the package is imagecorruptions, uninstall it: imagecorruptions-imaug is the "
            f"one that runs with today's libraries, {remedy}"
        ) from error
    if "seed" not in inspect.signature(module.corruptions.glass_blur).parameters:
        raise ImportError(
            "the installed imagecorruptions takes no seed, so its results could not be repeated; uninstall it: "
            f"imagecorruptions-imaug is the one to use, {remedy}"
        )
    return module


def _words(seed: int, name: str, severity: int, index: int) -> list[int]:
    """Two words of 32 bits that seed numpy for one image."""
    derived = derive_generator(seed, 0, index, 0, stream=f"corrupt {name} {severity}").initial_seed()
    return [derived >> 32 & 0xFFFFFFFF, derived & 0xFFFFFFFF]


def _corrupt_one(library: Any, image: Any, name: str, severity: int, words: list[int]) -> Any:
    """A corrupted copy of a uint8 array (H, W, 3), padded by reflection to the library's smallest size meanwhile."""
    height, width, _ = image.shape
    before = [max(_SMALLEST - side, 0) // 2 for side in (height, width)]
    after = [max(_SMALLEST - side, 0) - first for side, first in zip((height, width), before, strict=True)]
    padded = np.pad(image, (*zip(before, after, strict=True), (0, 0)), mode="reflect")
    np.random.seed(words)
    own = {"seed": words[0]} if name in _OWN_SEED else {}
    corrupted = library.corrupt(padded, severity=severity, corruption_name=name, **own)
    return corrupted[before[0] : before[0] + height, before[1] : before[1] + width]


@contextmanager
def _numpy_state_kept() -> Iterator[None]:
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: is the image classified correctly?"""
    logits = model(images)
    check_images(images, labels, logits.shape[1])
    check_finite(logits, "corrupted")
    return logits.argmax(dim=1) == labels
