"""Robust checkpoints by one command: what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import BRIEF_TRAINING

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.hub.publish import collect
from timm_fsr.reports.report import Report
from timm_fsr.training.studies import release as releasing
from timm_fsr.training.studies import speed
from timm_fsr.training.studies.compare import Comparison

ROOT = Path(__file__).parents[3]
NAME = "resnet_tiny_cifar_fsr.at_toys"


def release(arguments: list[str]) -> int:
    return main(["release", *arguments])


MORE = ["--methods", "none", "fsr", "--seeds", "0", "1", "--release", "fsr", "--note=Toys."]


def flags(output: Path) -> list[str]:
    return [
        f"--config={ROOT / 'recipes' / 'fashion_mnist_quickstart.yaml'}",
        "--methods=none",
        "--images=20",
        "--attacks=pgd20",
        "--suffix=toys",
        *BRIEF_TRAINING,
        "--evaluation.attacks=[fgsm]",
        f"--output={output}",
    ]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("checkpoints")
    assert release([*flags(output), *MORE, "--pack=0.5"]) == 0
    return output


class TestRelease:
    def test_the_folder_can_be_pushed_as_it_is(self, finished):
        folder = finished / "hub" / NAME
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "baseline.json",
            "config.json",
            "modeling_timm_fsr.py",
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
        facts = json.loads((finished / "hub" / NAME / "release.json").read_text())["asked"]
        card = (finished / "hub" / NAME / "README.md").read_text()
        assert f"Of the trainings with the seeds 0, 1, this is the one (seed {facts['seed']})" in card

        def held_out(seed: int) -> tuple[float, float]:
            line = json.loads((finished / f"fsr_own_{seed}" / "training" / "metrics.jsonl").read_text())
            return line["held_out.robust_accuracy"], line["held_out.clean_accuracy"]

        assert held_out(facts["seed"]) == max(held_out(0), held_out(1))

    def test_its_report_is_of_the_weights_as_they_are_stored(self, finished):
        folder = finished / "hub" / NAME
        facts, report = json.loads((folder / "release.json").read_text()), Report.load(folder / "report.json")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        best = finished / f"fsr_own_{facts['asked']['seed']}" / "training" / "best"
        original = timm.create_model(f"local-dir:{best}", pretrained=True)
        assert torch.equal(model.conv1.weight, original.conv1.weight.half().float())
        test = timm_fsr.load_data("fashion_mnist", "test", limit=20)
        images, labels = next(test.batches(20))
        assert report.correct["clean"].tolist() == (model(images).argmax(dim=1) == labels).tolist()
        assert facts["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert facts["worst_case"]["float16"] == report.worst_case
        assert facts["bytes"] < 0.6 * (finished / "fsr_own_0/training/best/model.safetensors").stat().st_size

    def test_rounding_that_costs_robustness_is_given_up(self, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(releasing, "compared", lambda before, after: (0, 9, False))
        assert release([*flags(finished), *MORE, "--suffix=other"]) == 0
        folder = finished / "hub" / NAME.replace("toys", "other")
        assert json.loads((folder / "release.json").read_text())["rounded"] is False
        assert "+0 -9 images" in capsys.readouterr().out
        assert "dtype" not in json.loads((folder / "config.json").read_text())["timm_fsr"]
        collect(folder, f"timm-fsr/{folder.name}")

    def test_and_so_are_weights_that_no_half_can_hold(self, finished, monkeypatch, capsys):
        def beyond(*_: Any) -> None:
            raise ValueError("fc.weight has numbers that torch.float16 cannot hold")

        monkeypatch.setattr(releasing, "round_weights", beyond)
        assert release([*flags(finished), *MORE, "--suffix=large"]) == 0
        assert "stays in float32: fc.weight" in capsys.readouterr().out
        collect(finished / "hub" / NAME.replace("toys", "large"), f"timm-fsr/{NAME.replace('toys', 'large')}")

    def test_images_per_second_are_noted(self, finished):
        rows = json.loads((finished / "throughput.json").read_text())
        assert set(rows) == {f"{layer}_own_{seed}" for layer in ("none", "fsr") for seed in (0, 1)}
        assert all(speed > 0 for speed in rows.values())


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
    def test_the_same_command_changes_nothing_that_took_time(self, finished):
        before = times(finished / "hub" / NAME) | times(finished / "fsr_own_0" / "training")
        assert release([*flags(finished), *MORE]) == 0
        assert times(finished / "hub" / NAME) | times(finished / "fsr_own_0" / "training") == before

    @pytest.mark.parametrize(
        ("more", "found"),
        [
            (["--note=Other."], b"\nOther.\n"),
            (["--namespace=lab"], b"hf-hub:lab/"),
            (["--dtype=bfloat16"], b"(bfloat16)"),
            (["--corruptions=10"], b"Common corruptions (15 kinds"),
        ],
    )
    def test_other_options_make_the_folder_anew(self, finished, more, found):
        if more[0].startswith("--corruptions"):
            pytest.importorskip("imagecorruptions", exc_type=ImportError)
        suffix = "--suffix=again"
        assert release([*flags(finished), *MORE, suffix]) == 0
        assert release([*flags(finished), *MORE, suffix, *more]) == 0
        assert found in (finished / "hub" / NAME.replace("toys", "again") / "README.md").read_bytes()

    @pytest.mark.parametrize("at", ["save_pretrained", "render_card", "write_text"])
    def test_a_folder_that_was_killed_half_made_is_made(self, finished, monkeypatch, at):
        suffix, folder = f"--suffix={at}", finished / "hub" / NAME.replace("toys", at)

        def late(*_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGALRM)

        write = releasing.write_text

        def late_for_card(path: Path, text: str) -> None:
            if path.name == "README.md":
                late()
            write(path, text)

        with monkeypatch.context() as patch:
            if at == "write_text":
                patch.setattr(
                    releasing, at, lambda path, text: late() if path.name == "README.md" else write(path, text)
                )
            else:
                patch.setattr(releasing, at, late)
            assert release([*flags(finished), *MORE, suffix]) == 75
        assert not (folder / "README.md").exists()
        assert release([*flags(finished), *MORE, suffix]) == 0
        collect(folder, f"timm-fsr/{folder.name}")

    def test_when_the_time_is_up_what_there_is_is_packed(self, finished, monkeypatch, capsys):
        def late(*_: Any) -> None:
            signal.raise_signal(signal.SIGALRM)

        (finished / "pack" / ".writing-x").mkdir(parents=True)  # what a kill may have left
        monkeypatch.setattr(releasing, "release", late)
        assert release([*flags(finished), *MORE, "--pack=5"]) == 75
        assert "the time is up" in capsys.readouterr().err
        assert (finished / "pack" / "results.tar.0000").exists()


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an installed package finds the benchmarks."""
    monkeypatch.chdir(ROOT)


