"""timm-fsr predict: what it prints at 80 columns, what it writes, and its mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import tiny_resnet, with_fsr

from timm_fsr.cli.main import main
from timm_fsr.models.description import describe
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report

LONG = "a class whose name is much longer than the column that it has to fit into"


@pytest.fixture
def saved(tmp_path):
    model = with_fsr(tiny_resnet(num_classes=3))
    describe(model, classes=["cat", "dog", LONG], image_size=(3, 32, 32))
    report = Report(
        correct={"clean": torch.tensor([True])}, attacks={}, norm="l2", eps=0.001, seed=0, conditions={"data": "x[y]"}
    )
    return str(save_pretrained(model, tmp_path / "saved", report=report))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'a very long name of a photograph ' * index}{index}.png")
    return str(folder)


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["predict", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["predict", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("timm-fsr predict: error: ")
    return lines[0]


@pytest.fixture
def brief(monkeypatch):
    """Attacks of few steps: what is found does not matter here."""
    monkeypatch.setattr("timm_fsr.evaluation.flips.STEPS", 4)


def test_the_table_names_each_class_within_80_columns(saved, photos, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, saved, photos)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    assert words.count("cat") == words.count("dog") == 3
    assert words.count("longer") == 3
    assert text.count(" %") == 9


@pytest.mark.usefixtures("brief")
def test_robustness_in_the_models_own_norm(saved, photos, capsys, tmp_path):
    output = tmp_path / "answers.json"
    text = printed(capsys, saved, f"{photos}/0.png", "--robustness", "--topk=1", f"--output={output}")
    assert "flips at L2" in text
    assert "upper bounds, found by FMN-4 and DDN-4, tightened by APGD-4" in text
    assert "at the model's own L2 0.001 these attacks leave the answer to 1 of 1 image(s) as it is" in text
    (image,) = json.loads(output.read_text())["images"]
    assert image["flips_to"] != image["classes"][0]["class"]
    assert f"{image['smallest_eps_found']:.3f}" in text


@pytest.mark.usefixtures("brief")
def test_linf_is_told_in_255ths_and_a_model_without_report_says_so(photos, capsys):
    text = printed(
        capsys, "resnet_tiny_cifar", f"{photos}/0.png", "--robustness", "--topk=1", "--model-args", "pretrained=false"
    )
    assert "says nothing of its threat model; distances are in Linf" in text
    assert "/255" in text


def test_csv_and_masks(saved, photos, capsys, tmp_path):
    output, masks = tmp_path / "new" / "answers.csv", tmp_path / "masks"
    text = printed(capsys, saved, f"{photos}/*.png", "--topk=2", f"--output={output}", f"--mask={masks}")
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2", "mask"]
    assert len(rows) == 3
    for row in rows:
        with Image.open(row["mask"]) as drawn:
            assert drawn.size[0] > 300
    assert f"masks: 3 picture(s) in {masks}" in text


def test_one_broken_image_of_several_is_left_out_and_named(saved, photos, capsys, tmp_path):
    (tmp_path / "photos" / "0.png").write_text("text")
    assert "0.png is no image that Pillow can read" in printed(capsys, saved, photos)
    assert "is no image" in error_of(capsys, saved, f"{photos}/0.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SAVED", "nowhere.jpg"], "there is no image nowhere.jpg"),
        (["nowhere", "PHOTOS"], "unknown model 'nowhere'"),
        (["SAVED", "PHOTOS", "--topk=0"], "--topk=0 must be 1 or more"),
        (["SAVED", "PHOTOS", "--batch-size=0"], "--batch-size=0 must be 1 or more"),
        (["SAVED", "PHOTOS", "--size=0"], "--size=0 must be 1 or more"),
        (["SAVED", "PHOTOS", "--output=x.txt"], "must end in .csv or .json"),
        (["SAVED", "PHOTOS", "--norm=l2"], "add --robustness"),
        (["SAVED", "PHOTOS", "--precision=bf16", "--robustness"], "leave out --precision"),
        (["SAVED", "PHOTOS", "--precision=fp16", "--device=cpu"], "use bf16 or fp32 on a CPU"),
        (["SAVED", "PHOTOS", "--model-args", "drop_rate"], "takes KEY=VALUE such as fsr_hidden=16, not 'drop_rate'"),
        (["resnet18", "PHOTOS", "--model-args", "no_such=1"], "cannot be built with these arguments"),
        (["SAVED", "PHOTOS", "--mask=PHOTOS/0.png"], "--mask takes a folder"),
        (["resnet18", "PHOTOS", "--model-args", "pretrained=false", "--mask=m"], "has no feature layer"),
        (["resnet18", "PHOTOS", "--checkpoint=nowhere.pth"], "there is no file nowhere.pth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(saved, photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [argument.replace("SAVED", saved).replace("PHOTOS", photos) for argument in arguments]
    assert message in error_of(capsys, *given)
