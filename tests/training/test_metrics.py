"""What a run tells: `metrics.jsonl`, its lines on the screen, and the trackers."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.runs import metrics, tiny

import timm_fsr.training.metrics
from timm_fsr.training.metrics import begin_tracking, check_trackers, describe, log_epoch, read_metrics
from timm_fsr.training.state import Progress, flatten
from timm_fsr.training.trainer import train

SHORT = ["--data.limit_train=52", "--model.layer=null", "--evaluation.attacks=[]", "--evaluation.validation_steps=1"]


class Teller:
    """What tracking asks for, and what it does with that."""

    def __init__(self, output: Path, *flags: str, main: bool = True, **progress: Any) -> None:
        self.recipe = tiny(output, *flags)
        self.progress = Progress(**progress)
        self.screen = io.StringIO()
        self.console = Console(file=self.screen, quiet=not main, soft_wrap=True)
        self.tracked: list[tuple[dict[str, float], int]] = []
        self.begun: list[tuple[str, dict[str, Any]]] = []
        self.accelerator: Any = SimpleNamespace(
            is_main_process=main,
            log=lambda values, step: self.tracked.append((dict(values), step)),
            init_trackers=self.init_trackers,
        )

    def init_trackers(self, name: str, config: dict[str, Any], init_kwargs: dict[str, dict[str, Any]]) -> None:
        self.begun.append((name, config))
        self.options = init_kwargs

    def begin(self) -> None:
        begin_tracking(self.recipe, self.accelerator, lines=self.progress.lines)

    def log(self, values: dict[str, float]) -> None:
        log_epoch(values, self.progress, recipe=self.recipe, accelerator=self.accelerator, console=self.console)

    @property
    def file(self) -> Path:
        return self.recipe.folder / "metrics.jsonl"

    def write(self, count: int) -> None:
        """A line for each of so many epochs."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(f'{{"epoch": {epoch}, "lr": 0.5}}\n' for epoch in range(1, count + 1)))


class TestCheck:
    def test_an_unknown_name_is_refused_with_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
            check_trackers(["tensorbord"])

    def test_all_is_no_name_here(self):
        """Accelerate would take it for whatever is installed."""
        with pytest.raises(ValueError, match=r"unknown tracker 'all'"):
            check_trackers(["all"])

    @pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
    def test_one_whose_package_is_missing_is_refused_with_the_remedy(self, monkeypatch, name):
        monkeypatch.setattr(timm_fsr.training.metrics, "get_available_trackers", list)
        message = rf"the tracker '{name}' is not installed here; run `pip install {name}` or leave it out"
        with pytest.raises(ValueError, match=message):
            check_trackers([name])

    def test_each_name_is_looked_at(self, monkeypatch):
        monkeypatch.setattr(timm_fsr.training.metrics, "get_available_trackers", lambda: ["wandb"])
        check_trackers([])
        check_trackers(["wandb"])
        with pytest.raises(ValueError, match="'trackio' is not installed"):
            check_trackers(["wandb", "trackio"])

    def test_training_does_not_begin(self, tmp_path, monkeypatch):
        monkeypatch.setattr("timm_fsr.data.dataset.load_data", lambda *_, **__: pytest.fail("data was read"))
        monkeypatch.setattr(timm_fsr.training.metrics, "get_available_trackers", list)
        with pytest.raises(ValueError, match="is not installed here"):
            train(tiny(tmp_path / "new", "--trackers=[wandb]"))
        assert not (tmp_path / "new").exists()


