"""`timm-fsr report`: what models are called that have the same name."""

from __future__ import annotations

from pathlib import Path

import torch

from timm_fsr.cli.main import main
from timm_fsr.reports.report import Report


def judged(folder: Path, model: str) -> str:
    flags = torch.arange(20) < 9
    report = Report(
        correct={"clean": flags, "fgsm": flags}, attacks={}, norm="linf", eps=0.1, seed=0, conditions={"model": model}
    )
    folder.mkdir(parents=True)
    report.save(folder / "report.json")
    return str(folder)


def test_models_of_the_same_name_are_called_by_their_folders(tmp_path, capsys):
    folders = [judged(tmp_path / name / "evaluation", "resnet") for name in ("one", "two")]
    other = judged(tmp_path / "three", "vit")
    page = tmp_path / "page.html"
    assert main(["report", folders[0], f"{folders[1]}/report.json", other, "--output", str(page)]) == 0
    titles = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert titles == ["resnet (one/evaluation)", "resnet (two/evaluation)", "vit"]
    assert "resnet (two/evaluation)" in page.read_text()


def test_names_that_are_given_win(tmp_path, capsys):
    folders = [judged(tmp_path / name, "resnet") for name in ("one", "two")]
    assert main(["report", *folders, "--names", "a", "b", "--output", str(tmp_path / "page.html")]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["a", "b"]


def test_the_same_folder_twice_is_one_name(tmp_path, capsys):
    folder = judged(tmp_path / "one", "resnet")
    assert main(["report", folder, folder, "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith("resnet: ")
