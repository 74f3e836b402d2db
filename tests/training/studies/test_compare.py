"""The comparison of feature layers: one command, equal budgets, resumable, and a table of what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import BRIEF_TRAINING

import timm_fsr
import timm_fsr.training.trainer
from timm_fsr.cli.main import main
from timm_fsr.reports.report import Report
from timm_fsr.training import results
from timm_fsr.training.lock import locked
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies import compare as comparing
from timm_fsr.training.studies.entries import Entry, entries
from timm_fsr.training.studies.tables import pair, summary, table

FOLDER = Path(__file__).parents[3] / "recipes" / "compare"
PAGES = FOLDER.parents[1] / "docs" / "comparison"
RECIPES = sorted(FOLDER.glob("*.yaml"))

TINY = [
    f"--config={FOLDER / 'fashion_mnist.yaml'}",
    "--seeds=0",
    "--images=20",
    "--attacks=pgd20",
    *BRIEF_TRAINING,
]


def compare(output: Path, *flags: str) -> int:
    return main(["compare", *TINY, f"--output={output}", *flags])


def changed(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in output.rglob("model.safetensors")}


def methods_of(output: Path) -> list[str]:
    return [row["method"] for row in json.loads((output / "comparison.json").read_text())]


def each_model(output: Path) -> list[str]:
    """The lines of the table that has one for each model."""
    return (output / "comparison.md").read_text().split("Each model:\n\n")[1].splitlines()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compare")
    assert compare(output, "--methods", "none", "fsr:hidden=4", "sap", "--places", "own", "same") == 0
    return output


class TestRun:
    def test_each_method_at_each_place_is_trained_and_attacked(self, finished):
        rows = json.loads((finished / "comparison.json").read_text())
        assert [(row["method"], row["place"]) for row in rows] == [
            ("none", "own"),
            ("fsr:hidden=4", "own"),
            ("sap", "own"),
            ("sap", "same"),
        ]
        for row in rows:
            assert row["images"] == 20
            assert set(row["accuracy"]) == {"clean", "pgd20", "worst_case"}
            assert row["training_seconds"] > 0

    def test_the_table_has_a_line_for_each_with_what_it_gained_and_lost(self, finished):
        lines = each_model(finished)
        assert len(lines) == 2 + 4
        assert lines[0].startswith("| method | place | seed | clean | PGD-20 | worst | 95 % interval | against none |")
        assert " x |" in lines[3]
        assert "+" in lines[3].split("|")[8]
        assert (finished / "comparison.png").stat().st_size > 1000

    def test_seeds_are_put_together_and_the_best_worst_case_comes_first(self):
        def report(*correct: bool) -> Report:
            flags = torch.tensor(correct)
            return Report(
                correct={"clean": torch.ones_like(flags), "pgd20": flags}, attacks={}, norm="linf", eps=0.1, seed=0
            )

        def row(entry: Any, seconds: float) -> dict[str, Any]:
            accuracy = {"clean": 1.0, "pgd20": reports[entry].worst_case, "worst_case": reports[entry].worst_case}
            against = {method: pair(entry, method, reports) for method in ("none", "cas")}
            known = {"accuracy": accuracy, "training_seconds": seconds, "images": len(few), "against": against}
            return {**dataclasses.asdict(entry), **known}

        few, most = [True] * 10 + [False] * 10, [True] * 18 + [False] * 2
        reports = {
            Entry("none", "own", 0): report(*few),
            Entry("none", "own", 1): report(*few),
            Entry("cas", "own", 0): report(*most),
            Entry("cas", "own", 1): report(*few),
        }
        rows = [row(entry, 10.0 + 5 * (entry.method == "cas")) for entry in reports]
        text = summary(rows)
        head, _, first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
        assert head[3:6] == ["clean", "PGD-20", "worst"]
        assert first == ["cas", "own", "0, 1", "100.0 %", "70.0 %", "70.0 %", "**+40.0**, +0.0", "", "1.50 x"]
        assert second == ["none", "own", "0, 1", "100.0 %", "50.0 %", "50.0 %", "", "**-40.0**, +0.0", ""]

    def test_each_has_its_own_layer_and_all_else_in_common(self, finished):
        recipes = {path.parent.parent.name: Recipe.load(path) for path in finished.glob("*/training/recipe.yaml")}
        assert recipes["none_own_0"].model.layer is None
        assert recipes["fsr-hidden-4_own_0"].model.layer_args["fsr"] == {"hidden": 4}
        assert recipes["sap_own_0"].model.at is None
        assert recipes["sap_same_0"].model.at == [-1]
        bare = dataclasses.replace(recipes["none_own_0"], model=None, output="")
        assert all(dataclasses.replace(recipe, model=None, output="") == bare for recipe in recipes.values())

    def test_the_same_command_again_trains_and_attacks_nothing(self, finished, monkeypatch):
        before, table = changed(finished), (finished / "comparison.md").read_text()
        monkeypatch.setattr(comparing, "train", lambda recipe: pytest.fail("trains again"))
        assert compare(finished, "--methods", "none", "fsr:hidden=4", "sap", "--places", "own", "same") == 0
        assert changed(finished) == before
        assert (finished / "comparison.md").read_text() == table

    def test_an_objective_before_the_layer_is_compared_with_its_own_plain_network(self, tmp_path):
        assert compare(tmp_path, "--methods", "none", "trades/none", "trades/sap", "mart/sap") == 0
        recipes = {path.parent.parent.name: Recipe.load(path) for path in tmp_path.glob("*/training/recipe.yaml")}
        assert {name: (recipe.objective.name, recipe.model.layer) for name, recipe in recipes.items()} == {
            "none_own_0": ("at", None),
            "trades-none_own_0": ("trades", None),
            "trades-sap_own_0": ("trades", "sap"),
            "mart-sap_own_0": ("mart", "sap"),
        }
        lines = [line.split("|") for line in each_model(tmp_path)[2:]]
        assert {line[1].strip(): "+" in line[8] for line in lines} == {
            "none": False,
            "trades/none": False,
            "trades/sap": True,
            "mart/sap": False,  # the plain network was not trained by MART
        }

    def test_two_shells_share_the_work(self, tmp_path):
        methods = ["--methods", "none", "kwta"]
        assert compare(tmp_path, *methods, "--part=2/2") == 0
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["kwta_own_0"]
        assert compare(tmp_path, *methods, "--part=1/2") == 0
        rows = json.loads((tmp_path / "comparison.json").read_text())
        assert [row["method"] for row in rows] == ["none", "kwta"]

    def test_what_another_shell_works_on_is_left_to_it(self, tmp_path, capsys):
        methods = ["--methods", "none", "kwta", "--attacks", "fgsm"]
        with locked(tmp_path / "none_own_0"):
            assert compare(tmp_path, *methods) == 75
        assert methods_of(tmp_path) == ["kwta"]
        assert re.search(
            r"being done by others: none_own_0 \(process \d+ on .*the same command", capsys.readouterr().err
        )
        before = changed(tmp_path)
        assert compare(tmp_path, *methods) == 0
        assert methods_of(tmp_path) == ["none", "kwta"]
        assert before.items() <= changed(tmp_path).items()

    def test_and_read_when_it_is_done(self, tmp_path, monkeypatch):
        methods = ["--methods", "none", "kwta", "--attacks", "fgsm"]
        assert compare(tmp_path, "--methods", "none", "--attacks", "fgsm") == 0
        other, train = locked(tmp_path / "none_own_0"), comparing.train
        other.__enter__()

        def meanwhile(recipe: Recipe) -> Any:
            other.__exit__(None, None, None)
            return train(recipe)

        monkeypatch.setattr(comparing, "train", meanwhile)
        assert compare(tmp_path, *methods) == 0
        assert methods_of(tmp_path) == ["none", "kwta"]

    def test_what_another_shell_has_not_attacked_by_all_yet_is_left_out(self, tmp_path):
        methods = ["--methods", "none", "kwta"]
        assert compare(tmp_path, *methods, "--part=2/2", "--attacks", "fgsm") == 0
        assert compare(tmp_path, *methods, "--part=1/2", "--attacks", "fgsm", "pgd20") == 0
        assert methods_of(tmp_path) == ["none"]

    def test_nor_what_it_has_attacked_on_other_images(self, tmp_path):
        methods = ["--methods", "none", "kwta", "--attacks", "fgsm"]
        assert compare(tmp_path, *methods, "--part=2/2", "--images=10") == 0
        assert compare(tmp_path, *methods, "--part=1/2") == 0
        assert methods_of(tmp_path) == ["none"]

    def test_a_worst_case_is_over_the_attacks_that_all_have_met(self, tmp_path):
        methods = ["--methods", "none", "kwta"]
        assert compare(tmp_path, "--methods", "none", "--attacks", "fgsm", "pgd20") == 0
        assert compare(tmp_path, *methods, "--attacks", "fgsm") == 0
        for row in json.loads((tmp_path / "comparison.json").read_text()):
            report = Report.load(tmp_path / f"{row['method']}_own_0" / "evaluation" / "report.json")
            assert row["accuracy"]["worst_case"] == int((report.correct["clean"] & report.correct["fgsm"]).sum()) / 20
        text = (tmp_path / "comparison.md").read_text()
        assert "not every model has met them: pgd20." in text
        assert "PGD-20" not in text

    def test_a_training_by_another_recipe_is_refused_not_taken_for_this_one(self, tmp_path, capsys):
        assert compare(tmp_path, "--methods", "none", "--attacks") == 0
        assert compare(tmp_path, "--methods", "none", "--attacks", "--optim.lr=0.01") == 2
        assert "holds a training by another recipe: optim.lr (0.1 -> 0.01)" in capsys.readouterr().err

    def test_a_training_that_was_killed_while_it_was_evaluated_is_evaluated(self, tmp_path, monkeypatch):
        flags = ["--methods", "none", "--attacks", "fgsm", "--evaluation.attacks=[fgsm]"]

        def late(*_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGALRM)

        monkeypatch.setattr(results, "evaluate", late)
        assert compare(tmp_path, *flags) == 75
        monkeypatch.undo()
        assert compare(tmp_path, *flags) == 0
        assert (tmp_path / "none_own_0" / "training" / "report.json").exists()
        report = Report.load(tmp_path / "none_own_0" / "evaluation" / "report.json")
        assert "checkpoint_rule" in report.conditions


@pytest.mark.skipif(not PAGES.is_dir(), reason="an installed package has no docs/")
@pytest.mark.parametrize("path", sorted(PAGES.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_documents_are_those_of_the_measured_figures(path):
    rows = json.loads(path.read_text())
    assert table(rows) in path.with_suffix(".md").read_text()
    assert summary(rows) in (PAGES.parent / "layers.md").read_text()


def test_a_model_that_does_not_work_is_ranked_last():
    """It answers one class for all images, so that no attack breaks any of the few that it gets right."""
    labels = torch.arange(200) % 2
    plain, fsr, other = Entry("at", "own", 0), Entry("fsr", "own", 0), Entry("cas", "own", 0)
    outcomes = {plain: torch.arange(200) < 20, fsr: labels == 1, other: torch.arange(200) < 30}
    reports = {
        entry: Report(
            correct={
                "clean": robust | (labels == 1) | ((torch.arange(200) < 150) & (entry != fsr)),
                "autoattack": robust,
            },
            attacks={},
            norm="linf",
            eps=0.1,
            seed=0,
            labels=labels,
        )
        for entry, robust in outcomes.items()
    }
    assert [bool(reports[entry].collapsed) for entry in outcomes] == [False, True, False]
    assert pair(fsr, "at", reports) is None
    assert pair(other, "at", reports) == {"gained": 10, "lost": 0, "beyond_chance": True}
    rows: list[Any] = [
        {
            **dataclasses.asdict(entry),
            "parameters": 1,
            "training_seconds": 1.0,
            "images": 200,
            "collapsed": report.collapsed,
            "accuracy": {**report.accuracy, "worst_case": report.worst_case},
            "interval_95": list(report.interval("worst_case")),
            "against": {"at": pair(entry, "at", reports)},
        }
        for entry, report in reports.items()
    ]
    methods = [line.split(" | ")[0].strip("| ") for line in summary(rows).splitlines()[2:]]
    assert methods == ["cas", "at", "fsr (does not work)"]
    assert "| fsr (does not work) |" in table(rows)


class TestTimeLimit:
    """A training stops with what it has saved, an evaluation with its outcomes; the same command goes on."""

    METHODS = ("--methods", "none", "--optim.epochs=3")

    def result(self, folder: Path) -> tuple[dict[str, float], bytes]:
        rows = json.loads((folder / "comparison.json").read_text())
        return rows[0]["accuracy"], (folder / "none_own_0" / "training" / "best" / "model.safetensors").read_bytes()

    def test_a_training_that_is_stopped_goes_on(self, tmp_path, capsys, monkeypatch):
        assert compare(tmp_path / "whole", *self.METHODS) == 0
        log_epoch = timm_fsr.training.trainer.log_epoch

        def late(*args: Any, **kwargs: Any) -> None:
            log_epoch(*args, **kwargs)
            signal.raise_signal(signal.SIGALRM)  # what the timer sends when the minutes are over

        monkeypatch.setattr(timm_fsr.training.trainer, "log_epoch", late)
        assert compare(tmp_path / "stopped", *self.METHODS, "--minutes=9") == 75
        assert "the time is up" in capsys.readouterr().err
        assert len((tmp_path / "stopped" / "none_own_0" / "training" / "metrics.jsonl").read_text().splitlines()) == 1
        monkeypatch.setattr(timm_fsr.training.trainer, "log_epoch", log_epoch)
        assert compare(tmp_path / "stopped", *self.METHODS, "--minutes=9") == 0
        assert self.result(tmp_path / "stopped") == self.result(tmp_path / "whole")

    def test_an_evaluation_that_is_stopped_goes_on(self, tmp_path, capsys, monkeypatch):
        assert compare(tmp_path, *self.METHODS, "--attacks") == 0
        before = changed(tmp_path)
        assess = comparing.assess

        for number, status, why in (
            (signal.SIGALRM, 75, "the time is up"),
            (signal.SIGTERM, 143, "stopped by SIGTERM"),
            (signal.SIGINT, 130, "stopped by Ctrl-C"),
        ):
            monkeypatch.setattr(comparing, "assess", lambda *_, number=number, **__: signal.raise_signal(number))
            assert compare(tmp_path, *self.METHODS) == status
            told = capsys.readouterr().err
            assert f"timm-fsr compare: {why}; what was done is saved, go on with: timm-fsr compare --config=" in told
            assert told.count("\n") == 1
        monkeypatch.setattr(comparing, "assess", assess)
        assert compare(tmp_path, *self.METHODS) == 0
        assert changed(tmp_path) == before
        assert "pgd20" in json.loads((tmp_path / "comparison.json").read_text())[0]["accuracy"]

    def test_handlers_are_put_back(self, tmp_path):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
        assert compare(tmp_path, "--methods", "none", "--minutes=9") == 0
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class TestEntries:
    def test_a_layer_whose_own_place_is_the_common_one_is_trained_once(self):
        found = dict.fromkeys((e.method, e.place) for e in entries(["none", "fsr", "cas"], ["own", "same"], [0]))
        assert list(found) == [("none", "own"), ("fsr", "own"), ("cas", "own"), ("cas", "same")]

    def test_arguments_are_read_as_yaml(self):
        entry = Entry("fsr:mode=separation,tau=1.0,noise=false", "own", 0)
        assert entry.layer == "fsr"
        assert entry.layer_args == {"mode": "separation", "tau": 1.0, "noise": False}

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    @pytest.mark.parametrize("place", ["own", "same"])
    def test_every_layer_fits_every_recipe(self, path, place):
        base = Recipe.load(path)
        for layer in timm_fsr.list_layers():
            if layer != "afd":
                Entry(layer, place, 0).recipe(base, Path("runs")).check()


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--methods", "none", "fsrr"], "unknown feature layer 'fsrr'"),
            (["--methods", "fsr:hiden=4"], "did you mean 'hidden'"),
            (["--methods", "none", "--part=3/2"], "part"),
            (["--methods", "none", "--part=x"], "part"),
            (["--methods", "none", "--minutes=0"], "leaves no time"),
            (["--methods", "tradess/none"], "did you mean 'trades'"),
            (["--methods", "none", "--images=0"], "--images=0"),
            (["--methods", "none", "sap", "--against", "fsr"], "--against fsr"),
            (["--methods", "none", "--data.streamed=true"], "data.streamed"),
            (["--methods", "none", "--optim.epoch=3"], "epoch"),
            (["--methods", "none", "--attacks", "pdg2"], "unknown attack 'pdg2'"),
            (["--methods", "none", "--seed=3"], "use --seeds"),
            (["--methods", "none", "--model.layer=fsr"], "use --methods"),
            (["--methods", "afd"], "fine-tunes a trained model"),
        ],
    )
    def test_bad_input_is_told_before_anything_is_trained(self, tmp_path, capsys, flags, message):
        assert compare(tmp_path / "new", *flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
