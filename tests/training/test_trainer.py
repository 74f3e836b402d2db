"""Training: what a run leaves, that it can be repeated to the bit, and what stops it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from rich.console import Console
from support.runs import contents, equal, metrics, tiny, weights
from torch import Tensor, nn

import timm_fsr.training.step
from timm_fsr.data.dataset import ImageData
from timm_fsr.layers import FSR
from timm_fsr.reports.report import Report
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.objectives.base import LossTerms
from timm_fsr.training.options import DataOptions
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer, train

CHECKPOINT = ("tensors.pt", "values.json", "checksums.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """One finished run: its folder and the model that `train` returned."""
    output = tmp_path_factory.mktemp("run") / "first"
    return output, train(tiny(output))


class TestResults:
    def test_the_folder_holds_everything(self, run):
        output, _ = run
        assert set(contents(output)) == {
            *(
                f"{kind}/{file}"
                for kind in ("best", "last")
                for file in ("config.json", "model.safetensors", "modeling_timm_fsr.py")
            ),
            *(f"checkpoints/step-00000000{step}/{file}" for step in (3, 6) for file in CHECKPOINT),
            "best/report.json",
            "best/recipe.yaml",
            "evaluation/outcomes/0.jsonl",
            "report.json",
            "metrics.jsonl",
            "recipe.yaml",
            "training.png",
        }
        assert not [path for path in output.rglob("*") if path.name.startswith(".writing")]

    def test_there_is_a_line_per_epoch_with_every_loss_term(self, run):
        lines = metrics(run[0])
        assert [line["epoch"] for line in lines] == [1, 2]
        for line in lines:
            assert {"loss.adversarial", "loss.fsr.separation", "loss.fsr.recalibration"} <= set(line)
            assert {"train.robust_accuracy", "lr", "seconds"} <= set(line)
            assert all(math.isfinite(value) for value in line.values())
            assert 0 <= line["held_out.robust_accuracy"] <= line["held_out.clean_accuracy"] <= 1

    def test_the_recipe_is_written_whole(self, run):
        assert Recipe.load(run[0] / "recipe.yaml") == tiny(run[0])

    def test_the_returned_model_is_the_best_checkpoint_in_eval_mode(self, run):
        output, model = run
        assert not any(module.training for module in model.modules())
        assert equal(dict(model.state_dict()), weights(output / "best"))
        assert model.pretrained_cfg["label_names"][1] == "Trouser"
        again = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True)
        assert equal(dict(again.state_dict()), weights(output / "best"))

    def test_the_report_is_about_the_test_images_and_says_how_the_model_came_about(self, run):
        output, _ = run
        report = Report.load(output / "report.json")
        assert report.to_dict() == Report.load(output / "best" / "report.json").to_dict()
        assert report.count == 20
        assert list(report.correct) == ["clean", "fgsm"]
        assert (report.norm, report.eps) == ("linf", 0.1)
        conditions = report.conditions
        assert conditions["model"] == "resnet_tiny_cifar_fsr"
        assert "test" in conditions["data"]
        assert "train" in conditions["training_data"]
        assert "PGD-2" in conditions["checkpoint_rule"]
        assert "held-out" in conditions["checkpoint_rule"]
        assert "AT(" in conditions["training"]
        assert "steps=2" in conditions["training"]
        assert len(conditions["data_fingerprint"]) == 16

    def test_every_weight_was_trained(self, run):
        torch.manual_seed(0)
        fresh = tiny(run[0]).model.build(num_classes=10, image_size=(1, 28, 28)).state_dict()
        trained = weights(run[0] / "last")
        assert not [key for key, value in fresh.items() if torch.equal(value, trained[key])]


class TestRepeatability:
    def test_the_same_seed_gives_the_same_weights_to_the_bit(self, run, tmp_path):
        torch.manual_seed(123)
        torch.rand(7)  # what happened before must not matter
        train(tiny(tmp_path))
        for kind in ("best", "last"):
            assert equal(weights(tmp_path / kind), weights(run[0] / kind))
        one, other = (
            [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(folder)]
            for folder in (tmp_path, run[0])
        )
        assert one == other
        reports = [Report.load(folder / "report.json").to_dict() for folder in (tmp_path, run[0])]
        assert [report["conditions"].pop("training_seconds") > 0 for report in reports] == [True, True]
        assert reports[0] == reports[1]

    def test_the_report_and_the_best_model_have_the_recipe_without_its_folder(self, run):
        recipe = Report.load(run[0] / "report.json").conditions["recipe"]
        assert recipe == yaml.safe_load((run[0] / "best" / "recipe.yaml").read_text())
        whole = yaml.safe_load((run[0] / "recipe.yaml").read_text())
        assert {key: whole[key] for key in recipe} == recipe
        assert set(whole) - set(recipe) == {"output", "overwrite", "resume"}
        Recipe.load(run[0] / "best" / "recipe.yaml").check()

    def test_another_seed_gives_others(self, run, tmp_path):
        train(tiny(tmp_path, "--seed=1", "--evaluation.attacks=[]"))
        assert not torch.equal(weights(tmp_path / "last")["fc.weight"], weights(run[0] / "last")["fc.weight"])

    def test_the_memory_format_is_no_part_of_the_result(self, tmp_path):
        """But for rounding, which PGD amplifies from step to step, and for noise, drawn in memory order."""
        flags = ["--data.limit_train=60", "--optim.epochs=1", "--evaluation.attacks=[]"]
        flags += ["--model.layer_args.fsr.noise=false"]
        losses = []
        for channels_last in ("true", "false"):
            train(tiny(tmp_path / channels_last, *flags, f"--channels_last={channels_last}"))
            losses.append(metrics(tmp_path / channels_last)[0]["loss.adversarial"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_improves_the_loss(tmp_path):
    flags = ["--data.limit_train=620", "--optim.lr=0.05", "--optim.epochs=3", "--objective.name=natural"]
    train(tiny(tmp_path, *flags, "--evaluation.validate_every=3", "--evaluation.attacks=[]"))
    lines = metrics(tmp_path)
    losses = [line["loss.natural"] for line in lines]
    assert losses[2] < losses[0] - 0.3
    assert lines[2]["train.clean_accuracy"] > lines[0]["train.clean_accuracy"] + 0.1
    assert ["held_out.robust_accuracy" in line for line in lines] == [False, False, True]
    assert {line["lr"] for line in lines} == {0.05}
    assert not (tmp_path / "report.json").exists(), "attacks=[] leaves the evaluation out"


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[tuple[float, float]]) -> list[dict[str, Tensor]]:
    """Let validation find these (robust, clean) accuracies; gives the weights that it saw each time."""
    seen: list[dict[str, Tensor]] = []

    def validate(trainer: Trainer) -> dict[str, float]:
        robust, clean = accuracies[len(seen)]
        seen.append({key: value.clone() for key, value in trainer.judged.state_dict().items()})
        return {"held_out.clean_accuracy": clean, "held_out.robust_accuracy": robust}

    monkeypatch.setattr(Trainer, "validate", validate)
    return seen


class TestCheckpoints:
    def test_the_best_is_the_most_robust_then_the_most_accurate_then_the_first(self, tmp_path, monkeypatch):
        found = [(0.2, 0.9), (0.5, 0.6), (0.5, 0.7), (0.5, 0.7), (0.4, 0.9)]
        seen = scripted(monkeypatch, found)
        train(tiny(tmp_path, "--optim.epochs=5", "--data.limit_train=60", "--evaluation.attacks=[]"))
        assert [equal(weights(tmp_path / "best"), state) for state in seen] == [False, False, True, False, False]
        assert equal(weights(tmp_path / "last"), seen[4])

    def test_even_a_model_that_gets_nothing_right_is_kept(self, tmp_path, monkeypatch):
        seen = scripted(monkeypatch, [(0.0, 0.0)] * 2)
        train(tiny(tmp_path, "--evaluation.attacks=[]"))
        assert equal(weights(tmp_path / "best"), seen[0])

    def test_the_average_of_the_weights_is_what_is_saved(self, tmp_path, monkeypatch):
        """After one step the average is decay * fresh + (1 - decay) * trained."""
        flags = ["--optim.epochs=1", "--data.limit_train=60", "--evaluation.attacks=[]"]
        averaged, plain = tmp_path / "averaged", tmp_path / "plain"
        train(tiny(averaged, *flags, "--optim.ema_decay=0.75"))
        train(tiny(plain, *flags))
        torch.manual_seed(0)
        fresh = tiny(plain).model.build(num_classes=10, image_size=(1, 28, 28))
        for name, parameter in fresh.named_parameters():
            expected = 0.75 * parameter.detach() + 0.25 * weights(plain / "last")[name]
            torch.testing.assert_close(weights(averaged / "last")[name], expected)
        assert not torch.equal(weights(plain / "last")["fc.weight"], fresh.fc.weight)


class TestPrecision:
    def test_bfloat16_leaves_mask_and_losses_in_float32(self, tmp_path, monkeypatch):
        seen: dict[str, set[torch.dtype]] = {"conv": set(), "mask": set(), "aux": set(), "loss": set()}
        aux_losses, measure = FSR.aux_losses, timm_fsr.training.step._metrics

        def spy(self: FSR, aux: dict[str, Tensor], logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
            seen["mask"].add(aux["mask"].dtype)
            seen["aux"] |= {value.dtype for value in (*aux.values(), logits)}
            return aux_losses(self, aux, logits, labels)

        def spy_metrics(terms: LossTerms, labels: Tensor) -> dict[str, Tensor]:
            seen["loss"] |= {value.dtype for value in terms.values()}
            return measure(terms, labels)

        def spy_conv(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if isinstance(module, nn.Conv2d) and module.training:
                seen["conv"].add(output.dtype)

        monkeypatch.setattr(FSR, "aux_losses", spy)
        monkeypatch.setattr(timm_fsr.training.step, "_metrics", spy_metrics)
        handle = nn.modules.module.register_module_forward_hook(spy_conv)
        try:
            flags = ["--mixed_precision=bf16", "--optim.epochs=1", "--data.limit_train=60"]
            model = train(tiny(tmp_path, *flags))
        finally:
            handle.remove()
        full, half = {torch.float32}, {torch.bfloat16}
        assert seen == {"conv": half, "mask": full, "aux": full, "loss": full}
        assert all(value.dtype == torch.float32 for value in model.parameters())
        assert Report.load(tmp_path / "report.json").conditions["precision"] == "float32"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
    def test_fp16_on_a_cpu_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"mixed_precision='fp16' does nothing on a CPU; use 'bf16' or 'no'"):
            train(tiny(tmp_path / "new", "--mixed_precision=fp16"))
        assert not (tmp_path / "new").exists()


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_fsr.data.dataset.load_data", lambda *_, **__: pytest.fail("data was read"))


class TestRefusals:
    def test_a_finished_run_is_not_overwritten(self, run, no_data):
        before = contents(run[0])
        with pytest.raises(FileExistsError, match=r"holds a training run; .*--resume=true.*--overwrite=true"):
            train(tiny(run[0]))
        assert contents(run[0]) == before

    def test_unless_asked_and_then_nothing_old_stays(self, tmp_path):
        first = tiny(tmp_path, "--optim.epochs=1", "--data.limit_train=60")
        train(first)
        assert (tmp_path / "report.json").exists()
        before = weights(tmp_path / "last")
        flags = ["--overwrite=true", "--seed=1", "--evaluation.attacks=[]"]
        train(tiny(tmp_path, "--optim.epochs=1", "--data.limit_train=60", *flags))
        assert not equal(weights(tmp_path / "last"), before)
        assert not list(tmp_path.rglob("report.json")), "a report about other weights stayed"
        assert len(metrics(tmp_path)) == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]

    def test_a_file_in_place_of_the_folder(self, tmp_path, no_data):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(FileExistsError, match=r"is a file, but results need a folder; .*--output"):
            train(tiny(tmp_path / "file"))
        assert (tmp_path / "file").read_text() == "precious"

    def test_what_the_recipe_alone_tells(self, tmp_path, no_data):
        for flag in ("--model.layer=frs", "--attack.eps=-1", "--evaluation.attacks=[pdg20]"):
            with pytest.raises(ValueError, match=r"did you mean|must be 0 or more"):
                train(tiny(tmp_path / "new", flag))
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            (
                "--optim.batch_size=101",
                r"of 120 training images 20 are held out \(data.held_out\), and the other 100 do not",
            ),
            ("--data.held_out=120", "cannot hold out 120 of the 120 images"),
            ("--data.source=nowhere.parquet", "there is no file or folder"),
            ("--data.train_split=trian", "no split 'trian'; use one of: train, test"),
            ("--data.test_split=tset", "no split 'tset'; use one of: train, test"),
        ],
    )
    def test_what_the_data_tells(self, tmp_path, flag, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(tiny(tmp_path / "new", flag))
        assert not (tmp_path / "new").exists()

    def test_test_images_of_another_kind(self, tmp_path, monkeypatch):
        """Before the training, not after it."""
        original = DataOptions.build_test

        def in_colour(self: DataOptions, *args: Any, **kwargs: Any) -> ImageData:
            return original(dataclasses.replace(self, channels=3), *args, **kwargs)

        monkeypatch.setattr(DataOptions, "build_test", in_colour)
        with pytest.raises(ValueError, match=r"test images have 3 channels but .* set data\.channels"):
            train(tiny(tmp_path / "new"))
        assert not (tmp_path / "new").exists()

    def test_a_disk_that_fills_up_leaves_whole_checkpoints(self, tmp_path, monkeypatch):
        """The second epoch's weights do not fit any more."""
        saves: list[Path] = []
        original: Callable[..., None] = timm_fsr.models.saving.save_file

        def save_file(tensors: dict[str, Tensor], path: Path) -> None:
            saves.append(path)
            if len(saves) > 2:
                path.write_bytes(b"half a file")
                raise OSError(28, "No space left on device")
            original(tensors, path)

        monkeypatch.setattr(timm_fsr.models.saving, "save_file", save_file)
        scripted(monkeypatch, [(0.1, 0.1), (0.2, 0.2)])
        with pytest.raises(OSError, match=r"could not write to .* \(No space left on device\).* untouched"):
            train(tiny(tmp_path))
        assert set(contents(tmp_path)) == {
            *(
                f"{kind}/{file}"
                for kind in ("best", "last")
                for file in ("config.json", "model.safetensors", "modeling_timm_fsr.py")
            ),
            *(f"checkpoints/step-00000000{step}/{file}" for step in (3, 6) for file in CHECKPOINT),
            "metrics.jsonl",
            "recipe.yaml",
        }
        assert equal(weights(tmp_path / "best"), weights(tmp_path / "last"))


