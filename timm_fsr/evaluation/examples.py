"""Pictures of clean and attacked images with a layer's mask."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack, attack_mode, judged_loss
from timm_fsr.attacks.losses import cross_entropy
from timm_fsr.hooks.tape import record
from timm_fsr.models.pixel import as_pixel_model

COUNT = 6

_TILE, _GAP, _LINE = 112, 10, 15
_STRENGTH = 0.62  # of a mask over its image
_INK, _PAPER, _WRONG = (30, 30, 30), (255, 255, 255), (190, 30, 30)
# Dark blue to yellow through green, readable also in grey and with any colour vision (after matplotlib's viridis).
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


@torch.no_grad()
def draw_examples(
    model: nn.Module, images: Tensor, labels: Tensor, classes: Sequence[str], attack: Attack, *, seed: int = 0
) -> dict[str, Any]:
    """Some images that the attack changes the class of, and some that withstand it, in the order of the data.

    Args:
        model: a timm model or a pixel-space model.
        images: (N, C, H, W) in [0, 1], at least one.
        labels: (N,) true classes.
        classes: their names.
        attack: what perturbs the images, by cross-entropy.
        seed: of its random start.

    Returns:
        Plain JSON values with pictures as data URIs; docs/report.md describes them.
    """
    pixel_model = as_pixel_model(model)
    with attack_mode(pixel_model):
        generator = torch.Generator(images.device).manual_seed(seed)
        attacked = attack(
            lambda x: nn.functional.cross_entropy(pixel_model(x), labels, reduction="none"), images, generator=generator
        )
        before, clean_masks = _classes_and_masks(pixel_model, images)
        after, attacked_masks = _classes_and_masks(pixel_model, attacked)
    chosen = _choose(before == labels, after == labels)
    ranges = _ranges([*clean_masks.values(), *attacked_masks.values()])
    shift = max([float((attacked_masks[k] - clean_masks[k]).abs().max()) for k in clean_masks] or [0.0]) or 1.0
    largest = max(float((attacked - images).abs().max()), 1e-6)
    shown = []
    for index in chosen:
        shown.append(
            {
                "truth": classes[int(labels[index])],
                "clean_class": classes[int(before[index])],
                "attacked_class": classes[int(after[index])],
                "clean": embed_png(photo(images[index], None)),
                "perturbation": embed_png(photo((attacked[index] - images[index]) / (2 * largest) + 0.5, None)),
                "attacked": embed_png(photo(attacked[index], None)),
                "masks": [
                    _mask_pictures(site, clean_masks[site][index], attacked_masks[site][index], ranges, shift)
                    for site in clean_masks
                ],
            }
        )
    return {
        "attack": repr(attack),
        "eps": attack.eps,
        "magnification": 0.5 / largest,
        "mask_range": list(ranges),
        "difference_range": shift,
        "images": shown,
    }


def _classes_and_masks(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Predicted classes (N,), and each site's mask as (N, h, w), a mean over channels."""
    with record(model) as tape:
        predicted = model(images).argmax(dim=1)
    return predicted, {name: tape[name].mask.mean(dim=1) for name in tape if hasattr(tape[name], "mask")}


def _choose(right: Tensor, withstood: Tensor) -> list[int]:
    """Indices of images: half of them lost to the attack, half not, as far as there are such."""
    lost = (right & ~withstood).nonzero().flatten().tolist()
    kept = (right & withstood).nonzero().flatten().tolist()
    others = (~right).nonzero().flatten().tolist()
    half = COUNT // 2
    chosen = lost[: max(half, COUNT - len(kept))] + kept[: max(half, COUNT - len(lost))]
    return sorted((chosen + others)[:COUNT])


def _ranges(masks: Sequence[Tensor]) -> tuple[float, float]:
    if not masks:
        return 0.0, 1.0
    low, high = min(float(mask.min()) for mask in masks), max(float(mask.max()) for mask in masks)
    return (low, high) if high - low > 1e-3 else (0.0, 1.0)


def _mask_pictures(
    site: str, clean: Tensor, attacked: Tensor, ranges: tuple[float, float], shift: float
) -> dict[str, str]:
    low, high = ranges
    scaled = {"clean": (clean - low) / (high - low), "attacked": (attacked - low) / (high - low)}
    scaled["difference"] = (attacked - clean) / (2 * shift) + 0.5
    return {"site": site, **{name: embed_png(heat(values, None)) for name, values in scaled.items()}}


