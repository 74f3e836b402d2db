"""The adapters of docs/attack_libraries.md: each is run as it stands there, on grey images and on colour."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import images, tiny_resnet, with_fsr
from torch import nn

import timm_fsr

PAGE = Path(__file__).parents[2] / "docs" / "attack_libraries.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ADAPTERS = [block for block in BLOCKS if "def attack(" in block]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def package(block: str) -> str:
    return re.search(r"(?:import|from) (foolbox|art|torchattacks|secmlt)\b", block)[1]


def model_of(channels: int) -> nn.Module:
    model = with_fsr(tiny_resnet(in_chans=channels)).eval()
    model.pretrained_cfg |= {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return model


def test_the_page_has_all_of_them():
    assert sorted(map(package, ADAPTERS)) == ["art", "foolbox", "secmlt", "torchattacks", "torchattacks"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block", ADAPTERS, ids=[f"{number}-{package(block)}" for number, block in enumerate(ADAPTERS)])
def test_an_adapter(block: str, channels: int):
    if importlib.util.find_spec(package(block)) is None:
        pytest.skip(f"{package(block)} is not installed")
    if "expand(-1, 3" in block and channels == 3:
        pytest.skip("this one is for grey images")
    names: dict[str, Any] = {"eps": 8 / 255}
    exec(block, names)
    model, given = model_of(channels), images(8)[:, :channels]
    with torch.no_grad():
        right = timm_fsr.PixelModel(model).eval()(given).argmax(dim=1)
    suite = timm_fsr.Suite.from_callable("theirs", names["attack"])
    report, again = (timm_fsr.evaluate(model, (given, right), eps=8 / 255, attacks=[suite]) for _ in range(2))
    assert report.accuracy["clean"] == 1
    assert report.accuracy["theirs"] < 1, "an untrained network does not withstand"
    assert torch.equal(report.correct["theirs"], again.correct["theirs"])
