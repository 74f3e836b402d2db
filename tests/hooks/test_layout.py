from __future__ import annotations

from typing import Any

import pytest
import torch

from timm_fsr.hooks.layout import Layout, measure

NCHW = Layout("NCHW", 8, (3, 5), (48, 80))
NHWC = Layout("NHWC", 8, (3, 5), (48, 80))
NLC = Layout("NLC", 8, (3, 5), (48, 80))
PREFIXED = Layout("NLC", 8, (3, 5), (48, 80), prefix_tokens=2)
SHAPES = {NCHW: (2, 8, 3, 5), NHWC: (2, 3, 5, 8), NLC: (2, 15, 8), PREFIXED: (2, 17, 8)}


@pytest.mark.parametrize("layout", SHAPES, ids=["NCHW", "NHWC", "NLC", "NLC with prefix"])
def test_there_and_back(layout: Layout) -> None:
    feature = torch.randn(SHAPES[layout])
    spatial = layout.to_nchw(feature)
    assert spatial.shape == (2, 8, 3, 5)
    assert torch.equal(layout.from_nchw(spatial, feature), feature)


def test_every_value_lands_where_it_belongs() -> None:
    spatial = torch.arange(15.0).view(1, 1, 3, 5).expand(1, 8, 3, 5)
    rows_first = torch.arange(15.0).view(1, 15, 1).expand(1, 15, 8)
    assert torch.equal(NLC.to_nchw(rows_first), spatial)
    assert torch.equal(NHWC.to_nchw(spatial.permute(0, 2, 3, 1)), spatial)


def test_prefix_tokens_pass_by() -> None:
    feature = torch.randn(2, 17, 8)
    changed = PREFIXED.from_nchw(torch.zeros(2, 8, 3, 5), feature)
    assert torch.equal(changed[:, :2], feature[:, :2])
    assert not changed[:, 2:].any()


@pytest.mark.parametrize(
    ("tokens", "image_size", "grid"),
    [
        (15, None, (3, 5)),
        (15, (48, 80), (3, 5)),
        (15, (80, 48), (5, 3)),  # as many tokens, another aspect ratio
        (60, (96, 160), (6, 10)),
        (2, (16, 32), (1, 2)),
        (15, (55, 95), (3, 5)),  # a convolution drops what does not fill a patch
        (24, (55, 95), (4, 6)),  # dynamic_img_pad fills it up
        (36, None, (6, 6)),
    ],
)
def test_the_grid_follows_the_image(tokens: int, image_size: Any, grid: tuple[int, int]) -> None:
    assert NLC.grid_of(tokens, image_size) == grid


@pytest.mark.parametrize(("tokens", "image_size"), [(14, None), (14, (48, 80)), (14, (80, 48)), (16, (48, 80))])
def test_a_grid_that_does_not_fit_is_refused(tokens: int, image_size: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot arrange {tokens} spatial tokens .* gives a \\(3, 5\\) grid"):
        NLC.grid_of(tokens, image_size)


@pytest.mark.parametrize(
    ("shape", "image_size", "hints", "expected"),
    [
        ((2, 64, 7, 7), (224, 224), {}, ("NCHW", 64, (7, 7), 0)),
        ((2, 7, 7, 64), (224, 224), {}, ("NHWC", 64, (7, 7), 0)),
        ((2, 16, 16, 16), (64, 64), {}, ("NCHW", 16, (16, 16), 0)),
        ((2, 16, 16, 16), (64, 64), {"prefer": "NHWC"}, ("NHWC", 16, (16, 16), 0)),
        ((2, 64, 4, 6), (64, 96), {}, ("NCHW", 64, (4, 6), 0)),
        ((2, 4, 6, 64), (64, 96), {"channels": 64}, ("NHWC", 64, (4, 6), 0)),
        ((2, 8, 4, 8), (32, 32), {"channels": 8}, ("NCHW", 8, (4, 8), 0)),  # the channels decide
        ((2, 16, 32), (64, 64), {}, ("NLC", 32, (4, 4), 0)),
        ((2, 17, 32), (64, 64), {}, ("NLC", 32, (4, 4), 1)),
        ((2, 21, 32), (64, 64), {"channels": 32}, ("NLC", 32, (4, 4), 5)),
        ((2, 25, 32), (64, 96), {"reduction": 16}, ("NLC", 32, (4, 6), 1)),
        ((2, 20, 32), (64, 64), {"reduction": 16}, ("NLC", 32, (4, 4), 4)),
        ((2, 24, 32), (96, 64), {}, ("NLC", 32, (6, 4), 0)),
    ],
)
def test_layouts_are_recognised(
    shape: tuple[int, ...], image_size: tuple[int, int], hints: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    layout = measure(torch.Size(shape), image_size, **hints)
    assert layout is not None
    assert (layout.kind, layout.channels, layout.grid, layout.prefix_tokens) == expected
    assert layout.image_size == image_size


@pytest.mark.parametrize("shape", [(2, 10), (2,), (2, 3, 4, 5, 6), (2, 64, 3, 17), (2, 2000, 10)])
def test_other_shapes_are_not_spatial(shape: tuple[int, ...]) -> None:
    assert measure(torch.Size(shape), (64, 64), reduction=16) is None
