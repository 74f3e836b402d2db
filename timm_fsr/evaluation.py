"""Evaluation: the outcome of clean images and attacks for every image, in pixel space and full precision."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.attacks import FGSM, PGD, Attack, attack_mode
from timm_fsr.data import derive_generator
from timm_fsr.hub import base_model
from timm_fsr.layers.base import unknown
from timm_fsr.pixels import as_pixel_model, check_images
from timm_fsr.report import Report
from timm_fsr.sites import layer_groups, record
from timm_fsr.version import __version__

Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
BATCH_SIZE = 250


def evaluate(
    model: nn.Module,
    data: Batches,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    attacks: Sequence[str] = ("fgsm", "pgd20"),
    seed: int = 0,
    name: str = "",
    data_name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Clean and robust accuracy of a model, image by image.

    The model runs in eval mode, float32 and without TF32; its mode and gradients flags are restored.

    Args:
        model: a timm model (its `pretrained_cfg` mean and std are put in front) or a pixel-space model.
        data: images (N, C, H, W) in [0, 1] with labels (N,), or an iterable of such batches.
        norm: "linf" or "l2".
        eps: radius, in pixels of [0, 1].
        attacks: "fgsm", "pgd<steps>" (step 2.5 * eps / steps, random start), e.g. "pgd20".
        seed: of the random starts; they depend on it, the attack and the position of the batch alone.
        name: of the model, for the report.
        data_name: of the data, for the report.
        progress: called with (images done, images correct under all so far) after each batch.

    Returns:
        The report; its "clean" comes first.

    Raises:
        ValueError: an unknown attack, images outside [0, 1], labels that do not fit, a model that does not return
            one finite row of logits per image, or no data.
        RuntimeError: a feature layer that does not fire.
    """
    chosen = _build_attacks(attacks, norm, eps)
    pixel_model = as_pixel_model(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outcomes: dict[str, list[Tensor]] = {key: [] for key in ("clean", *chosen)}
    survivors = done = 0
    with attack_mode(pixel_model), _full_precision(device):
        for index, (images, labels) in enumerate(_batches(data)):
            correct = _outcomes(pixel_model, chosen, images.to(device), labels.to(device), seed, index)
            for key, flags in correct.items():
                outcomes[key].append(flags.cpu())
            done += len(images)
            survivors += int(torch.stack(list(correct.values())).all(dim=0).sum())
            if progress is not None:
                progress(done, survivors)
    if not outcomes["clean"]:
        raise ValueError("there is no image to evaluate on; check the data's split and limit")
    return Report(
        correct={key: torch.cat(parts) for key, parts in outcomes.items()},
        attacks={key: repr(attack) for key, attack in chosen.items()},
        norm=norm,
        eps=float(eps),
        seed=seed,
        conditions=_conditions(model, name, data_name, device),
    )


def build_attack(name: str, norm: str, eps: float) -> Attack:
    """The evaluation attack called `name` in the ball of radius `eps`.

    Raises:
        ValueError: an unknown name; the message names the nearest.
    """
    if name == "fgsm":
        return FGSM(norm=norm, eps=eps)
    steps = re.fullmatch(r"pgd([1-9]\d*)", name)
    if steps:
        return PGD(norm=norm, eps=eps, steps=int(steps[1]))
    raise ValueError(unknown("attack", name, ["fgsm", "pgd10", "pgd20", "pgd100"]))


def _build_attacks(names: Sequence[str], norm: str, eps: float) -> dict[str, Attack]:
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is one name where a list belongs; use [{names!r}]")
    return {name: build_attack(name, norm, eps) for name in names}


def _outcomes(
    model: nn.Module, attacks: dict[str, Attack], images: Tensor, labels: Tensor, seed: int, index: int
) -> dict[str, Tensor]:
    """For "clean" and each attack, (N,) bool: was the image of batch number `index` classified correctly?"""
    _check_batch(model, images, labels)
    outcomes = {"clean": _predict(model, images, "clean") == labels}
    for name, attack in attacks.items():
        generator = derive_generator(seed, 0, index, 0, images.device, stream=f"evaluate {name}")
        adversarial = _attacked(attack, model, images, labels, generator)
        outcomes[name] = _predict(model, adversarial, name) == labels
    return outcomes


def _attacked(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    return attack(lambda x: F.cross_entropy(model(x), labels, reduction="none"), images, generator=generator)


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor, kind: str) -> Tensor:
    logits = model(images)
    if not torch.isfinite(logits).all():  # argmax would make a class of them, and perhaps the right one
        raise ValueError(
            f"the model returned NaN or infinite logits for {kind} images; check its weights and its gradients"
        )
    return logits.argmax(dim=1)


def _batches(data: Batches) -> Iterator[tuple[Tensor, Tensor]]:
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


@torch.no_grad()
def _check_batch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    check_images(images)
    channels = getattr(base_model(model), "in_chans", images.shape[1])
    if images.shape[1] != channels:
        raise ValueError(f"images have {images.shape[1]} channels but the model takes {channels}; convert the images")
    with record(model) as tape:
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ValueError(f"the model returned {what} for {len(images)} images; it must return logits (N, classes)")
    check_images(images, labels, logits.shape[1])
    if layer_groups(model):
        tape.check_fired()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 arithmetic without TF32 and without autocast: half precision would hide weak spots."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _conditions(model: nn.Module, name: str, data_name: str, device: torch.device) -> dict[str, object]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return {
        "model": name or type(model).__name__,
        "data": data_name,
        "precision": "float32",
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "versions": {"timm_fsr": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
