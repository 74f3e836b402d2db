"""The picture of a training run: which curves it has, and that a run does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image
from support.runs import metrics, tiny

from timm_fsr.training.curves import _figure, plot_training
from timm_fsr.training.trainer import train

SHORT = ["--data.limit_train=52", "--model.layer=null", "--evaluation.validation_steps=1", "--optim.epochs=1"]
NAMES = {
    "training images, attacked": "train.robust_accuracy",
    "held-out images, attacked": "held_out.robust_accuracy",
    "held-out images, one step": "held_out.one_step_accuracy",
    "training images, clean": "train.clean_accuracy",
    "held-out images, clean": "held_out.clean_accuracy",
}
SIZE = (960, 1020)
BROWN, BLUE = (0xB3, 0x54, 0x1E), (0x1F, 0x5F, 0x8B)

Curves = dict[str, tuple[list[float], list[float]]]


def line(epoch: int, **accuracies: float) -> dict[str, float]:
    """A line of `metrics.jsonl`; the names have "__" for a dot."""
    named = {f"{name.replace('__', '.')}_accuracy": value for name, value in accuracies.items()}
    return {"epoch": epoch, "loss.adversarial": 2.0, "lr": 0.1, **named}


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Curves:
    """What is drawn: by each label, its points."""
    drawn: Curves = {}
    plot, mark, level = Axes.plot, Axes.axvline, Axes.axhline

    def spy(self: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    def spy_mark(self: Any, x: float, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = ([x], [])
        return mark(self, x, **kwargs)

    def spy_level(self: Any, y: float, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = ([], [y])
        return level(self, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(Axes, "axhline", spy_level)
    monkeypatch.setattr(Axes, "axvline", spy_mark)
    return drawn


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    """How many pixels of a picture have each colour."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == SIZE
        return {colour: count for count, colour in picture.convert("RGB").getcolors(maxcolors=SIZE[0] * SIZE[1])}


def draw(lines: list[dict[str, float]], folder: Path, best_epoch: int = 1) -> dict[tuple[int, int, int], int]:
    plot_training(lines, folder / "training.png", title="net, at", best_epoch=best_epoch)
    assert [path.name for path in folder.iterdir()] == ["training.png"], "scratch files stayed"
    return colours(folder / "training.png")


class TestCurves:
    def test_each_accuracy_is_a_curve_over_epochs_in_percent(self, tmp_path, curves):
        lines = [
            line(1, train__clean=0.5, train__robust=0.25, held_out__clean=0.75, held_out__robust=0.125),
            line(2, train__clean=0.6, train__robust=0.35, held_out__clean=0.85, held_out__robust=0.225),
        ]
        found = draw(lines, tmp_path, best_epoch=2)
        assert found[BROWN] > 100
        assert found[BLUE] > 100
        assert curves.pop("kept: epoch 2") == ([2], [])
        accuracies = {label: curves.pop(label) for label in NAMES if label in curves}
        assert accuracies.keys() == NAMES.keys() - {"held-out images, one step"}
        for label, (epochs, values) in accuracies.items():
            assert epochs == [1, 2]
            assert values == [100 * one[NAMES[label]] for one in lines]
        assert curves == {"adversarial loss": ([1, 2], [2.0, 2.0]), "learning rate": ([1, 2], [0.1, 0.1])}

    def test_losses_add_up_to_their_total(self, tmp_path, curves):
        lines = [{**line(epoch), "loss.fsr.separation": 0.5 * epoch} for epoch in (1, 2)]
        draw(lines, tmp_path)
        assert curves["adversarial loss"] == ([1, 2], [2.0, 2.0])
        assert curves["fsr.separation loss"] == ([1, 2], [0.5, 1.0])
        assert curves["total loss"] == ([1, 2], [2.5, 3.0])

    def test_each_has_a_panel_over_the_same_epochs(self, tmp_path):
        lines = [{**line(epoch, train__robust=0.3), "lr": 0.1 / epoch} for epoch in (1, 2, 3)]
        panels = _figure(lines, "net", 2, 0.1).axes
        assert [axes.get_ylabel() for axes in panels] == ["accuracy", "loss on training images", "learning rate"]
        assert len({axes.get_xlim() for axes in panels}) == 1
        assert panels[0].get_ylim() == (0, 100)
        assert all(axes.get_ylim()[0] == 0 for axes in panels)

    def test_an_epoch_without_validation_has_no_point(self, tmp_path, curves):
        lines = [line(1, train__robust=0.1), line(2, train__robust=0.2, held_out__robust=0.5, held_out__one_step=1.0)]
        draw(lines, tmp_path)
        assert curves["training images, attacked"] == ([1, 2], [10.0, 20.0])
        assert curves["held-out images, attacked"] == ([2], [50.0])
        assert curves["held-out images, one step"] == ([2], [100.0])
        assert "training images, clean" not in curves

    @pytest.mark.parametrize("lines", [[], [line(1)]], ids=["no epochs", "no accuracies"])
    def test_without_any_accuracy_it_still_works(self, tmp_path, curves, lines):
        found = draw(lines, tmp_path)
        assert curves.keys() == {"kept: epoch 1", *(["adversarial loss", "learning rate"] if lines else [])}
        assert BLUE not in found

    def test_it_takes_the_place_of_an_older_one(self, tmp_path):
        (tmp_path / "training.png").write_bytes(b"an older one")
        assert draw([line(1, train__robust=0.1), line(2, train__robust=0.9)], tmp_path)[BROWN] > 100


class TestRun:
    def test_the_picture_is_of_its_own_metrics(self, tmp_path, curves):
        train(tiny(tmp_path, *SHORT, "--evaluation.attacks=[]"))
        assert colours(tmp_path / "training.png")[BLUE] > 0
        (only,) = metrics(tmp_path)
        assert curves.pop("kept: epoch 1") == ([1], [])
        assert curves.pop("chance") == ([], [10.0])
        assert curves.pop("learning rate") == ([1], [only["lr"]])
        assert curves.pop("adversarial loss") == ([1], [only["loss.adversarial"]])
        assert curves == {label: ([1], [100 * only[name]]) for label, name in NAMES.items() if name in only}
