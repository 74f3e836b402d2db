"""Robust checkpoints by one command: what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shlex
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import timm_fsr
from timm_fsr.publishing import collect
from timm_fsr.recipe import Recipe
from timm_fsr.report import Report

FOLDER = Path(__file__).parent.parent / "recipes"
NAME = "resnet_tiny_cifar_fsr.at_toys"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(FOLDER))  # as `python recipes/checkpoints.py` does
    try:
        return runpy.run_path(str(FOLDER / "checkpoints.py"))
    finally:
        sys.path.remove(str(FOLDER))


def flags(output: Path) -> list[str]:
    return [
        f"--config={FOLDER / 'fashion_mnist_quickstart.yaml'}",
        "--methods=none",
        "--images=20",
        "--attacks=pgd20",
        "--suffix=toys",
        "--data.limit_train=120",
        "--data.held_out=20",
        "--attack.steps=1",
        "--optim.epochs=1",
        "--optim.batch_size=50",
        "--evaluation.validation_steps=1",
        "--evaluation.attacks=[fgsm]",
        f"--output={output}",
    ]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("checkpoints")
    more = ["--methods", "none", "fsr", "--seeds", "0", "1", "--release", "fsr", "--note=Toys.", "--pack=0.5"]
    assert script["main"]([*flags(output), *more]) == 0
    return output


class TestRelease:
    def test_the_folder_can_be_pushed_as_it_is(self, finished):
        folder = finished / "hub" / NAME
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "baseline.json",
            "config.json",
            "model.safetensors",
            "recipe.yaml",
            "release.json",
            "report.json",
        }
        files = collect(folder, f"timm-fsr/{NAME}")
        card = files["README.md"].decode()
        assert card == (folder / "README.md").read_text()
        assert "\nToys.\n" in card
        assert "Against the same training without the layer" in card
        assert "half precision" in card
        assert str(finished) not in "".join(content.decode(errors="ignore") for content in files.values())

    def test_it_is_the_model_that_the_held_out_images_prefer(self, finished):
        facts = json.loads((finished / "hub" / NAME / "release.json").read_text())

        def held_out(seed: int) -> tuple[float, float]:
            line = json.loads((finished / f"fsr_own_{seed}" / "training" / "metrics.jsonl").read_text())
            return line["held_out.robust_accuracy"], line["held_out.clean_accuracy"]

        assert held_out(facts["seed"]) == max(held_out(0), held_out(1))

    def test_its_report_is_of_the_weights_as_they_are_stored(self, finished):
        folder = finished / "hub" / NAME
        facts, report = json.loads((folder / "release.json").read_text()), Report.load(folder / "report.json")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        best = finished / f"fsr_own_{facts['seed']}" / "training" / "best"
        original = timm.create_model(f"local-dir:{best}", pretrained=True)
        assert torch.equal(model.conv1.weight, original.conv1.weight.half().float())
        test = timm_fsr.load_data("fashion_mnist", "test", limit=20)
        images, labels = next(test.batches(20))
        assert report.correct["clean"].tolist() == (model(images).argmax(dim=1) == labels).tolist()
        assert facts["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert facts["worst_case"]["float16"] == report.worst_case
        assert facts["bytes"] < 0.6 * (finished / "fsr_own_0/training/best/model.safetensors").stat().st_size

    def test_rounding_that_costs_robustness_is_given_up(self, script, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(script["release"].__globals__, "compared", lambda before, after: (0, 9, False))
        more = ["--methods", "none", "fsr", "--seeds", "0", "1", "--release", "fsr", "--suffix=other"]
        assert script["main"]([*flags(finished), *more]) == 0
        facts = json.loads((finished / "hub" / NAME.replace("toys", "other") / "release.json").read_text())
        assert facts["dtype"] == "float32"
        assert "+0 -9 images" in capsys.readouterr().out

    def test_images_per_second_are_noted(self, finished):
        rows = json.loads((finished / "throughput.json").read_text())
        assert set(rows) == {f"{layer}_own_{seed}" for layer in ("none", "fsr") for seed in (0, 1)}
        assert all(row["images_per_second"] > 0 for row in rows.values())


class TestArchive:
    def test_the_parts_are_the_whole(self, finished, tmp_path):
        parts = sorted((finished / "pack").glob("results.tar.*"))
        assert len(parts) > 1
        assert all(part.stat().st_size <= 2**19 for part in parts)
        sums = dict(reversed(line.split("  ")) for line in (finished / "pack" / "SHA256SUMS").read_text().splitlines())
        assert sums == {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
        whole = tmp_path / "results.tar"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        with tarfile.open(whole) as archive:
            names = set(archive.getnames())
        assert f"results/hub/{NAME}/model.safetensors" in names
        assert "results/comparison.md" in names
        assert "results/none_own_0/evaluation/report.json" in names
        assert not [name for name in names if re.search("/(checkpoints|pack|last)(/|$)", name)]


class TestAgain:
    def test_the_same_command_changes_nothing_that_took_time(self, script, finished):
        before = times(finished / "hub") | times(finished / "fsr_own_0" / "training")
        more = ["--methods", "none", "fsr", "--seeds", "0", "1", "--release", "fsr", "--note=Toys."]
        assert script["main"]([*flags(finished), *more]) == 0
        assert times(finished / "hub") | times(finished / "fsr_own_0" / "training") == before

    def test_when_the_time_is_up_what_there_is_is_packed(self, script, tmp_path, monkeypatch, capsys):
        def late(*_: Any) -> None:
            raise script["TimeIsUpError"]

        monkeypatch.setitem(script["main"].__globals__, "release", late)
        assert script["main"]([*flags(tmp_path), "--release=none", "--pack=5"]) == 75
        assert "the time is up" in capsys.readouterr().out
        assert (tmp_path / "pack" / "results.tar.00").exists()


class TestSpeed:
    def test_the_benchmarks_get_what_they_understand(self, script, tmp_path, monkeypatch):
        commands: list[list[str]] = []
        monkeypatch.setattr(script["subprocess"], "run", lambda command, check: commands.append(command))
        monkeypatch.setitem(script["main"].__globals__, "compare", lambda *_: {})
        code = tmp_path / "code"
        more = ["--speed", f"--official={code}", "--device=cpu", "--mixed_precision=bf16", "--compile=inductor"]
        assert script["main"]([*flags(tmp_path), *more]) == 0
        monkeypatch.syspath_prepend(str(FOLDER.parent / "benchmarks"))
        parsed = {}
        for _, path, *arguments in commands:
            monkeypatch.setattr(sys, "argv", [path, *arguments])
            parsed[Path(path).stem] = runpy.run_path(path)["parse_args"]()
        assert parsed["training_step"].official == code
        assert parsed["training_step"].steps == parsed["profile_step"].steps == 1
        assert parsed["profile_step"].precision == "bf16"
        assert {args.compile for args in parsed.values()} == {"inductor"}
        assert {args.batch for args in parsed.values()} == {50}


def test_the_documented_commands_are_accepted(script, tmp_path):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python recipes/checkpoints\.py (--.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = [word.replace("recipes/", f"{FOLDER}/") for word in shlex.split(command)]
        args, overrides = script["parse_args"](script["options"](), words)
        base = Recipe.load(args.config, overrides)
        script["check"](args, base)
        for entry in script["compare"].__globals__["entries"](args.methods, args.places, args.seeds):
            entry.recipe(base, tmp_path).check()


class TestErrors:
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--release=fsr"], "none of --methods"),
            (["--release=none", "--suffix="], "needs --suffix"),
            (["--release=none", "--evaluation.attacks=[]"], "evaluation.attacks"),
            (["--release=none", "--part=1/2"], "--part"),
            (["--places", "own", "same"], "--places"),
            (["--pack=0"], "leaves no room"),
            (["--official=code"], "add it"),
            (["--optim.epoch=3"], "epoch"),
        ],
    )
    def test_before_anything_is_trained(self, script, tmp_path, capsys, more, message):
        assert script["main"]([*flags(tmp_path / "new"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
