"""Prediction: what a model sees in pictures, how sure it is, and how little changes its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from timm_fsr.attacks.base import NORMS, attack_mode
from timm_fsr.data.pictures import find_pictures, read_picture, to_mode
from timm_fsr.evaluation.flips import attacks_in_words, smallest_flips
from timm_fsr.evaluation.inference import check_channels, full_precision
from timm_fsr.evaluation.model_checks import check_logits
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.hooks.tape import Tape, record
from timm_fsr.models.description import check_runs
from timm_fsr.models.pixel import as_pixel_model, base_model, device_of
from timm_fsr.models.preprocessing import output_names, preprocessing
from timm_fsr.models.saving import load, training_report
from timm_fsr.reports.overlays import draw_overlays
from timm_fsr.reports.report import Report, format_eps
from timm_fsr.utils.defaults import PRECISIONS, PREDICT_BATCH_SIZE
from timm_fsr.utils.errors import ImageSizeError, check_images, unknown

_DTYPES = dict(zip(PRECISIONS, (None, torch.bfloat16, torch.float16), strict=True))

Pictures = str | Path | Image.Image | Tensor | Sequence[str | Path | Image.Image]


@dataclass(frozen=True)
class Flip:
    """The smallest perturbation found that changes a model's answer to an image.

    Attributes:
        norm: "linf" or "l2".
        eps: its size in pixels of [0, 1]: an upper bound on the distance to the nearest such image, as another attack
            may find a nearer one. Infinite where no attack has found any.
        to: the name of the other answer; None where none was found.
        attacks: what has looked for it.
    """

    norm: str
    eps: float
    to: str | None
    attacks: str

    def __str__(self) -> str:
        if self.to is None:
            return "no attack flips it"
        return f"flips to {self.to} at {self.norm.capitalize()} {format_eps(self.eps, self.norm)}"


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: path, or "image 3" where it has none.
        classes: names of the likeliest classes, best first.
        indices: their positions among the model's outputs.
        probabilities: the softmax of the logits there, in [0, 1].
        flip: how little changes the answer, where that was asked for.
        drawing: the file with the layers' masks, where that was asked for.
    """

    image: str
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]
    flip: Flip | None = None
    drawing: str | None = None

    def __str__(self) -> str:
        pairs = zip(self.classes, self.probabilities, strict=True)
        said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in pairs)
        return f"{self.image}: {said}{f'; {self.flip}' if self.flip else ''}"


