"""A run that is killed and resumed ends to the bit where an uninterrupted one ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import Killed, before_step, contents, equal, metrics, same_values, tiny, weights, without_seconds

import timm_fsr.training.results
from timm_fsr.cli.main import main
from timm_fsr.reports.report import Report
from timm_fsr.training.step import InterruptedRunError
from timm_fsr.training.trainer import Trainer, train

# Three epochs of three steps, with everything that has a state: momentum, a schedule, an average, masks, dropout.
FLAGS = [
    "--optim.epochs=3",
    "--optim.schedule=one_cycle",
    "--optim.warmup=0.3",
    "--optim.ema_decay=0.9",
    "--optim.ema_warmup=true",
    "--optim.awp_gamma=0.005",
    "--optim.awp_start=1",
    "--attack.warmup_epochs=1.5",
    "--model.args.drop_rate=0.2",
    "--checkpoint.every_steps=2",
    "--checkpoint.keep=3",
    "--evaluation.attacks=[fgsm]",
]


def kill(monkeypatch: pytest.MonkeyPatch, output: Path, step: int, *flags: str) -> None:
    """Train until the process "dies" before `step`."""

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        before_step(patch, step, die)
        with pytest.raises(Killed):
            train(tiny(output, *FLAGS, *flags))


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, average, optimizer, metrics and report; all but the time it took."""
    for kind in ("best", "last"):
        assert equal(weights(one / kind), weights(other / kind)), kind
    last = "checkpoints/step-000000009"
    states = [torch.load(folder / last / "tensors.pt", weights_only=True) for folder in (one, other)]
    assert states[0]["ema"]
    assert states[0]["optimizer"]["state"]
    assert same_values(*states)
    progress = [json.loads((folder / last / "values.json").read_text())["progress"] for folder in (one, other)]
    assert progress[0] == progress[1]
    assert without_seconds(metrics(one)) == without_seconds(metrics(other))
    assert [line["epoch"] for line in metrics(one)] == [1, 2, 3]
    reports = [Report.load(folder / "report.json").to_dict() for folder in (one, other)]
    for report in reports:
        del report["conditions"]["training_seconds"]
    assert reports[0] == reports[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    train(tiny(output, *FLAGS))
    return output


class TestKilled:
    @pytest.mark.parametrize("step", [1, 2, 4, 7, 8])
    def test_at_any_step(self, whole, tmp_path, monkeypatch, step):
        """Before the first checkpoint, right after one, within an epoch, and at its beginning."""
        kill(monkeypatch, tmp_path, step)
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_twice(self, whole, tmp_path, monkeypatch):
        kill(monkeypatch, tmp_path, 3)
        kill(monkeypatch, tmp_path, 7, "--resume=true")
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_between_the_validation_and_the_checkpoint(self, whole, tmp_path, monkeypatch):
        """The line of the epoch is written already, and best/ belongs to it: neither may count twice."""
        save = Trainer.save_checkpoint

        def die(trainer: Trainer) -> None:
            if trainer.progress.epoch == 2:
                raise Killed
            save(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save_checkpoint", die)
            with pytest.raises(Killed):
                train(tiny(tmp_path, *FLAGS))
        assert len(metrics(tmp_path)) == 2
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_during_a_validation(self, whole, tmp_path, monkeypatch):
        """No step is repeated: the state was saved before."""

        def die(trainer: Trainer) -> dict[str, float]:
            if trainer.progress.step == 6:
                raise Killed
            return validate(trainer)

        validate = Trainer.validate
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "validate", die)
            with pytest.raises(Killed):
                train(tiny(tmp_path, *FLAGS))
        before_step(monkeypatch, 5, lambda: pytest.fail("a step was repeated"))
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_during_the_final_evaluation(self, whole, tmp_path, monkeypatch):
        def die(*_: Any, **__: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(timm_fsr.training.results, "evaluate", die)
            with pytest.raises(Killed):
                train(tiny(tmp_path, *FLAGS))
        assert not (tmp_path / "report.json").exists()
        monkeypatch.setattr(Trainer, "take_step", lambda *_, **__: pytest.fail("it trained again"))
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_resuming_where_nothing_is_starts_a_run(self, tmp_path, capsys):
        train(tiny(tmp_path, "--optim.epochs=1", "--evaluation.attacks=[]", "--resume=true"))
        assert "the run starts from its beginning" in capsys.readouterr().out
        assert len(metrics(tmp_path)) == 1


class TestTerminated:
    def test_a_sigterm_saves_where_it_is(self, whole, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
            message = r"stopped by SIGTERM after step 2 of epoch 2; the run is saved, go on with --resume=true"
            with pytest.raises(InterruptedRunError, match=message):
                train(tiny(tmp_path, *FLAGS))
        assert (tmp_path / "checkpoints" / "step-000000005").is_dir()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_one_during_the_validation_is_heard_too(self, whole, tmp_path, monkeypatch):
        """Also the last one: the final evaluation may take longer than the scheduler waits."""
        validate = Trainer.validate

        def terminated(trainer: Trainer) -> dict[str, float]:
            if trainer.progress.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "validate", terminated)
            with pytest.raises(InterruptedRunError, match="after epoch 3; the run is saved"):
                train(tiny(tmp_path, *FLAGS))
        assert not (tmp_path / "report.json").exists()
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_one_to_the_whole_process_group_leaves_the_workers_alive(self, tmp_path, monkeypatch):
        """Launchers send it to all processes; a decoding worker that dies would end the training unsaved."""
        flags = ["--data.streamed=true", "--data.size=28", "--data.workers=1", "--evaluation.attacks=[]"]

        def terminate() -> None:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

        before_step(monkeypatch, 0, terminate)
        with pytest.raises(InterruptedRunError):
            train(tiny(tmp_path, *flags))
        assert (tmp_path / "checkpoints" / "step-000000001").is_dir()

    def test_ctrl_c_saves_as_well(self, whole, tmp_path, monkeypatch):
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(InterruptedRunError, match=r"by Ctrl-C after step 2 of epoch 2; the run is saved"):
                train(tiny(tmp_path, *FLAGS))
        assert (tmp_path / "checkpoints" / "step-000000005").is_dir()
        assert signal.getsignal(signal.SIGINT) == handler
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert_same_end(whole, tmp_path)

    def test_a_second_ctrl_c_ends_at_once(self, tmp_path, monkeypatch):
        def twice() -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        before_step(monkeypatch, 1, twice)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path, *FLAGS))

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_exit_code_is_the_signals(self, tmp_path, monkeypatch, capsys, number, code):
        before_step(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
        (tmp_path / "recipe.yaml").write_text(tiny(tmp_path / "run", *FLAGS).to_yaml())
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == code
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "the run is saved, go on with --resume=true" in error

    def test_the_command_says_so_and_exits_as_a_shell_expects(self, tmp_path, monkeypatch, capsys):
        before_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        recipe = tiny(tmp_path / "run", *FLAGS)
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 143
        assert "the run is saved" in capsys.readouterr().err


class TestBrokenCheckpoints:
    def test_a_truncated_one_gives_way_to_the_one_before(self, whole, tmp_path, monkeypatch, capsys):
        kill(monkeypatch, tmp_path, 7)
        newest = tmp_path / "checkpoints" / "step-000000006" / "tensors.pt"
        os.truncate(newest, newest.stat().st_size // 2)
        capsys.readouterr()
        train(tiny(tmp_path, *FLAGS, "--resume=true"))
        out = capsys.readouterr().out
        assert "step-000000006 is not whole" in out
        assert "resumed after step 4" in out
        assert_same_end(whole, tmp_path)

    def test_if_none_is_whole_the_run_is_not_silently_begun_anew(self, tmp_path, monkeypatch):
        kill(monkeypatch, tmp_path, 3)
        for path in (tmp_path / "checkpoints").glob("*/tensors.pt"):
            path.write_bytes(b"")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=r"none of the \d checkpoint\(s\) in .* is whole; .*--overwrite=true"):
            train(tiny(tmp_path, *FLAGS, "--resume=true"))
        assert contents(tmp_path) == before

    def test_a_finished_run_without_any_is_not_cleared_away(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
        before = contents(tmp_path / "run")
        with pytest.raises(FileExistsError, match=r"holds a run without checkpoints, .*--overwrite=true"):
            train(tiny(tmp_path / "run", *FLAGS, "--resume=true"))
        assert contents(tmp_path / "run") == before


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--optim.lr=0.05"], r"by another recipe: optim.lr \(0.1 -> 0.05\); resume it with its own recipe.yaml"),
            (["--model.layer=null"], r"by another recipe: model.layer \(fsr -> None\)"),
            (["--objective.args.at.label_smoothing=0.1"], r"objective.args"),
        ],
    )
    def test_is_not_resumed(self, whole, flags, message):
        before = contents(whole)
        with pytest.raises(ValueError, match=message):
            train(tiny(whole, *FLAGS, "--resume=true", *flags))
        assert contents(whole) == before

    def test_nor_with_other_images(self, whole, tmp_path, monkeypatch):
        original = timm_fsr.training.options.DataOptions.build

        def turned(self: Any, **kwargs: Any) -> Any:
            data, held_out = original(self, **kwargs)
            return data.take(torch.arange(len(data)).flip(0)), held_out

        monkeypatch.setattr(timm_fsr.training.options.DataOptions, "build", turned)
        with pytest.raises(ValueError, match=r"other training images \(by fingerprint\)"):
            train(tiny(whole, *FLAGS, "--resume=true"))

    def test_but_the_number_held_out_may_be_left_to_what_it_was(self, whole, tmp_path, monkeypatch):
        """As by a recipe that took 1,000 images without naming them, when that was the default."""
        copied = shutil.copytree(whole, tmp_path / "run")
        monkeypatch.setattr(Trainer, "take_step", lambda *_, **__: pytest.fail("it trained again"))
        train(tiny(copied, *FLAGS, "--resume=true", "--data.held_out=null"))
        assert "held_out: 20" in (copied / "recipe.yaml").read_text()

    def test_but_another_final_evaluation_is_no_other_run(self, whole, tmp_path, monkeypatch):
        copied = shutil.copytree(whole, tmp_path / "run")  # the other tests compare with the run as it was
        monkeypatch.setattr(Trainer, "take_step", lambda *_, **__: pytest.fail("it trained again"))
        train(tiny(copied, *FLAGS, "--resume=true", "--evaluation.attacks=[pgd2]"))
        found = list(Report.load(copied / "report.json").correct)
        assert found == ["clean", "pgd2", "fgsm"], "what an earlier evaluation found of these images stays"
