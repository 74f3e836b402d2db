"""Sweeps: every combination of a grid, or a search: pruned, resumed, shared; refused before anything is trained."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny import BRIEF_TRAINING

from timm_fsr.cli.main import main
from timm_fsr.training.lock import locked
from timm_fsr.training.output import begin_output, note_end
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies import sweep as sweeping
from timm_fsr.training.studies.runs import CLEAN, ROBUST
from timm_fsr.training.studies.search import Space, read_space
from timm_fsr.training.studies.sweep import read_grid, read_search

CONFIG = Path(__file__).parents[3] / "recipes" / "fashion_mnist_quickstart.yaml"
EPOCHS = 3


def sweep(output: Path, *flags: str) -> int:
    brief = [flag for flag in BRIEF_TRAINING if "epochs" not in flag and "attack.steps" not in flag]
    return main(["sweep", f"--config={CONFIG}", *brief, "--evaluation.attacks=[]", f"--output={output}", *flags])


class Trainings:
    """Stands in for training: its robust accuracy is `accuracy(recipe)` in each epoch."""

    def __init__(self, accuracy: Callable[[Recipe], float]) -> None:
        self.accuracy, self.done = accuracy, list[Recipe]()

    def __call__(self, recipe: Recipe, *, on_validation: Any = None) -> None:
        self.done.append(recipe)
        begin_output(recipe, new=True)
        for epoch in range(1, recipe.optim.epochs + 1):
            line = {"epoch": epoch, ROBUST: self.accuracy(recipe), CLEAN: 0.9, "seconds": 30.0}
            with (recipe.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if on_validation is not None:
                on_validation(epoch, line)
        (recipe.folder / "best").mkdir()
        (recipe.folder / "best" / "config.json").write_text('{"num_classes": 10}')


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    stand_in = Trainings(lambda recipe: min(0.5, recipe.optim.lr) + recipe.seed / 100)
    monkeypatch.setattr(sweeping, "train", stand_in)
    return stand_in


def rows(output: Path) -> dict[str, Mapping[str, str]]:
    with (output / "runs.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


class TestGrid:
    FLAGS = ("--optim.epochs=2", "--grid", "optim.lr=0.1,0.2", "seed=0,1")

    def test_a_real_one_is_trained_and_shown(self, tmp_path, capsys):
        assert sweep(tmp_path, "--optim.epochs=1", "--attack.steps=1", "--grid", "optim.lr=0.1,0.2") == 0
        assert {name: row["state"] for name, row in rows(tmp_path).items()} == {
            "lr=0.1": "finished",
            "lr=0.2": "finished",
        }
        assert Recipe.load(tmp_path / "lr=0.2" / "training" / "recipe.yaml").optim.lr == 0.2
        assert (tmp_path / "lr=0.2" / "training" / "best" / "model.safetensors").exists()

    def test_every_combination_once_with_means_over_seeds(self, tmp_path, trainings, capsys):
        assert sweep(tmp_path, *self.FLAGS) == 0
        assert [(recipe.optim.lr, recipe.seed) for recipe in trainings.done] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
        told = capsys.readouterr().out
        assert list(rows(tmp_path)) == ["lr=0.2_seed=1", "lr=0.2_seed=0", "lr=0.1_seed=1", "lr=0.1_seed=0"]
        # Student's t of 0.20 and 0.21: 0.205 +- 12.706 * 0.00707 / sqrt(2).
        assert "lr=0.2 (seeds 0, 1): held-out robust 20.5 % [14.1, 26.9]" in told
        assert max(len(line) for line in told.partition("held-out")[2].splitlines() if "seed=" in line) <= 80
        assert sweep(tmp_path, *self.FLAGS) == 0
        assert len(trainings.done) == 4

    def test_more_values_later_are_added(self, tmp_path, trainings):
        assert sweep(tmp_path, "--optim.epochs=2", "--grid", "optim.lr=0.1") == 0
        assert sweep(tmp_path, "--optim.epochs=2", "--grid", "optim.lr=0.1,0.3") == 0
        assert [recipe.optim.lr for recipe in trainings.done] == [0.1, 0.3]

    def test_what_another_shell_trains_is_left_to_it(self, tmp_path, trainings, capsys):
        with locked(tmp_path / "lr=0.1_seed=0"):
            assert sweep(tmp_path, *self.FLAGS) == 75
        assert "being done by others: lr=0.1_seed=0" in capsys.readouterr().err
        assert len(trainings.done) == 3
        assert sweep(tmp_path, *self.FLAGS) == 0
        assert len(trainings.done) == 4

    def test_one_that_fails_is_noted_and_the_others_go_on(self, tmp_path, trainings, capsys):
        def fail(recipe: Recipe) -> float:
            if recipe.optim.lr == 0.1:
                note_end(recipe.folder, "failed", "NaN")
                raise FloatingPointError("the loss became NaN")
            return 0.4

        trainings.accuracy = fail
        for _ in range(2):
            assert sweep(tmp_path, "--optim.epochs=2", "--grid", "optim.lr=0.1,0.2") == 0
        assert [recipe.optim.lr for recipe in trainings.done] == [0.1, 0.2]
        assert "lr=0.1 failed: the loss became NaN" in capsys.readouterr().out

    def test_when_the_time_is_up_the_command_to_go_on_is_told(self, tmp_path, trainings, capsys):
        trainings.accuracy = lambda recipe: signal.raise_signal(signal.SIGALRM) or 0.0
        assert sweep(tmp_path, *self.FLAGS, "--minutes=9") == 75
        assert "the time is up; what was done is saved, go on with: timm-fsr sweep --config" in capsys.readouterr().err


class TestSearch:
    FLAGS = ("--optim.epochs=3", "--evaluation.validate_every=1", "--search", "optim.lr=0.01..0.5", "attack.steps=1,2")

    @pytest.fixture(autouse=True)
    def _needs_optuna(self) -> None:
        pytest.importorskip("optuna")

    def chosen(self, output: Path) -> dict[str, Any]:
        return {path.parent.name: json.loads(path.read_text()) for path in output.glob("*/trial.json")}

    def test_bad_trials_are_pruned_and_the_best_comes_first(self, tmp_path, trainings):
        assert sweep(tmp_path, *self.FLAGS, "--trials=12") == 0
        assert len(trainings.done) == 12
        found = list(rows(tmp_path).values())
        assert {row["state"] for row in found} == {"finished", "pruned at 1"}
        rates = [float(row["optim.lr"]) for row in found]
        assert rates == sorted(rates, reverse=True)
        assert all(0.01 <= rate <= 0.5 for rate in rates)
        assert all(row["state"] == "finished" for row in found[:3])

    def test_without_pruning_all_reach_their_end(self, tmp_path, trainings):
        assert sweep(tmp_path, *self.FLAGS, "--trials=8", "--no-prune") == 0
        assert {row["state"] for row in rows(tmp_path).values()} == {"finished"}

    def test_a_killed_search_goes_on_with_the_same_values(self, tmp_path, trainings, monkeypatch):
        assert sweep(tmp_path / "whole", *self.FLAGS, "--trials=4") == 0

        def killed(recipe: Recipe, **_: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

        output = tmp_path / "killed"
        assert sweep(output, *self.FLAGS, "--trials=2") == 0
        monkeypatch.setattr(sweeping, "train", killed)
        assert sweep(output, *self.FLAGS, "--trials=4") == 143
        assert set(self.chosen(output)) == {"trial-000", "trial-001", "trial-002"}
        monkeypatch.setattr(sweeping, "train", trainings)
        assert sweep(output, *self.FLAGS, "--trials=4") == 0
        assert self.chosen(output) == self.chosen(tmp_path / "whole")

    def test_shells_take_different_trials_of_one_storage(self, tmp_path, trainings):
        with locked(tmp_path / "trial-001"):
            assert sweep(tmp_path, *self.FLAGS, "--trials=3") == 75
        assert set(self.chosen(tmp_path)) == {"trial-000", "trial-002"}
        assert sweep(tmp_path, *self.FLAGS, "--trials=3") == 0
        assert sorted(found["number"] for found in self.chosen(tmp_path).values()) == [0, 1, 2]

    def test_another_search_is_refused(self, tmp_path, trainings, capsys):
        assert sweep(tmp_path, *self.FLAGS, "--trials=1") == 0
        assert sweep(tmp_path, *self.FLAGS, "--trials=1", "--optim.momentum=0.5") == 2
        assert "holds another search: optim.momentum (0.9 -> 0.5)" in capsys.readouterr().err

    def test_without_optuna_it_says_what_to_install(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "optuna", None)
        assert sweep(tmp_path / "new", *self.FLAGS) == 2
        assert "pip install 'timm-fsr[sweep]'" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


class TestNotation:
    def test_commas_in_brackets_belong_to_a_value(self):
        assert read_grid(["model.at=[-1],[-2, -1]", "seed=0"]) == {"model.at": ["[-1]", "[-2, -1]"], "seed": ["0"]}

    @pytest.mark.parametrize(
        ("text", "space"),
        [
            ("optim.lr=0.01..0.5", Space("float", 0.01, 0.5, log=True)),
            ("optim.lr=0.1..0.5", Space("float", 0.1, 0.5)),
            ("optim.lr=0.1..0.5:log", Space("float", 0.1, 0.5, log=True)),
            ("optim.lr=0.01..0.5:linear", Space("float", 0.01, 0.5)),
            ("optim.lr=1..2", Space("float", 1, 2)),
            ("optim.epochs=5..20", Space("int", 5, 20)),
            ("objective.args.trades.beta=1..6", Space("int", 1, 6)),
            ("attack.step_size=1/255..4/255", Space("float", 1 / 255, 4 / 255)),
            ("model.layer=fsr,null", Space("choice", choices=("fsr", "null"))),
        ],
    )
    def test_ranges_and_choices(self, text, space):
        assert read_search([text]) == {text.partition("=")[0]: space}

    def test_a_whole_number_is_written_as_one(self):
        assert read_space("optim.epochs", "5..20", []).ends == ("5", "20")


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "give either --grid or --search"),
            (["--grid", "optim.lrr=0.1"], "did you mean 'optim.lr'"),
            (["--grid", "optim.lr=0.1,abc"], "--optim.lr=abc"),
            (["--grid", "optim.lr"], "no key with values"),
            (["--grid", "optim.lr=0.1,0.1"], "lr=0.1 twice"),
            (["--grid", "output=a,b"], "cannot be varied"),
            (["--grid", "model.layer=fsr,fsrr"], "unknown feature layer 'fsrr'"),
            (["--optim.lr=0.3", "--grid", "optim.lr=0.1"], "use --grid alone"),
            (["--search", "optim.lrr=0.1..0.5"], "optim.lrr"),
            (["--search", "optim.lr=0.5..0.1"], "empty range"),
            (["--search", "optim.lr=a..b"], "no number"),
            (["--search", "optim.lr=-1..1:log"], "no logarithm"),
            (["--search", "optim.lr=0.1..1:cube"], "'cube'"),
            (["--search", "optim.epochs=0.5..2"], "whole number"),
            (["--search", "optim.epochs=-5..2"], "optim.epochs"),
            (["--search", "model.layer=a..b"], "no number"),
            (["--search", "model.layer=1..2"], "with commas"),
            (["--search", "model.layer=fsr"], "leaves no choice"),
            (["--search", "attack.eps=0.01..0.1"], "the easiest value would win"),
            (["--search", "optim.lr=0.1..1", "--trials=0"], "--trials=0"),
            (["--grid", "seed=0", "--minutes=0"], "leaves no time"),
        ],
    )
    def test_before_anything_is_trained(self, tmp_path, capsys, trainings, flags, message):
        assert sweep(tmp_path / "new", *flags) == 2
        assert message in capsys.readouterr().err
        assert trainings.done == []
        assert not (tmp_path / "new").exists()
