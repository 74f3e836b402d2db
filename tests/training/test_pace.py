"""How long the rest of a run takes, by what has been timed, and what the bars say of it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import equal, tiny, weights
from torch import Tensor

import timm_fsr.utils.progress
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.pace import Pace, training_passes, validation_passes
from timm_fsr.training.trainer import Trainer


def pace(steps_done: int, *, seconds: float = 2.0, epochs: int = 10, every: int = 3, expected: float = 4.0) -> Pace:
    """Ten steps an epoch."""
    made = Pace(steps=10, epochs=epochs, validate_every=every, expected=expected)
    for step in range(steps_done + 1):
        made.step(seconds, step)
    return made


class TestPace:
    def test_nothing_is_known_after_one_step(self):
        """The first one has much to make ready."""
        assert pace(0).run_left(0, 1) is None
        assert pace(0).share(0, 1) == 0.01

    def test_an_epoch_without_validation_takes_its_steps_and_its_end(self):
        found = pace(4)
        found.saving = 1.0
        assert found.epoch_left(0, 4) == 6 * 2 + 1

    def test_an_epoch_with_validation_takes_that_too(self):
        found = pace(24)
        assert found.epoch_left(2, 4) == 6 * 2 + 4 * 2, "as long as four steps, until it is timed"
        found.validation = 30.0
        assert found.epoch_left(2, 4) == 6 * 2 + 30
        assert found.epoch_left(2, 10, validated=True) == 0

    def test_the_run_has_all_validations_and_checkpoints_that_are_due(self):
        found = pace(4)
        found.validation, found.saving = 30.0, 1.0
        assert found.run_left(0, 0) == 10 * (10 * 2 + 1) + 4 * 30, "after epochs 3, 6, 9 and 10"
        assert found.run_left(9, 10, validated=True) == 1

    @pytest.mark.parametrize(("epochs", "every", "validations"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (2, 5, 1)])
    def test_the_last_epoch_is_always_validated(self, epochs, every, validations):
        found = pace(4, epochs=epochs, every=every)
        found.validation = 1000.0
        assert found.run_left(0, 0) == 1000 * validations + 20 * epochs

    def test_what_has_become_slower_counts_by_its_recent_speed(self):
        """As with weight perturbation from an epoch on, or after a resumption on another machine."""
        found = pace(50)
        for step in range(51, 80):
            found.step(6.0, step)
        assert found.seconds_per_step == 6.0

    def test_the_share_is_one_of_time(self):
        found = pace(4, epochs=2, every=1)
        found.validation = 20.0
        assert found.share(0, 10) == pytest.approx(20 / 80)
        assert found.share(0, 10, validated=True) == pytest.approx(40 / 80)


class TestPasses:
    def test_they_are_those_of_attack_and_objective(self, tmp_path):
        def of(*flags: str) -> float:
            return training_passes(tiny(tmp_path, "--attack.steps=5", *flags))

        assert of() == 13
        assert of("--objective.name=trades") == 17
        assert of("--objective.name=natural") == 3
        assert of("--attack.name=fgsm", "--attack.steps=null") == 5
        assert validation_passes(tiny(tmp_path, "--evaluation.validation_steps=10")) == 22


def trained(folder: Path, console: Console, **of: str) -> Trainer:
    recipe = tiny(folder, "--evaluation.attacks=[]", "--optim.epochs=1", *(f"--{k}={v}" for k, v in of.items()))
    trainer = Trainer.prepare(recipe, build_accelerator(recipe), console)
    trainer.fit()
    return trainer


class TestRun:
    def test_what_is_shown_changes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(timm_fsr.utils.progress, "DRAW_EVERY", 0.0)
        file = io.StringIO()
        trained(tmp_path / "shown", Console(file=file, force_terminal=True, width=80))
        trained(tmp_path / "quiet", Console(quiet=True))
        assert equal(weights(tmp_path / "shown" / "last"), weights(tmp_path / "quiet" / "last"))
        for text in (r"epoch 1/1 ", r"epoch 1/1: validation \(PGD-2\)", r"all 1 epochs", r"images/s, loss \d"):
            assert re.search(text, file.getvalue())

    @pytest.mark.parametrize(("terminal", "looks"), [(True, [1, 3, 3]), (False, [3])])
    def test_metrics_are_read_only_where_they_are_shown(self, tmp_path, monkeypatch, terminal, looks):
        """A device would have to wait: on a terminal after the first and the last of three steps, and for the log."""
        monkeypatch.setattr(timm_fsr.utils.progress, "DRAW_EVERY", 1000.0)
        means, seen = Trainer._means, []

        def look(trainer: Trainer, sums: dict[str, Tensor]) -> dict[str, float]:
            seen.append(trainer.progress.step)
            return means(trainer, sums)

        monkeypatch.setattr(Trainer, "_means", look)
        trained(tmp_path, Console(file=io.StringIO(), force_terminal=terminal))
        assert seen == looks
