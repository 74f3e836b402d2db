"""Examples: clean and attacked images with the masks of their feature layers, as small pictures for a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_fsr.attacks import Attack, attack_mode
from timm_fsr.pictures import embed_png, heat, photo
from timm_fsr.pixels import as_pixel_model
from timm_fsr.tape import record

COUNT = 6


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
