"""Runs as a set: which are found, what the table says of each, and the page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import tiny

from timm_fsr.cli.main import main
from timm_fsr.reports.report import Report
from timm_fsr.training.lock import locked
from timm_fsr.training.output import how_it_ended, note_end
from timm_fsr.training.studies.runs import CLEAN, ROBUST, find_runs, over_seeds, table_of
from timm_fsr.training.trainer import train


def run(folder: Path, *flags: str, robust: tuple[float, ...] = (0.2, 0.3), report: Report | None = None) -> Path:
    """What a run leaves behind, made up."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(tiny(folder, *flags).to_yaml())
    lines = [
        {"epoch": epoch, "train.robust_accuracy": value, ROBUST: value, CLEAN: value + 0.1, "seconds": 90.0}
        for epoch, value in enumerate(robust, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best").mkdir()
    (folder / "best" / "config.json").write_text('{"num_classes": 10}')
    (folder / "best" / "recipe.yaml").write_text("no run")
    if report is not None:
        report.save(folder / "report.json")
    return folder


def judged(**attacks: int) -> Report:
    """Of 20 images, the first so many are right under each attack."""
    correct = {name: torch.arange(20) < count for name, count in {"clean": 18, **attacks}.items()}
    return Report(correct=correct, attacks={}, norm="linf", eps=0.1, seed=0)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    run(tmp_path / "a", report=judged(fgsm=10, pgd20=9))
    run(tmp_path / "b" / "training", "--optim.lr=0.05", "--seed=1", robust=(0.5, 0.4), report=judged(fgsm=12))
    run(tmp_path / "c", "--optim.lr=0.05", robust=(0.1,))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split() for line in lines[2:] if re.match(r"[a-c] ", line)}


class TestTable:
    def test_it_has_the_keys_that_differ_and_what_came_out(self, several, capsys):
        assert main(["runs", str(several), "--csv", str(several / "runs.csv")]) == 0
        with (several / "runs.csv").open() as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
        assert list(rows) == ["b", "a", "c"]  # by the worst case, what has none last
        assert rows["b"] == {
            "run": "b",
            "seed": "1",
            "optim.lr": "0.05",
            "held_out.clean": "0.6",
            "held_out.robust": "0.5",  # of the best epoch
            "test.clean": "0.9",
            "test.fgsm": "0.6",
            "test.worst": "0.6",
            "seconds": "180.0",
            "state": "finished",
        }
        assert rows["a"]["test.worst"] == "0.5"  # over the attacks that both have met
        assert (rows["c"]["test.worst"], rows["c"]["state"]) == ("", "stopped at 1")
        out = capsys.readouterr().out
        assert "left out, because not every run has met them: pgd20" in out

    def test_it_fits_the_terminal_and_says_what_is_missing(self, several, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "50")
        assert main(["runs", str(several)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines[:5])) <= 50
        assert "state" in lines[1]
        assert any(line.startswith("no room for test fgsm, held-out clean, test clean") for line in lines)

    @pytest.mark.parametrize(
        ("flags", "order"),
        [
            (["--sort=run"], "abc"),
            (["--sort=run", "--reverse"], "cba"),
            (["--sort=held_out.robust"], "bac"),
            (["--sort=robust", "--reverse"], "cab"),
            (["--sort=optim.lr"], "bca"),
            (["--sort=time"], "cab"),
        ],
    )
    def test_it_is_sorted_by_any_column(self, several, capsys, flags, order):
        assert main(["runs", str(several), *flags]) == 0
        assert "".join(shown(capsys)) == order

    def test_states(self, several):
        note_end(several / "c", "pruned", "worse")
        with locked(several / "a"):
            found = {one.name: one.state for one in find_runs([several])}
        assert found == {"a": "running", "b": "finished", "c": "pruned at 1"}

    def test_other_test_images_are_told(self, tmp_path):
        run(tmp_path / "a", report=judged(fgsm=10))
        few = Report(
            correct={"clean": torch.ones(5).bool(), "fgsm": torch.ones(5).bool()},
            attacks={},
            norm="linf",
            eps=0.1,
            seed=0,
        )
        run(tmp_path / "b", report=few)
        assert any("not comparable" in note for note in table_of(find_runs([tmp_path])).notes)


class TestSeeds:
    def test_means_are_of_finished_runs_that_differ_in_the_seed_alone(self, tmp_path):
        for seed, robust in enumerate((0.3, 0.34, 0.32)):
            run(tmp_path / f"a{seed}", f"--seed={seed}", robust=(0.1, robust), report=judged(fgsm=10 + seed))
        run(tmp_path / "b", "--optim.lr=0.01")
        run(tmp_path / "c", "--seed=9", robust=(0.9,))  # unfinished
        text = over_seeds(find_runs([tmp_path])).splitlines()
        assert len(text) == 2
        # 0.32 +- 4.303 * 0.02 / sqrt(3), and 0.55 +- 4.303 * 0.05 / sqrt(3).
        assert "(seeds 0, 1, 2): held-out robust 32.0 % [27.0, 37.0]; test worst case 55.0 % [42.6, 67.4]" in text[1]

    def test_one_seed_has_none(self, several):
        assert over_seeds(find_runs([several])) == ""


class TestPage:
    def test_it_needs_no_other_file_and_has_every_run(self, several):
        page = several / "runs.html"
        assert main(["runs", str(several), "--page", str(page)]) == 0
        text = page.read_text()
        assert not re.search(r"""(?:src|href)=["']?(?!#)""", text)
        assert text.count("<svg") == 3
        assert text.count("<polyline") + text.count("<path") > 9
        for name in "abc":
            assert f">{name}</th>" in text
        assert "chance: 10.0 %" in text
        assert 'data-value="0.05"' in text

    def test_names_are_escaped(self, tmp_path):
        run(tmp_path / "<b>", report=judged(fgsm=3))
        assert main(["runs", str(tmp_path), "--page", str(tmp_path / "p.html")]) == 0
        assert "<b>" not in (tmp_path / "p.html").read_text()


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--sort=lrr"], "did you mean 'lr'"),
            (["{}/nowhere"], "there is no folder"),
        ],
    )
    def test_they_are_told(self, several, capsys, flags, message):
        assert main(["runs", str(several), *(flag.format(several) for flag in flags)]) == 2
        assert message in capsys.readouterr().err

    def test_a_folder_without_runs(self, tmp_path, capsys):
        assert main(["runs", str(tmp_path)]) == 2
        assert "there is no training run in" in capsys.readouterr().err


class TestWhatTrainingLeaves:
    def test_validations_are_reported_and_may_end_the_run(self, tmp_path):
        seen: list[tuple[int, Any]] = []

        class EnoughError(Exception):
            pass

        def look(epoch: int, metrics: Any) -> None:
            seen.append((epoch, metrics[ROBUST]))
            raise EnoughError

        recipe = tiny(tmp_path / "run", "--evaluation.validate_every=1", "--evaluation.attacks=[]")
        with pytest.raises(EnoughError):
            train(recipe, on_validation=look)
        (found,) = find_runs([tmp_path])
        assert found.state == "stopped at 1"
        assert seen == [(1, found.metrics[0][ROBUST])]

    def test_a_failure_is_noted_until_the_run_goes_on(self, tmp_path):
        flags = ("--evaluation.attacks=[]", "--optim.epochs=1")
        with pytest.raises(FloatingPointError):
            train(tiny(tmp_path, *flags, "--optim.lr=1e30"))
        assert find_runs([tmp_path])[0].state == "failed"
        assert "NaN" in how_it_ended(tmp_path)["reason"]
        train(tiny(tmp_path, *flags, "--overwrite=true"))
        assert find_runs([tmp_path])[0].state == "finished"