def attack_picture(
    model: nn.Module, images: Tensor, labels: Tensor, classes: Sequence[str], attack: Attack, *, seed: int = 0
) -> Image.Image:
    """One row per image: clean, perturbation, attacked, and the mask of the last site on both.

    Args:
        model: a timm model with a feature layer that has a `mask`, such as FSR.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) true classes.
        classes: their names.
        attack: what perturbs the images.
        seed: of the attack's random start.

    Returns:
        The picture. Masks are means over channels, from dark (non-robust) to bright (robust), over the image in grey.

    Raises:
        KeyError: no site of the model has a mask.
    """
    pixel_model = as_pixel_model(model).eval()
    generator = torch.Generator(images.device).manual_seed(seed)
    with attack_mode(pixel_model):
        loss_fn = judged_loss(pixel_model, cross_entropy, labels)
        adversarial = attack(loss_fn, images, generator=generator)
    clean_mask, clean_classes = _mask_and_classes(pixel_model, images)
    attacked_mask, attacked_classes = _mask_and_classes(pixel_model, adversarial)
    noise = (adversarial - images) / (2 * attack.eps) + 0.5
    low, high = _bounds(torch.cat([clean_mask, attacked_mask]))
    shift = attacked_mask - clean_mask
    largest = max(float(shift.abs().max()), 1e-3)
    titles = ("clean", "perturbation", "attacked", "mask, clean", "mask, attacked", "mask, difference")
    rows = []
    for row in range(len(images)):
        masks = [(m[row] - low) / (high - low) for m in (clean_mask, attacked_mask)]
        tiles = [photo(images[row]), photo(noise[row]), photo(adversarial[row])]
        tiles += [laid_over(images[row], masks[0]), laid_over(adversarial[row], masks[1])]
        tiles.append(laid_over(adversarial[row], shift[row] / (2 * largest) + 0.5))
        truth, before, after = (int(t[row]) for t in (labels, clean_classes, attacked_classes))
        seen = [(f"seen as {classes[index]}", index == truth) for index in (before, after)]
        captions = [seen[0], ("", True), seen[1]]
        rows.append((tiles, captions))
    norm = getattr(attack, "norm", "linf")
    footer = (
        f"{type(attack).__name__}, {norm}, eps {attack.eps:.4g}; perturbation from -eps (black) to +eps (white);"
        f"\nmasks, means over channels, over the image in grey, from {low:.2f} (dark) to {high:.2f} (bright); "
        f"difference from {-largest:.2f} (dark) to {largest:+.2f} (bright)"
    )
    return _compose(titles, rows, footer)


def embed_png(picture: Image.Image) -> str:
    """A picture as a data URI, for a page that needs no other file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@torch.no_grad()
def _mask_and_classes(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last site's mask as (N, h, w), a mean over channels, and the predicted classes (N,)."""
    with record(model) as tape:
        predicted = model(images).argmax(dim=1)
    masks = [vars(tape[name])["mask"] for name in tape if "mask" in vars(tape[name])]
    if not masks:
        raise KeyError("no site of the model has a mask; attach a layer such as 'fsr'")
    return masks[-1].mean(dim=1), predicted


def _bounds(masks: Tensor) -> tuple[float, float]:
    low, high = float(masks.min()), float(masks.max())
    return (low, high) if high - low > 1e-3 else (0.0, 1.0)


def photo(image: Tensor, size: int | None = _TILE) -> Image.Image:
    """A (C, H, W) tensor in [0, 1], grey or RGB, as a square tile of `size` pixels, or in its own size."""
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().expand(3, -1, -1).permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    return picture if size is None else picture.resize((size, size), Image.Resampling.NEAREST)


def heat(values: Tensor, size: int | None = _TILE) -> Image.Image:
    """A (h, w) tensor in [0, 1] as a coloured square tile of `size` pixels, or in its own size."""
    values = values.float().cpu()
    if size is not None:
        values = F.interpolate(values[None, None], size=(size, size), mode="nearest")[0, 0]
    position = values.clamp(0, 1).numpy() * (len(_RAMP) - 1)
    below = np.floor(position).astype(int).clip(0, len(_RAMP) - 2)
    share = (position - below)[..., None]
    colours = _RAMP[below] * (1 - share) + _RAMP[below + 1] * share
    return Image.fromarray(colours.round().astype(np.uint8))


def laid_over(image: Tensor, mask: Tensor) -> Image.Image:
    """A (h, w) mask in [0, 1] in colours over a (C, H, W) image in grey, as a tile."""
    grey = photo(image.mean(dim=0, keepdim=True))
    return Image.blend(grey, heat(mask), _STRENGTH)


def _compose(
    titles: Sequence[str], rows: Sequence[tuple[list[Image.Image], list[tuple[str, bool]]]], footer: str
) -> Image.Image:
    """Lay the tiles out under their titles, with captions below each row."""
    font = ImageFont.load_default(size=12)
    step_x, step_y = _TILE + _GAP, _TILE + _LINE + _GAP
    canvas = Image.new("RGB", (_GAP + len(titles) * step_x, 2 * _GAP + 4 * _LINE + len(rows) * step_y), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * step_x, _GAP), title, fill=_INK, font=font)
    for row, (tiles, captions) in enumerate(rows):
        top = _GAP + 2 * _LINE + row * step_y
        for column, tile in enumerate(tiles):
            canvas.paste(tile, (_GAP + column * step_x, top))
        for column, (caption, right) in enumerate(captions):
            draw.text((_GAP + column * step_x, top + _TILE), caption, fill=_INK if right else _WRONG, font=font)
    draw.text((_GAP, canvas.height - 2 * _LINE - _GAP), footer, fill=_INK, font=ImageFont.load_default(size=11))
    return canvas