def predict(
    model: nn.Module | str | Path,
    images: Pictures,
    *,
    topk: int = 5,
    robustness: bool = False,
    norm: str | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    batch_size: int = PREDICT_BATCH_SIZE,
    precision: str = "fp32",
    seed: int = 0,
    skip: Callable[[str], None] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[Prediction]:
    """Ask a model about pictures.

    Args:
        model: a timm model or a pixel-space model, or the name of one with weights: a folder, a tag,
            "hf-hub:user/name". It runs in eval mode and is left as it was.
        images: a file, folder or pattern ("photos/*.jpg"), a PIL picture, or a list of these, prepared as the model was
            trained or evaluated; or a tensor (N, C, H, W) in [0, 1], taken as it is.
        topk: how many classes to name.
        robustness: find for each image the smallest eps at which attacks change the answer.
        norm: that eps is measured in, "linf" or "l2"; None: that of the model's report, else "linf".
        masks: folder for a PNG of each image with the layers' masks over it.
        classes: names of the model's outputs; None: those that the model knows, ImageNet's where their number fits.
        size: another side of the images than the model's own.
        batch_size: images per pass.
        precision: "fp32", or "bf16" or "fp16" by autocast.
        seed: of the attacks' random starts.
        skip: called with a sentence about each file that cannot be read, which is then left out; None raises an error.
        progress: called with the number of finished images and what is being done.

    Raises:
        ValueError: no images, none that can be read, a model without a mask to draw, arguments that do not fit.
        FileNotFoundError: no such image or model.
    """
    _check_options(topk, batch_size, precision, robustness)
    own = None
    if not isinstance(model, nn.Module):
        name, model = str(model), load(str(model), pretrained=True)
        own = training_report(name, model)
    model = as_pixel_model(model)
    asked = _Asked(
        topk=topk,
        classes=None if classes is None else tuple(classes),
        norm=chosen_norm(norm, own) if robustness else None,
        folder=None if masks is None else Path(masks),
        precision=precision,
        seed=seed,
    )
    if masks is not None:
        check_drawable(model)
    show = progress or (lambda _, __: None)
    results: list[Prediction] = []
    with attack_mode(model), full_precision(device_of(model)):
        for labels, batch in _batches(model, images, size, batch_size, skip):
            results += asked.about(model, labels, batch, partial(show, len(results)))
            show(len(results), "")
    if not results:
        raise ValueError("none of the images could be read; convert them to PNG or JPEG")
    return results


def chosen_norm(norm: str | None, own: Report | None) -> str:
    """The norm that distances are measured in: the one asked for, else that of the model's report, else "linf".

    Raises:
        ValueError: a norm that there is no strong attack for.
    """
    found = norm or (own.norm if own is not None else "linf")
    if found not in NORMS:
        whose = "" if norm else "the model's own norm, "
        raise ValueError(
            f"{whose}{found!r}, has no strong attack here that finds the smallest eps; use the norm 'linf' or 'l2'"
        )
    return found


def check_drawable(model: nn.Module) -> None:
    """Raise ValueError for a model without a feature layer, which has no mask to draw."""
    if not feature_layers(model):
        name = pretrained_cfg_of(base_model(model)).get("architecture") or type(base_model(model)).__name__
        raise ValueError(
            f"{name} has no feature layer, so there is no mask to draw; choose a model with one, such as {name}_fsr, "
            "or leave the masks out"
        )


@dataclass(frozen=True)
class _Asked:
    """What is asked of each batch."""

    topk: int
    classes: tuple[str, ...] | None
    norm: str | None
    folder: Path | None
    precision: str
    seed: int
    drawn: set[str] = field(default_factory=set)  # names of the files in `folder`

    def about(
        self, model: nn.Module, labels: list[str], images: Tensor, say: Callable[[str], None]
    ) -> list[Prediction]:
        """The predictions for one batch of images (N, C, H, W)."""
        dtype = _DTYPES[self.precision]
        cast = torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)
        with torch.no_grad(), record(model) as tape, cast:
            logits = model(images)
        logits = logits.float() if isinstance(logits, Tensor) else logits
        check_logits(logits, len(images))
        names = _names(model, self.classes, logits.shape[1])
        shares, indices = (found.cpu() for found in logits.softmax(dim=1).topk(min(self.topk, len(names)), dim=1))
        firsts = [
            f"{names[index]} {100 * share:.1f} %" for index, share in zip(indices[:, 0], shares[:, 0], strict=True)
        ]
        drawings = self._draw(labels, firsts, images, tape) if self.folder else [None] * len(labels)
        flips = self._flips(model, images, names, say) if self.norm else [None] * len(labels)
        return [
            Prediction(
                image=label,
                classes=tuple(names[index] for index in row),
                indices=tuple(row),
                probabilities=tuple(probabilities),
                flip=flip,
                drawing=drawing,
            )
            for label, row, probabilities, flip, drawing in zip(
                labels, indices.tolist(), shares.tolist(), flips, drawings, strict=True
            )
        ]

    def _flips(
        self, model: nn.Module, images: Tensor, names: Sequence[str], say: Callable[[str], None]
    ) -> list[Flip | None]:
        assert self.norm is not None
        found = smallest_flips(model, images, norm=self.norm, seed=self.seed, progress=say)
        attacks = attacks_in_words(model, self.norm)
        return [
            Flip(self.norm, eps, None if math.isinf(eps) else names[after], attacks)
            for eps, after in zip(found.eps.tolist(), found.after.tolist(), strict=True)
        ]

    def _draw(self, labels: list[str], firsts: list[str], images: Tensor, tape: Tape) -> list[str | None]:
        """The files drawn, each with every site's mask."""
        assert self.folder is not None
        tape.check_fired()
        masks = {name: tape[name].mask.mean(dim=1) for name in tape if hasattr(tape[name], "mask")}
        if not masks:
            raise ValueError(
                "the model's feature layer has no mask to draw, as 'fsr' and 'hfdr' have; leave the masks out"
            )
        files: list[str | None] = []
        for row, label in enumerate(labels):
            path = self.folder / self._file(label)
            draw_overlays(
                f"{Path(label).name}: {firsts[row]}", images[row], {key: mask[row] for key, mask in masks.items()}, path
            )
            files.append(str(path))
        return files

    def _file(self, label: str) -> str:
        """A name that no other image of this run has: not the image's own, as the folder may be that of the images."""
        stem = f"{Path(label).stem or 'image'}_mask"
        numbered = (f"{stem}{f'_{number}' if number > 1 else ''}.png" for number in count(1))
        name = next(name for name in numbered if name not in self.drawn)
        self.drawn.add(name)
        return name


