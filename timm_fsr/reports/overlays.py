"""Overlays: an image next to the masks of a model's feature layers, each laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from timm_fsr.reports.charts import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 2.6  # inches
_COLUMNS = 4  # at most
_STRENGTH = 0.6  # of the mask over the image
_COLOURS = "viridis"  # dark to bright, readable also in grey and with any colour vision


def draw_overlays(title: str, image: Tensor, masks: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG of an image and each site's mask over it, with the range of each mask next to it.

    Args:
        title: above the picture.
        image: (C, H, W) in [0, 1], grey or RGB.
        masks: by the name of the site, (h, w) of any size; high where a feature counts as robust.
        path: of the picture, in a folder that exists or is made; written whole or not at all.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # names may have a $
        save_png(_figure(title, image.detach().cpu(), {name: mask.cpu() for name, mask in masks.items()}), path)


def _figure(title: str, image: Tensor, masks: Mapping[str, Tensor]) -> Figure:
    count = 1 + len(masks)
    rows = -(-count // _COLUMNS)
    columns = -(-count // rows)
    height, width = image.shape[1:]
    panel = _PANEL * min(max(height / width, 0.5), 2.0)
    figure = new_figure(columns * (_PANEL + 0.55), rows * (panel + 0.35) + 0.75)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    grey = image.mean(dim=0).numpy()
    panels[0].imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
    panels[0].set_title("image")
    for axes, (name, mask) in zip(panels[1:], masks.items(), strict=False):
        low, high = float(mask.min()), float(mask.max())
        laid = F.interpolate(mask[None, None].float(), size=(height, width), mode="nearest-exact")[0, 0]
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        top = high if high - low > 1e-6 else low + 1e-6
        drawn = axes.imshow(laid.numpy(), cmap=_COLOURS, alpha=_STRENGTH, vmin=low, vmax=top, interpolation="nearest")
        axes.set_title(name)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, ticks=[low, (low + top) / 2, top])
        bar.ax.set_yticklabels([f"{value:.2f}" for value in (low, (low + high) / 2, high)])
        bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("masks are means over channels: bright is high (in FSR: robust), dark is low", fontsize=8)
    return figure
