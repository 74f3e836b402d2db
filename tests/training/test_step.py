"""One optimisation step: what is accumulated, clipped, averaged, and what happens to a NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.runs import equal, metrics, poisoned, tiny, to_nan, weights
from torch import Tensor, nn

import timm_fsr.training.prepare
import timm_fsr.training.trainer
import timm_fsr.training.validation
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.base import LossTerms
from timm_fsr.training.trainer import Trainer, train

ONE_STEP = ["--optim.epochs=1", "--data.limit_train=52", "--evaluation.attacks=[]", "--evaluation.validation_steps=1"]
PLAIN = [*ONE_STEP, "--model.layer=null"]


def fresh(output: Path, *flags: str) -> nn.Module:
    recipe = tiny(output, *flags)
    side = recipe.data.size or 28
    torch.manual_seed(0)
    return recipe.model.build(num_classes=10, image_size=(1, side, side))


def trained(output: Path, *flags: str) -> dict[str, Tensor]:
    train(tiny(output, *flags))
    return weights(output / "last")


def moves(output: Path, *flags: str) -> dict[str, Tensor]:
    """How far one step without momentum or decay moved each parameter: -lr * gradient."""
    after = trained(output, *flags, "--optim.momentum=0", "--optim.weight_decay=0")
    before = dict(fresh(output, *flags).named_parameters())
    return {name: after[name] - value.detach() for name, value in before.items()}


class TestGradients:
    def test_a_divided_batch_has_the_gradient_of_the_whole(self, tmp_path):
        """Natural training of a network without BatchNorm: the parts then know nothing of each other."""
        flags = [*PLAIN, "--model.name=vit_tiny_patch4_32", "--objective.name=natural", "--data.size=32"]
        flags += ["--model.args={depth: 1, embed_dim: 24, num_heads: 2}", "--channels_last=false"]
        whole, divided = (moves(tmp_path / str(n), *flags, f"--optim.accumulate={n}") for n in (1, 4))
        assert max(float(value.abs().max()) for value in whole.values()) > 1e-3
        for name, value in whole.items():
            torch.testing.assert_close(divided[name], value, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    def test_the_launcher_has_no_say_in_it(self, tmp_path, monkeypatch):
        """`accelerate launch` sets this variable to 1 whatever the script wants, and Accelerate prefers it."""
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        parts: list[int] = []
        original = AT.terms

        def spy(self: AT, *args: Any) -> LossTerms:
            parts.append(len(args[2]))
            return original(self, *args)

        monkeypatch.setattr(AT, "terms", spy)
        steps: list[None] = []
        monkeypatch.setattr(torch.optim.SGD, "step", lambda *_, **__: steps.append(None))
        trained(tmp_path, *PLAIN, "--optim.accumulate=2")
        assert parts == [16, 16]
        assert len(steps) == 1

    def test_clipping_scales_the_whole_gradient_to_the_given_norm(self, tmp_path):
        free, clipped = (moves(tmp_path / str(clip), *PLAIN, f"--optim.clip_grad={clip}") for clip in ("null", 0.25))
        norm = torch.cat([value.flatten() for value in free.values()]).norm() / 0.1  # the learning rate
        assert norm > 0.5
        for name, value in free.items():
            torch.testing.assert_close(clipped[name], value * 0.25 / norm, rtol=1e-3, atol=1e-6)

    def test_gradient_checkpointing_changes_nothing(self, tmp_path):
        """Not even BatchNorm's running statistics, though the forward pass runs twice."""
        flags = [*ONE_STEP, "--model.layer_args.fsr.noise=true"]
        one, other = (trained(tmp_path / on, *flags, f"--gradient_checkpointing={on}") for on in ("false", "true"))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)

    def test_a_model_without_it_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"Linear has no gradient checkpointing in timm; leave out"):
            timm_fsr.training.prepare._checkpoint_gradients(nn.Linear(1, 1))


class TestCompiled:
    def test_compiled_training_computes_the_same(self, tmp_path):
        """By a backend that traces and differentiates, but generates no code."""
        plain, compiled = (trained(tmp_path / b, *ONE_STEP, f"--compile={b}") for b in ("null", "aot_eager"))
        for name in plain:
            torch.testing.assert_close(plain[name], compiled[name], rtol=1e-3, atol=1e-4)

    def test_what_cannot_be_compiled_is_an_error_not_a_silent_fallback(self, tmp_path, monkeypatch):
        monkeypatch.setattr(timm_fsr.training.prepare, "_COMPILED_VARIANTS", 1)
        with pytest.raises(Exception, match="recompile"):
            trained(tmp_path, *ONE_STEP, "--compile=eager")

    def test_nor_where_compilation_is_switched_off(self, tmp_path):
        refused = pytest.raises(ValueError, match=r"compile=eager was asked for, but torch.compile is switched off")
        with torch._dynamo.config.patch(disable=True), refused:  # pytest's monkeypatch would delete the setting after
            trained(tmp_path / "new", *ONE_STEP, "--compile=eager")
        assert not (tmp_path / "new").exists()


