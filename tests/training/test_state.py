"""A run's state: which recipe keys bind a resumed run, and that what it holds comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import metrics, tiny, weights

from timm_fsr.training.state import Selection, checkpoints_of, fixed_keys, flatten
from timm_fsr.training.trainer import Trainer, train

SHORT = ["--data.limit_train=52", "--model.layer=null", "--evaluation.attacks=[]", "--evaluation.validation_steps=1"]

# Each with another value than `tiny` has.
FREE = {
    "output": "elsewhere",
    "overwrite": "true",
    "resume": "true",
    "trackers": "[wandb]",
    "checkpoint.every_steps": "7",
    "checkpoint.keep": "9",
    "data.source": "other.parquet",
    "data.workers": "3",
    "data.on_error": "skip",
    "data.extra_source": "elsewhere.npz",
    "evaluation.attacks": "[pgd7]",
    "optim.nonfinite": "skip",
    "imports": "[own.py]",
}
BINDING = {
    "seed": "5",
    "mixed_precision": "bf16",
    "compile": "eager",
    "gradient_checkpointing": "true",
    "batch_norm": "first",
    "model.name": "resnet18_cifar",
    "data.train_split": "other",
    "data.limit_train": "77",
    "attack.warmup_epochs": "2",
    "objective.name": "trades",
    "optim.epochs": "9",
    "optim.awp_gamma": "0.01",
    "evaluation.validation_steps": "5",
    "evaluation.validate_every": "2",
    "evaluation.patience": "3",
    "evaluation.overfitting_alarm": "false",
}


class TestFlatten:
    def test_names_are_joined_by_dots(self):
        nested = {"a": 1, "b": {"c": {"d": [1, 2]}, "e": None}, "f": "text"}
        assert flatten(nested) == {"a": 1, "b.c.d": [1, 2], "b.e": None, "f": "text"}

    def test_an_empty_dictionary_is_a_value(self):
        """Else one that is filled later would not differ from it."""
        assert flatten({"a": {}, "b": {"c": {}}}) == {"a": {}, "b.c": {}}
        assert flatten({}) == {}


class TestFixedKeys:
    def test_they_are_all_keys_of_the_recipe_but_the_free_ones(self, tmp_path):
        recipe = tiny(tmp_path)
        every = flatten(yaml.safe_load(recipe.to_yaml()))
        assert every.keys() >= FREE.keys() | BINDING.keys()
        assert fixed_keys(recipe) == {key: value for key, value in every.items() if key not in FREE}

    @pytest.mark.parametrize("key", FREE)
    def test_a_free_key_may_change(self, tmp_path, key):
        changed = tiny(tmp_path, f"--{key}={FREE[key]}")
        assert changed != tiny(tmp_path)
        assert fixed_keys(changed) == fixed_keys(tiny(tmp_path))

    @pytest.mark.parametrize("key", BINDING)
    def test_any_other_binds(self, tmp_path, key):
        one, other = fixed_keys(tiny(tmp_path)), fixed_keys(tiny(tmp_path, f"--{key}={BINDING[key]}"))
        assert [name for name in one if one[name] != other[name]] == [key]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps, with an average."""
    output = tmp_path_factory.mktemp("ended") / "run"
    train(tiny(output, *SHORT, "--optim.ema_decay=0.5"))
    return output


def resumed(monkeypatch: pytest.MonkeyPatch, output: Path, change: Callable[[dict[str, Any]], None]) -> Trainer:
    """The trainer as it is after going on from its newest checkpoint, whose values `change` has altered."""
    tensors, values = checkpoints_of(tiny(output)).load_newest(pytest.fail)
    change(values)
    trainers: list[Trainer] = []
    restore = Trainer.restore

    def spy(trainer: Trainer, *_: Any) -> None:
        trainers.append(trainer)
        restore(trainer, tensors, values)

    monkeypatch.setattr(Trainer, "restore", spy)
    monkeypatch.setattr(Trainer, "take_step", lambda *_, **__: pytest.fail("it trained again"))
    train(tiny(output, *SHORT, "--optim.ema_decay=0.5", "--resume=true"))
    return trainers[0]


class TestRestore:
    def test_everything_is_where_it_was(self, ended, monkeypatch):
        run = resumed(monkeypatch, ended, lambda values: None)
        saved = torch.load(ended / "checkpoints/step-000000002/tensors.pt", weights_only=True)
        for module, key in ((run.timm_model, "model"), (run.ema.module, "ema")):
            state = module.state_dict()
            assert state.keys() == saved[key].keys()
            assert all(torch.equal(state[name], value) for name, value in saved[key].items())
        assert not torch.equal(saved["model"]["fc.weight"], saved["ema"]["fc.weight"])
        momenta = run.optimizer.state_dict()["state"]
        assert momenta.keys() == saved["optimizer"]["state"].keys()
        assert all(
            torch.equal(momenta[index]["momentum_buffer"], entry["momentum_buffer"])
            for index, entry in saved["optimizer"]["state"].items()
        )
        progress = json.loads((ended / "checkpoints/step-000000002/values.json").read_text())["progress"]
        assert (run.progress.step, run.progress.epoch, run.progress.lines) == (2, 2, 2)
        assert isinstance(run.progress.selection, Selection)
        assert run.progress.selection == Selection(**progress["selection"])

    def test_what_is_judged_is_the_average(self, ended, monkeypatch):
        run = resumed(monkeypatch, ended, lambda values: None)
        assert run.judged is run.ema.module
        assert torch.equal(run.judged.state_dict()["fc.weight"], weights(ended / "last")["fc.weight"])

    def test_another_version_is_a_warning_only(self, ended, monkeypatch, capsys):
        resumed(monkeypatch, ended, lambda values: values["identity"]["versions"].update(torch="1.0"))
        out = capsys.readouterr().out
        assert "warning: the run was begun with" in out
        assert "'torch': '1.0'" in out
        assert "may differ from those of an uninterrupted run" in out
        assert len(metrics(ended)) == 2

    def test_a_run_from_before_a_key_existed_goes_on(self, ended, monkeypatch):
        """Its recipe says nothing of `attack.args`, which was {} then."""
        resumed(monkeypatch, ended, lambda values: values["identity"]["recipe"].pop("attack.args"))

    def test_the_same_versions_are_not_mentioned(self, ended, monkeypatch, capsys):
        resumed(monkeypatch, ended, lambda values: None)
        assert "warning" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda identity: identity["recipe"].update({"optim.lr": 0.7}),
                r"another recipe: optim\.lr \(0\.7 -> 0\.1\)",
            ),
            (lambda identity: identity["recipe"].pop("optim.lr"), r"another recipe: optim\.lr \(None -> 0\.1\)"),
            (lambda identity: identity["recipe"].update({"optim.old": 1}), r"another recipe: optim\.old \(1 -> None\)"),
            (lambda identity: identity.update(processes=3), r"had other processes: 3, now 1"),
            (lambda identity: identity["data"].append("more"), r"had other training images \(by fingerprint\)"),
        ],
        ids=["value", "new key", "old key", "processes", "images"],
    )
    def test_anything_else_is_refused(self, ended, monkeypatch, change, message):
        with pytest.raises(ValueError, match=message):
            resumed(monkeypatch, ended, lambda values: change(values["identity"]))