def test_progress_is_printed_without_a_terminal_as_one_line_per_epoch(tmp_path, capsys):
    train(tiny(tmp_path, "--data.limit_train=60"))
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"resnet_tiny_cifar_fsr \(\d.\d\d M parameters\) on 40 images of .*1 process", lines[0])
    for epoch in (1, 2):
        assert re.match(rf"epoch {epoch}/2: adversarial \d\.\d+, .*held_out robust \d+\.\d %", lines[epoch])
    assert "worst case" in lines[3]
    assert lines[4] == f"results in {tmp_path}"
    assert len(lines) == 5


def test_a_trainer_is_printed_as_the_first_line_of_its_run(tmp_path, capsys):
    recipe = tiny(tmp_path, "--data.limit_train=60", "--optim.epochs=1", "--evaluation.attacks=[]")
    trainer = Trainer.prepare(recipe, build_accelerator(recipe), Console(quiet=True))
    train(recipe)
    assert str(trainer) == capsys.readouterr().out.splitlines()[0]


def test_files_of_another_origin_are_not_cleared_away(tmp_path):
    """A folder that only happens to be called best/ is somebody else's."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("precious")
    for flag in ("--seed=0", "--resume=true"):
        with pytest.raises(FileExistsError, match=r"holds best, which no run here has made and this one would replace"):
            train(tiny(tmp_path, flag))
    assert contents(tmp_path) == {"best/mine.txt": b"precious"}