def _check_options(topk: int, batch_size: int, precision: str, robustness: bool) -> None:
    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk={topk} and batch_size={batch_size} must be 1 or more")
    if precision not in PRECISIONS:
        raise ValueError(unknown("precision", precision, list(PRECISIONS)))
    if robustness and precision != "fp32":
        raise ValueError(
            f"robustness is found in float32, as half precision hides weak spots; leave out precision={precision!r}"
        )


def _names(model: nn.Module, classes: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """What the model's outputs are called."""
    if classes is not None and len(classes) != count:
        raise ValueError(f"{len(classes)} class names were given, but the model has {count} classes; give one for each")
    found = classes or output_names(model)
    return found if found is not None and len(found) == count else tuple(f"class {index}" for index in range(count))


def _batches(
    model: nn.Module, images: Pictures, size: int | None, batch_size: int, skip: Callable[[str], None] | None
) -> Iterator[tuple[list[str], Tensor]]:
    """What the images are called, and the images (N, C, H, W) on the model's device."""
    device = device_of(model)
    named = _tensors(images, model) if isinstance(images, Tensor) else _prepared(model, images, size, skip)
    first = True
    while batch := list(islice(named, batch_size)):
        pixels = torch.stack([image for _, image in batch]).to(device)
        if first:
            _check_runs(model, pixels)
        first = False
        yield [label for label, _ in batch], pixels


def _tensors(images: Tensor, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    check_images(images)
    check_channels(model, images)
    yield from ((f"image {number}", image.float()) for number, image in enumerate(images, 1))


def _prepared(
    model: nn.Module, images: Pictures, size: int | None, skip: Callable[[str], None] | None
) -> Iterator[tuple[str, Tensor]]:
    prepare, channels = preprocessing(model, size)
    for number, item in enumerate(_listed(images), 1):
        try:
            if isinstance(item, Image.Image):
                label, picture = f"image {number}", to_mode(item, channels)
            else:
                label, picture = str(item), read_picture(item, channels)
        except (ValueError, OSError) as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        yield label, prepare(picture).float() / 255


def _listed(images: Pictures) -> list[Path | Image.Image]:
    """Each picture, or the path of each."""
    given: Any = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    wrong = [type(item).__name__ for item in given if not isinstance(item, (str, Path, Image.Image))]
    if wrong:
        raise ValueError(f"images has a {wrong[0]}; give paths, PIL pictures or a tensor (N, C, H, W) in [0, 1]")
    found: list[Path | Image.Image] = []
    for item in given:
        found += [item] if isinstance(item, Image.Image) else find_pictures([item])
    if not found:
        raise ValueError("no images were given; name files, folders or patterns such as 'photos/*.jpg'")
    return found


def _check_runs(model: nn.Module, pixels: Tensor) -> None:
    channels, height, width = pixels.shape[1:]
    try:
        check_runs(model, (channels, height, width))
    except ImageSizeError as error:
        raise ValueError(f"{error}; choose another size") from error