class TestSpeed:
    FLAGS = ("--speed", "--device=cpu", "--mixed_precision=bf16", "--compile=inductor")

    @pytest.fixture
    def commands(self, monkeypatch) -> list[list[str]]:
        """What is run, without running it."""
        found: list[list[str]] = []

        def run(command: list[str], *, check: bool, timeout: float | None) -> None:
            found.append(command)
            Path(command[-1]).write_text('{"peak_flops": 1.0}')

        monkeypatch.setattr(speed.subprocess, "run", run)
        monkeypatch.setattr(Comparison, "run", lambda _: {})
        monkeypatch.setattr(releasing, "in_common", lambda found: (found, []))
        return found

    def test_the_benchmarks_get_what_they_understand(self, tmp_path, monkeypatch, commands):
        code = tmp_path / "code"
        assert release([*flags(tmp_path), *self.FLAGS, f"--official={code}"]) == 0
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        parsed = {}
        for _, path, *arguments in commands:
            monkeypatch.setattr(sys, "argv", [path, *arguments])
            parsed[Path(path).stem] = runpy.run_path(path)["parse_args"]()
        assert parsed["training_step"].official == code
        assert parsed["training_step"].steps == parsed["profile_step"].steps == 1
        assert parsed["profile_step"].precision == "bf16"
        assert {args.compile for args in parsed.values()} == {"inductor"}
        assert {args.batch for args in parsed.values()} == {50}

    def test_once_for_the_same_question(self, tmp_path, commands):
        for more in ([], [], ["--optim.batch_size=20"]):
            assert release([*flags(tmp_path), *self.FLAGS, *more]) == 0
        assert [Path(command[1]).stem for command in commands] == ["training_step", "profile_step"] * 2

    def test_what_takes_too_long_is_left_out(self, tmp_path, monkeypatch, capsys, commands):
        def run(command: list[str], *, check: bool, timeout: float | None) -> None:
            assert timeout == 60 * 9 / 6
            raise subprocess.TimeoutExpired(command, timeout)

        monkeypatch.setattr(speed.subprocess, "run", run)
        assert release([*flags(tmp_path), *self.FLAGS, "--minutes=9"]) == 0
        assert capsys.readouterr().out.count("not measured") == 2
        assert not (tmp_path / "peak.json").exists()


