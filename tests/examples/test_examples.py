"""The examples run, each at a small size, and print what they promise."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.variants import only

from timm_fsr.attacks.base import ATTACKS
from timm_fsr.layers.base import LAYERS
from timm_fsr.training.objectives.base import OBJECTIVES

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _own_names() -> Iterator[None]:
    """What an example registers is unknown again afterwards, in timm too."""
    with only("resnet_tiny_cifar"):
        yield
    LAYERS.remove("gate")
    OBJECTIVES.remove("confident_at")
    ATTACKS.remove("best_noise")


def run(script: str, **sizes: Any) -> None:
    runpy.run_path(str(EXAMPLES / script))["main"](**sizes)


def test_there_are_no_others() -> None:
    tested = {"attach.py", "train_loop.py", "evaluate.py", "predict_with_masks.py", "own_parts.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
    assert all(f"]({name})" in (EXAMPLES / "README.md").read_text() for name in tested)


@pytest.mark.parametrize("name", ["resnet_tiny_cifar", "vit_tiny_patch4_32"])
def test_attach(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("attach.py", name=name)
    printed = capsys.readouterr().out
    assert "mask of shape (2, " in printed
    assert "fsr.separation" in printed
    assert "reloaded, the same logits: True" in printed
    assert "weights of FSR left: 0" in printed


def test_train_loop(capsys: pytest.CaptureFixture[str]) -> None:
    run("train_loop.py", images=80, epochs=1, batch_size=40)
    printed = capsys.readouterr().out
    assert "epoch 1: adversarial " in printed
    assert "fsr.recalibration" in printed
    assert "20 images" in printed


def test_the_training_loop_is_short() -> None:
    lines = (EXAMPLES / "train_loop.py").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def main"))
    end = next(index for index, line in enumerate(lines) if line.startswith("if __name__"))
    assert len([line for line in lines[start:end] if line.strip()]) <= 30


def test_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    run("evaluate.py", images=20, attacks=("fgsm",))
    printed = capsys.readouterr().out
    assert "worst_case: " in printed
    assert "the weakest class is " in printed
    assert "upper bound: FGSM only" in printed
    assert Path("example_report/report.html").is_file()


def test_predict_with_masks(capsys: pytest.CaptureFixture[str]) -> None:
    run("predict_with_masks.py", images=2, robustness=False)
    printed = capsys.readouterr().out
    assert printed.count("mask over the image: ") == 2
    drawings = list(Path("example_masks/masks").iterdir())
    assert len(drawings) == 2
    for drawing in drawings:
        with Image.open(drawing) as picture:
            assert picture.format == "PNG"


@pytest.mark.usefixtures("_own_names")
def test_own_parts(capsys: pytest.CaptureFixture[str]) -> None:
    run("own_parts.py", images=100, epochs=1)
    printed = capsys.readouterr().out
    assert "gate.size" in printed
    assert "entropy" in printed
    assert "best_noise" in printed
    assert Path("example_run/best/model.safetensors").is_file()