class TestAverage:
    def test_its_warm_up_follows_the_rule_of_timm(self, tmp_path):
        """Decay 1 - k^(-2/3) in step k: 0 in the first step, 0.37 in the second."""
        flags = ["--optim.epochs=1", "--evaluation.attacks=[]", "--model.layer=null"]
        warm = trained(
            tmp_path / "warm", *flags, "--data.limit_train=84", "--optim.ema_decay=0.9", "--optim.ema_warmup=true"
        )
        seen: list[dict[str, Tensor]] = []
        original = Trainer.take_step

        def spy(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            original(trainer, *args, **kwargs)
            seen.append({name: value.detach().clone() for name, value in trainer.timm_model.named_parameters()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "take_step", spy)
            trained(tmp_path / "plain", *flags, "--data.limit_train=84")
        assert len(seen) == 2
        decay = 1 - 2 ** (-2 / 3)
        for name, first in seen[0].items():
            torch.testing.assert_close(warm[name], decay * first + (1 - decay) * seen[1][name])


class TestEps:
    def test_it_rises_during_the_warm_up_and_validation_uses_the_full_one(self, tmp_path, monkeypatch):
        used: list[float] = []
        craft = AT.craft

        def spy(self: AT, model: Any, attack: Any, *args: Any, **kwargs: Any) -> Tensor:
            used.append(attack.eps)
            return craft(self, model, attack, *args, **kwargs)

        monkeypatch.setattr(AT, "craft", spy)
        validated: list[float] = []
        evaluate = timm_fsr.training.validation.evaluate
        monkeypatch.setattr(
            timm_fsr.training.validation, "evaluate", lambda *a, **k: validated.append(k["eps"]) or evaluate(*a, **k)
        )
        trained(tmp_path, "--attack.warmup_epochs=1.5", "--evaluation.attacks=[]", "--model.layer=null")
        assert used == pytest.approx([0, 0.1 / 4.5, 0.2 / 4.5, 0.3 / 4.5, 0.4 / 4.5, 0.1])
        assert validated == [0.1, 0.1]


class TestNotFinite:
    def test_stopping_leaves_the_state_before_the_step(self, tmp_path, monkeypatch):
        poisoned(monkeypatch, {4}, to_nan)
        message = r"became NaN or infinite in step 2 of epoch 2; the state before it is saved\. Go on with --resume"
        with pytest.raises(FloatingPointError, match=message):
            train(tiny(tmp_path, "--evaluation.attacks=[]"))
        state = torch.load(tmp_path / "checkpoints/step-000000004/tensors.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())
        assert len(metrics(tmp_path)) == 1
        train(tiny(tmp_path, "--evaluation.attacks=[]", "--resume=true", "--optim.nonfinite=skip"))
        assert len(metrics(tmp_path)) == 2, "it can go on from there"

    def test_skipping_leaves_no_trace_of_the_step(self, tmp_path, monkeypatch, capsys):
        """Neither in weights nor in BatchNorm's running statistics, momentum or metrics."""
        poisoned(monkeypatch, {0}, to_nan)
        flags = ["--optim.epochs=1", "--data.limit_train=52", "--evaluation.attacks=[]", "--optim.nonfinite=skip"]
        train(tiny(tmp_path, *flags))
        lines = metrics(tmp_path)
        assert lines[0]["skipped_steps"] == 1
        assert "loss.adversarial" not in lines[0]
        assert "the step is skipped" in capsys.readouterr().out
        assert equal(dict(fresh(tmp_path).state_dict()), weights(tmp_path / "last"))

    def test_the_other_steps_count(self, tmp_path, monkeypatch):
        poisoned(monkeypatch, {1}, to_nan)
        train(tiny(tmp_path, "--optim.nonfinite=skip", "--evaluation.attacks=[]"))
        first, second = metrics(tmp_path)
        assert first["skipped_steps"] == 1
        assert "skipped_steps" not in second
        assert all(math.isfinite(value) for line in (first, second) for value in line.values())
        assert 1 < first["loss.adversarial"] < 4, "a mean over the steps that were taken"

    def test_too_many_in_a_row_stop_all_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(timm_fsr.training.trainer, "MOST_SKIPPED", 3)
        poisoned(monkeypatch, {1, 2, 3}, to_nan)
        with pytest.raises(FloatingPointError, match=r"in step 1 of epoch 2"):
            train(tiny(tmp_path, "--optim.nonfinite=skip", "--evaluation.attacks=[]"))

    def test_an_infinite_gradient_of_a_finite_loss_counts(self, tmp_path, monkeypatch):
        def explode(terms: LossTerms) -> None:
            value = terms["adversarial"]
            terms["adversarial"] = value + 0 * (value - value.detach()).abs().sqrt()  # 0 * an infinite slope

        poisoned(monkeypatch, {0}, explode)
        with pytest.raises(FloatingPointError, match=r"the loss or its gradient became NaN"):
            train(tiny(tmp_path, *ONE_STEP))

    def test_a_rate_that_explodes_leaves_whole_models(self, tmp_path):
        """The second epoch's rate is 10^29 times the first's."""
        flags = ["--optim.schedule=step", "--optim.milestones=[1]", "--optim.gamma=1e30", "--optim.epochs=3"]
        with pytest.raises(FloatingPointError, match=r"of epoch 2; the state before it is saved"):
            train(tiny(tmp_path, *flags))
        assert len(metrics(tmp_path)) == 1
        for kind in ("best", "last"):
            model = timm.create_model(f"local-dir:{tmp_path / kind}", pretrained=True).eval()
            assert all(value.isfinite().all() for value in model.state_dict().values())
            assert model(torch.zeros(1, 1, 28, 28)).isfinite().all()