@pytest.mark.parametrize(
    ("command", "document"),
    [
        ("release", "recipes/README.md"),
        ("release", "hub_cards/README.md"),
        ("compare", "docs/layers.md"),
        ("compare", "docs/comparison/cifar10.md"),
        ("compare", "docs/comparison/fashion_mnist_full.md"),
    ],
)
def test_the_documented_commands_are_accepted(command, document, monkeypatch):
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = re.findall(rf"^timm-fsr {command} (--.*)$", text, re.MULTILINE)
    assert commands
    checked = []
    monkeypatch.setattr(Comparison, "run", lambda self: checked.append(self.check()))
    monkeypatch.setattr(releasing.Release, "run", lambda self: checked.append(self.check()))
    monkeypatch.setattr(releasing, "pack", lambda *_: 0)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)  # of the output
    monkeypatch.chdir(ROOT)
    for line in commands:
        assert main([command, *shlex.split(line)]) == 0
    assert len(checked) == len(commands)


class TestErrors:
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--release=fsr"], "none of --methods"),
            (["--release=none", "--suffix="], "needs --suffix"),
            (["--release=none", "--evaluation.attacks=[]"], "evaluation.attacks"),
            (["--release=none", "--part=1/2"], "--part"),
            (["--release=none", "--attacks"], "--attacks"),
            (["--release=none", "--suffix=a b/c"], "a b/c"),
            (["--release=none", "--namespace="], "user/name"),
            (["--release=none", "--evidence=-1"], "must be 0 or more"),
            (["--release=none", "--corruptions=-1"], "must be 0 or more"),
            (["--methods", "fsr", "fsr:tau=0.5", "--release", "fsr", "fsr:tau=0.5"], "the same name"),
            (["--images=0"], "--images=0"),
            (["--data.streamed=true"], "data.streamed"),
            (["--speed", "--mixed_precision=fp16"], "float32 and bf16"),
            (["--places", "own", "same"], "--places"),
            (["--pack=0"], "leaves no room"),
            (["--official=code"], "add it"),
            (["--optim.epoch=3"], "epoch"),
            (["--license=my own", "--release=none"], "my own"),
        ],
    )
    def test_before_anything_is_trained(self, tmp_path, capsys, more, message):
        assert release([*flags(tmp_path / "new"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_timings_need_a_checkout(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(speed, "BENCHMARKS", (tmp_path / "site-packages" / "benchmarks", tmp_path / "benchmarks"))
        assert release([*flags(tmp_path / "new"), "--speed"]) == 2
        assert "which only a checkout of the repository has" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
