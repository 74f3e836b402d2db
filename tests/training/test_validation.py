"""Validation on held-out images: what is measured, and when it ends a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.runs import before_step, contents, equal, metrics, tiny, weights
from torch import Tensor, nn

import timm_fsr.training.validation
from timm_fsr.reports.report import Report
from timm_fsr.training.trainer import Trainer, train

# One step per epoch and 20 held-out images.
SHORT = ["--data.limit_train=52", "--model.layer=null", "--evaluation.validation_steps=2"]
WITHOUT_REPORT = [*SHORT, "--evaluation.attacks=[]"]
EPS = 0.01

CLEAN, ROBUST, ONE_STEP = (f"held_out.{kind}_accuracy" for kind in ("clean", "robust", "one_step"))


def made_undecided(trainer: Trainer) -> None:
    """Let the model see several classes in the held-out images, by small margins, and be wrong about five of them."""
    images = trainer.held_out.images.float() / 255
    model: Any = trainer.judged.eval()
    with torch.no_grad():
        model.fc.bias -= model(images).mean(dim=0)
        labels = model(images).argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % 10
    trainer.held_out = dataclasses.replace(trainer.held_out, labels=labels)


def validated(monkeypatch: pytest.MonkeyPatch, output: Path, *flags: str) -> tuple[Trainer, dict[str, float]]:
    """The trainer at its only validation, and what that finds."""
    found: list[tuple[Trainer, dict[str, float]]] = []
    validate = Trainer.validate

    def spy(trainer: Trainer) -> dict[str, float]:
        made_undecided(trainer)
        found.append((trainer, validate(trainer)))
        return found[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", spy)
        train(tiny(output, *WITHOUT_REPORT, "--optim.epochs=1", f"--attack.eps={EPS}", *flags))
    return found[0]


def one_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels, reduction="sum"), images)
    return (images.detach() + EPS * gradient.sign()).clamp(0, 1)


class TestWhatIsMeasured:
    def test_the_accuracies_are_those_of_the_judged_model_on_the_held_out_images(self, tmp_path, monkeypatch):
        run, found = validated(monkeypatch, tmp_path, "--attack.name=fgsm", "--attack.steps=null")
        model, labels = run.judged.eval(), run.held_out.labels
        images = run.held_out.images.float() / 255
        assert found[CLEAN] == 15 / 20
        moved = one_step(model, images, labels)
        assert found[ONE_STEP] == int((model(moved).argmax(dim=1) == labels).sum()) / 20
        assert 0 < found[ONE_STEP] < found[CLEAN], "the attack has changed some, not all"
        assert 0 < found[ROBUST] <= found[CLEAN]

    @pytest.mark.parametrize(
        ("flags", "names"),
        [
            (["--attack.steps=2"], {CLEAN, ROBUST}),
            (["--attack.steps=1"], {CLEAN, ROBUST, ONE_STEP}),
            (["--attack.name=n_fgsm", "--attack.steps=null"], {CLEAN, ROBUST, ONE_STEP}),
            (["--attack.name=fgsm_rs", "--attack.steps=1"], {CLEAN, ROBUST, ONE_STEP}),
            (["--attack.steps=1", "--evaluation.overfitting_alarm=false"], {CLEAN, ROBUST}),
        ],
        ids=["pgd", "pgd of one step", "n_fgsm", "fgsm_rs", "alarm off"],
    )
    def test_the_one_step_accuracy_belongs_to_one_step_training(self, tmp_path, monkeypatch, flags, names):
        _, found = validated(monkeypatch, tmp_path, *flags)
        assert found.keys() == names
        assert {key for key in metrics(tmp_path)[0] if key.startswith("held_out.")} == names

    def test_norm_size_steps_and_seed_are_the_recipes(self, tmp_path, monkeypatch):
        asked: list[dict[str, Any]] = []
        evaluate = timm_fsr.training.validation.evaluate

        def spy(model: nn.Module, data: Any, **options: Any) -> Report:
            asked.append({name: value for name, value in options.items() if name != "progress"})
            return evaluate(model, data, **options)

        monkeypatch.setattr(timm_fsr.training.validation, "evaluate", spy)
        flags = ["--attack.norm=l2", "--evaluation.validation_steps=3", "--seed=4"]
        validated(monkeypatch, tmp_path, *flags)
        assert asked == [{"norm": "l2", "eps": EPS, "attacks": ["pgd3"], "seed": 4}]

    def test_the_average_is_what_is_judged(self, tmp_path, monkeypatch):
        run, _ = validated(monkeypatch, tmp_path, "--optim.ema_decay=0.5")
        assert run.judged is run.ema.module
        assert not torch.equal(run.judged.state_dict()["fc.weight"], run.timm_model.state_dict()["fc.weight"])

    def test_validating_leaves_the_model_alone(self, tmp_path, monkeypatch):
        run, _ = validated(monkeypatch, tmp_path)
        before = {name: value.clone() for name, value in run.timm_model.state_dict().items()}
        run.timm_model.train()
        run.validate()
        assert equal(before, dict(run.timm_model.state_dict()))
        assert all(module.training for module in run.timm_model.modules())
        assert run.validate() == run.validate(), "the same starts each time"


def scripted(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float | None]], clean: float = 0.6
) -> list[dict[str, Tensor]]:
    """Let validations find these (robust, one-step) accuracies; gives the weights that they saw."""
    seen: list[dict[str, Tensor]] = []

    def validate(trainer: Trainer) -> dict[str, float]:
        robust, single = found[len(seen)]
        seen.append({key: value.clone() for key, value in trainer.judged.state_dict().items()})
        metrics = {CLEAN: clean, ROBUST: robust}
        return metrics if single is None else {**metrics, ONE_STEP: single}

    monkeypatch.setattr(Trainer, "validate", validate)
    return seen


COLLAPSE: list[tuple[float, float | None]] = [(0.40, 0.50), (0.45, 0.55), (0.05, 0.90)]


class TestCollapse:
    def test_the_run_ends_with_the_best_model_and_says_why(self, tmp_path, monkeypatch, capsys):
        seen = scripted(monkeypatch, COLLAPSE)
        model = train(tiny(tmp_path, *SHORT, "--optim.epochs=6"))
        assert [line[ROBUST] for line in metrics(tmp_path)] == [0.40, 0.45, 0.05]
        out = capsys.readouterr().out
        reason = (
            "stopped after epoch 3: catastrophic overfitting: PGD accuracy fell from 45.0 % in epoch 2 to 5.0 %, while "
            "that under one step rose to 90.0 %; lower attack.eps, or try attack.name=n_fgsm"
        )
        assert out.count(reason) == 1
        assert equal(dict(model.state_dict()), seen[1])
        assert equal(weights(tmp_path / "best"), seen[1])
        assert equal(weights(tmp_path / "last"), seen[2])
        for folder in (tmp_path, tmp_path / "best"):
            assert Report.load(folder / "report.json").conditions["checkpoint_epoch"] == 2

    def test_it_does_not_go_on_when_resumed(self, tmp_path, monkeypatch, capsys):
        scripted(monkeypatch, COLLAPSE)
        train(tiny(tmp_path, *SHORT, "--optim.epochs=6"))
        before = {name: data for name, data in contents(tmp_path).items() if name != "training.png"}
        capsys.readouterr()
        for name in ("take_step", "validate"):
            monkeypatch.setattr(Trainer, name, lambda *_, **__: pytest.fail("it went on"))
        train(tiny(tmp_path, *SHORT, "--optim.epochs=6", "--resume=true"))
        after = {name: data for name, data in contents(tmp_path).items() if name != "training.png"}
        assert after == before
        assert "stopped after epoch 3: catastrophic overfitting" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "found",
        [
            [(0.40, None), (0.45, None), (0.05, None)],
            [(0.40, 0.50), (0.45, 0.95), (0.05, 0.90)],
            [(0.40, 0.50), (0.45, 0.55), (0.25, 0.90)],
        ],
        ids=["not measured", "one step fell too", "more than half is left"],
    )
    def test_anything_less_is_none(self, tmp_path, monkeypatch, capsys, found):
        scripted(monkeypatch, found)
        train(tiny(tmp_path, *WITHOUT_REPORT, "--optim.epochs=3"))
        assert len(metrics(tmp_path)) == 3
        assert "stopped" not in capsys.readouterr().out

    def test_it_is_the_reason_that_is_told_where_patience_ends_too(self, tmp_path, monkeypatch, capsys):
        scripted(monkeypatch, COLLAPSE)
        train(tiny(tmp_path, *WITHOUT_REPORT, "--optim.epochs=6", "--evaluation.patience=1"))
        assert "stopped after epoch 3: catastrophic overfitting" in capsys.readouterr().out


class TestPatience:
    def test_it_ends_after_so_many_validations_without_a_better_one(self, tmp_path, monkeypatch, capsys):
        seen = scripted(monkeypatch, [(0.2, None), (0.3, None), (0.1, None), (0.3, None)])
        model = train(tiny(tmp_path, *SHORT, "--optim.epochs=9", "--evaluation.patience=2"))
        assert len(metrics(tmp_path)) == 4
        assert "stopped after epoch 4: no better checkpoint in 2 validation(s)" in capsys.readouterr().out
        assert equal(dict(model.state_dict()), seen[1])
        assert Report.load(tmp_path / "report.json").conditions["checkpoint_epoch"] == 2

    def test_it_counts_validations_not_epochs(self, tmp_path, monkeypatch):
        scripted(monkeypatch, [(0.3, None), (0.2, None)])
        flags = ["--optim.epochs=9", "--evaluation.patience=1", "--evaluation.validate_every=2"]
        train(tiny(tmp_path, *WITHOUT_REPORT, *flags))
        assert [ROBUST in line for line in metrics(tmp_path)] == [False, True, False, True]

    def test_a_run_that_gets_better_in_time_goes_on(self, tmp_path, monkeypatch, capsys):
        scripted(monkeypatch, [(0.2, None), (0.1, None), (0.3, None), (0.2, None)])
        train(tiny(tmp_path, *WITHOUT_REPORT, "--optim.epochs=4", "--evaluation.patience=2"))
        assert len(metrics(tmp_path)) == 4
        assert "stopped" not in capsys.readouterr().out

    def test_it_counts_on_when_resumed(self, tmp_path, monkeypatch):
        """The run is killed after its first validation without a better one."""
        seen = scripted(monkeypatch, [(0.3, None), (0.2, None), (0.1, None)])

        def die() -> None:
            raise KeyboardInterrupt

        flags = [*WITHOUT_REPORT, "--optim.epochs=9", "--evaluation.patience=2"]
        with monkeypatch.context() as patch:
            before_step(patch, 2, die)
            with pytest.raises(KeyboardInterrupt):
                train(tiny(tmp_path, *flags))
        train(tiny(tmp_path, *flags, "--resume=true"))
        assert len(metrics(tmp_path)) == len(seen) == 3


@pytest.mark.parametrize("held_out", [200, 20])
def test_a_model_that_answers_one_class_is_named_in_training(tmp_path, monkeypatch, capsys, held_out):
    """Of few held-out images nothing can be said."""
    validate = Trainer.validate

    def collapsed(trainer: Trainer) -> dict[str, float]:
        model: Any = trainer.judged
        with torch.no_grad():
            model.fc.bias[2] += 1000
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", collapsed)
    flags = [f"--data.held_out={held_out}", f"--data.limit_train={held_out + 32}", "--optim.epochs=1"]
    train(tiny(tmp_path, *WITHOUT_REPORT, *flags))
    name = "Pullover"
    said = (
        f"warning: validation in epoch 1: the model does not work: it answers the class '{name}' for nearly all images"
    )
    assert (said in " ".join(capsys.readouterr().out.split())) == (held_out == 200)
