"""The gradient scaler of fp16, on a CPU, where Accelerate makes none: overflows are skipped, counted and outlived."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.runs import Killed, before_step, equal, metrics, poisoned, same_values, tiny, to_nan, weights

import timm_fsr.training.accelerator
import timm_fsr.training.trainer
from timm_fsr.training.objectives.base import LossTerms
from timm_fsr.training.trainer import train

OVERFLOWS = 2.0**127  # float32 ends at 2^128, and the tests' losses are large
FLAGS = ["--model.layer=null", "--data.limit_train=148", "--optim.epochs=2", "--evaluation.attacks=[]"]


@pytest.fixture(autouse=True)
def _scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    use_scale(monkeypatch, OVERFLOWS)


def use_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    def scaling_accelerator(**kwargs: Any) -> Accelerator:
        accelerator = Accelerator(**kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        return accelerator

    monkeypatch.setattr(timm_fsr.training.accelerator, "Accelerator", scaling_accelerator)


def enlarge(terms: LossTerms) -> None:
    terms["adversarial"] = terms["adversarial"] * 6


def run(output: Path, *flags: str) -> list[dict[str, float]]:
    train(tiny(output, *FLAGS, *flags))
    return metrics(output)


@pytest.mark.parametrize("flags", [[], ["--optim.clip_grad=1"], ["--optim.accumulate=2", "--optim.nonfinite=skip"]])
def test_the_scale_is_lowered_until_gradients_fit(tmp_path, monkeypatch, flags):
    """Also where the recipe says that a NaN stops the run: these are none of its doing."""
    poisoned(monkeypatch, set(range(100)), enlarge)
    first, second = run(tmp_path, *flags, "--optim.lr=1e-3")
    assert 0 < first["skipped_steps"] < 4
    assert "skipped_steps" not in second
    assert all(math.isfinite(value) for line in (first, second) for value in line.values())
    state = torch.load(tmp_path / "checkpoints/step-000000008/tensors.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0 ** (127 - first["skipped_steps"])
    passes = 2 if "--optim.accumulate=2" in flags else 1
    assert int(weights(tmp_path / "last")["bn1.num_batches_tracked"]) == passes * (8 - first["skipped_steps"])


def test_a_scaled_run_computes_what_an_unscaled_one_does(tmp_path, monkeypatch):
    use_scale(monkeypatch, 2.0**10)
    run(tmp_path / "scaled")
    monkeypatch.setattr(timm_fsr.training.accelerator, "Accelerator", Accelerator)
    run(tmp_path / "plain")
    assert equal(weights(tmp_path / "scaled" / "last"), weights(tmp_path / "plain" / "last"))


@pytest.mark.parametrize("clip", ["null", "1"])
def test_a_loss_of_nan_is_skipped_and_the_next_step_is_taken(tmp_path, monkeypatch, clip):
    use_scale(monkeypatch, 2.0**10)
    poisoned(monkeypatch, {1}, to_nan)
    first, second = run(tmp_path, "--optim.nonfinite=skip", f"--optim.clip_grad={clip}")
    assert first["skipped_steps"] == 1
    assert "skipped_steps" not in second


def test_a_loss_of_nan_stops_the_run_that_is_to_stop(tmp_path, monkeypatch):
    use_scale(monkeypatch, 2.0**10)
    poisoned(monkeypatch, {1}, to_nan)
    with pytest.raises(FloatingPointError, match="step 2 of epoch 1"):
        run(tmp_path)


def test_gradients_that_never_fit_end_the_run_instead_of_training_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_fsr.training.trainer, "MOST_SKIPPED", 1)
    poisoned(monkeypatch, set(range(100)), enlarge)
    with pytest.raises(FloatingPointError, match="step 1 of epoch 1"):
        run(tmp_path)


def test_the_scale_is_resumed(tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(100)), enlarge)
    run(tmp_path / "whole", "--optim.lr=1e-3")

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        before_step(patch, 6, die)
        with pytest.raises(Killed):
            run(tmp_path / "killed", "--optim.lr=1e-3")
    run(tmp_path / "killed", "--optim.lr=1e-3", "--resume=true")
    last = "checkpoints/step-000000008"
    folders = (tmp_path / "whole" / last, tmp_path / "killed" / last)
    assert same_values(*(torch.load(folder / "tensors.pt", weights_only=True) for folder in folders))
    assert len({json.loads((folder / "values.json").read_text())["progress"]["step"] for folder in folders}) == 1