class TestBegin:
    @pytest.mark.parametrize(("written", "known", "left"), [(3, 2, 2), (2, 2, 2), (3, 0, 0), (0, 0, 0)])
    def test_lines_that_the_run_does_not_know_of_are_cut_off(self, tmp_path, written, known, left):
        """A process was killed after it wrote the line and before the checkpoint; or the run is a new one."""
        run = Teller(tmp_path, lines=known)
        run.write(written)
        run.begin()
        assert [line["epoch"] for line in metrics(tmp_path)] == list(range(1, left + 1))

    def test_a_new_run_begins_with_an_empty_file(self, tmp_path):
        run = Teller(tmp_path / "new")
        run.begin()
        assert run.file.read_text() == ""

    def test_other_processes_write_nothing(self, tmp_path):
        run = Teller(tmp_path / "new", main=False)
        run.begin()
        run.log({"lr": 0.1})
        assert not run.file.exists()
        assert run.progress.lines == 1, "but they know of the line, as their checkpoint does"

    def test_trackers_get_the_recipe_flat_and_in_plain_values(self, tmp_path):
        run = Teller(tmp_path, "--trackers=[wandb]", "--objective.args.trades.beta=5")
        run.begin()
        ((project, config),) = run.begun
        assert project == "timm_fsr"
        assert all(isinstance(value, (int, float, str, bool)) for value in config.values())
        assert config.keys() == flatten(yaml.safe_load(run.recipe.to_yaml())).keys()
        expected = {
            "optim.lr": 0.1,
            "optim.epochs": 2,
            "channels_last": True,
            "model.layer": "fsr",
            "compile": "None",
            "optim.milestones": "[75.0, 90.0]",
            "objective.args.trades.beta": 5,
        }
        assert {key: config[key] for key in expected} == expected

    def test_they_get_the_name_of_the_run_and_a_folder_inside_of_it(self, tmp_path, monkeypatch):
        for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
            monkeypatch.setenv(variable, "asked")  # so that what is set here is undone
            monkeypatch.delenv(variable)
        run = Teller(tmp_path / "lr=0.1" / "training", "--trackers=[wandb,trackio]")
        run.begin()
        inside = tmp_path / "lr=0.1" / "training" / "trackers"
        assert run.options == {
            "wandb": {"name": "lr=0.1", "dir": str(inside)},
            "trackio": {"name": "lr=0.1", "resume": "never"},
        }
        assert inside.is_dir()
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
            assert Path(os.environ[variable]).is_relative_to(inside), variable

    def test_but_where_the_user_has_chosen_a_folder_it_stays(self, tmp_path, monkeypatch):
        for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
            monkeypatch.setenv(variable, "asked")
        run = Teller(tmp_path, "--trackers=[wandb,trackio]")
        run.begin()
        assert "dir" not in run.options["wandb"]
        assert {os.environ[name] for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR")} == {"asked"}

    def test_without_trackers_none_is_started(self, tmp_path):
        run = Teller(tmp_path)
        run.begin()
        assert run.begun == []


class TestEpoch:
    def test_it_is_a_line_of_json_a_line_on_the_screen_and_a_step_of_the_trackers(self, tmp_path):
        run = Teller(tmp_path, "--optim.epochs=9")
        run.begin()
        found = [{"loss.adversarial": 2.25, "lr": 0.1}, {"loss.adversarial": 1.5, "held_out.clean_accuracy": 0.625}]
        for epoch, values in enumerate(found, start=1):
            run.progress.epoch = epoch
            run.log(values)
        assert run.file.read_text() == "".join(
            json.dumps({"epoch": epoch, **values}) + "\n" for epoch, values in enumerate(found, start=1)
        )
        assert read_metrics(run.recipe.folder) == [{"epoch": 1, **found[0]}, {"epoch": 2, **found[1]}]
        assert run.screen.getvalue().splitlines() == [
            "epoch 1/9: adversarial 2.250",
            "epoch 2/9: adversarial 1.500, held_out clean 62.5 %",
        ]
        assert run.tracked == [(found[0], 1), (found[1], 2)]
        assert run.progress.lines == 2

    def test_it_goes_on_behind_the_lines_of_a_resumed_run(self, tmp_path):
        run = Teller(tmp_path, epoch=3, lines=2)
        run.write(3)
        run.begin()
        run.log({"lr": 0.25})
        assert read_metrics(run.recipe.folder) == [
            {"epoch": 1, "lr": 0.5},
            {"epoch": 2, "lr": 0.5},
            {"epoch": 3, "lr": 0.25},
        ]

    def test_before_the_first_there_is_nothing_to_read(self, tmp_path):
        run = Teller(tmp_path / "new")
        assert read_metrics(run.recipe.folder) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"loss.adversarial": 2.30259}, "adversarial 2.303"),
        ({"loss.fsr.separation": 0.5}, "fsr.separation 0.500"),
        ({"train.robust_accuracy": 0.1234}, "train robust 12.3 %"),
        ({"held_out.one_step_accuracy": 1.0}, "held_out one_step 100.0 %"),
        ({"seconds": 61.6, "skipped_steps": 3.0}, "62 s, 3 steps skipped"),
        ({"lr": 0.1, "eps": 0.03}, "eps 0.0300"),
    ],
)
def test_metrics_on_one_line(values, text):
    assert describe(values) == text


def test_names_are_printed_as_they_are(tmp_path, capsys):
    """Not as the mark-up [b] of a bold face."""
    train(tiny(tmp_path / "[b]run", *SHORT, "--optim.epochs=1", "--evaluation.attacks=[fgsm]"))
    assert f"results in {tmp_path}/[b]run" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with TensorBoard."""
    pytest.importorskip("tensorboard")
    output = tmp_path_factory.mktemp("tracked") / "run"
    train(tiny(output, *SHORT, "--trackers=[tensorboard]"))
    return output


class TestTensorBoard:
    def test_its_scalars_are_those_of_the_file(self, tracked):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tracked / "trackers" / "timm_fsr"))
        events.Reload()
        lines = metrics(tracked)
        names = [name for name in lines[0] if name != "epoch"]
        assert {"loss.adversarial", "held_out.robust_accuracy", "lr", "seconds"} <= set(names)
        assert set(events.Tags()["scalars"]) == set(names)
        for name in names:
            found = events.Scalars(name)
            assert [event.step for event in found] == [line["epoch"] for line in lines] == [1, 2]
            assert [event.value for event in found] == pytest.approx([line[name] for line in lines], rel=1e-6), name

    def test_it_has_the_recipe(self, tracked):
        (path,) = (tracked / "trackers" / "timm_fsr").glob("*/hparams.yml")
        values = yaml.safe_load(path.read_text())
        assert values["attack.eps"] == 0.1
        assert re.search(r"tensorboard", values["trackers"])
