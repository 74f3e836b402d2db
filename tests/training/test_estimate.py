"""`train --dry-run`: what a run would take and write, without writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.runs import TINY, tiny
from torch import Tensor

import timm_fsr
import timm_fsr.evaluation.estimate
import timm_fsr.training.estimate
from timm_fsr.cli.main import main
from timm_fsr.training.estimate import RunEstimate, estimate


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (timm_fsr.training.estimate, timm_fsr.evaluation.estimate):
        monkeypatch.setattr(module, "SECONDS", 0.0)


def estimated(folder: Path, *flags: str) -> RunEstimate:
    return estimate(tiny(folder, *flags), Console(quiet=True))


class TestEstimate:
    def test_it_knows_the_run_and_times_each_part(self, tmp_path, monkeypatch):
        radii = []
        original = timm_fsr.PGD.__call__

        def attack(pgd: timm_fsr.PGD, *args: Any, **given: Any) -> Tensor:
            radii.append(pgd.eps)
            return original(pgd, *args, **given)

        monkeypatch.setattr(timm_fsr.PGD, "__call__", attack)
        flags = ["--evaluation.attacks=[fgsm,pgd5]", "--optim.epochs=3", "--attack.warmup_epochs=2"]
        found = estimated(tmp_path / "run", *flags)
        assert (found.steps, found.validations, found.test_images, found.timed) == (9, 3, 20, 3)
        assert min(found.step, found.validation, found.saving) > 0
        expected = 9 * found.step + 3 * found.validation + 3 * found.saving
        assert found.training_seconds == pytest.approx(expected)
        assert [(one.name, one.likely == one.most) for one in found.attacks] == [("fgsm", True), ("pgd5", True)]
        assert not (tmp_path / "run").exists()
        assert set(radii) == {0.1}, "not the 0 of a warm-up's first step, at which there is nothing to do"

    def test_the_checkpoint_and_the_model_have_the_size_that_they_will_have(self, tmp_path):
        found = estimated(tmp_path / "run")
        timm_fsr.train(tiny(tmp_path / "run", "--evaluation.attacks=[]"))
        newest = max((tmp_path / "run" / "checkpoints").iterdir())
        assert found.checkpoint == pytest.approx((newest / "tensors.pt").stat().st_size, rel=0.02)
        saved = (tmp_path / "run" / "last" / "model.safetensors").stat().st_size
        assert found.model == pytest.approx(saved, rel=0.05)

    def test_weight_perturbation_counts_for_its_epochs(self, tmp_path, monkeypatch):
        epochs = []
        monkeypatch.setattr(
            timm_fsr.training.estimate,
            "_timed",
            lambda _, epoch: epochs.append(epoch) or ((1.0, 5) if epoch == 0 else (3.0, 5)),
        )
        found = estimated(tmp_path / "run", "--optim.awp_gamma=0.01", "--optim.awp_start=1", "--optim.epochs=4")
        assert epochs == [0, 1]
        assert found.step == (1 * 1.0 + 3 * 3.0) / 4


class TestCommand:
    def test_it_prints_hours_memory_and_files_and_writes_nothing(self, tmp_path, capsys):
        pytest.importorskip("pyautoattack")
        flags = [*TINY, f"--output={tmp_path / 'run'}", "--evaluation.attacks=[standard]"]
        assert main(["train", *flags, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for text in (
            "100 of 1x28x28, 10 classes",
            "2 epochs of 3 steps of 32 images: 6",
            "images/s",
            "final autoattack  at most",
            "together          at most",
            "peak memory",
            f"{tmp_path / 'run'}/: recipe.yaml",
            "checkpoints/",
        ):
            assert text in printed
        assert not list(tmp_path.iterdir())

    def test_it_refuses_what_the_run_would_refuse(self, tmp_path, capsys):
        (tmp_path / "metrics.jsonl").write_text("")
        assert main(["train", *TINY, f"--output={tmp_path}", "--dry-run"]) == 2
        assert "holds a training run" in capsys.readouterr().err

    def test_help_has_it(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--help"])
        assert "--dry-run" in capsys.readouterr().out
