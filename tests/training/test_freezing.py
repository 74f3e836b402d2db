"""A backbone that stays as it is at first: to the bit, also when the run is resumed, averaged or shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from support.runs import Killed, before_step, equal, metrics, same_values, tiny, weights, without_seconds
from support.tiny import tiny_resnet, with_fsr
from torch import Tensor, nn

from timm_fsr.models.saving import save_pretrained
from timm_fsr.training.accelerator import _check_sharding
from timm_fsr.training.freezing import find_frozen
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer, train

# Three epochs of three steps, the first two of them frozen.
FLAGS = ["--optim.epochs=3", "--optim.freeze=2", "--optim.ema_decay=0.9", "--evaluation.attacks=[]"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, as far as anybody can tell."""
    torch.manual_seed(3)
    model = timm.create_model(
        "resnet_tiny_cifar", num_classes=10, pretrained_cfg_overlay={"input_size": (1, 28, 28)}, in_chans=1
    )
    return Path(save_pretrained(model, tmp_path_factory.mktemp("backbone") / "plain"))


def started(backbone: Path, output: Path, *flags: str) -> Recipe:
    return tiny(output, *FLAGS, f"--model.name={backbone}", *flags)


@pytest.fixture(scope="module")
def whole(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    train(started(backbone, output))
    return output


def base(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved model without those of its layer and classifier."""
    return {key: value for key, value in weights(folder).items() if not key.startswith(("fsr.", "fc."))}


@pytest.mark.parametrize("step", [0, 3, 6, 7])
def test_a_resumed_run_ends_as_an_uninterrupted_one(whole, backbone, tmp_path, monkeypatch, step):
    """Killed in the frozen epochs, at their end, and after."""

    def die() -> None:
        raise Killed

    flags = ["--checkpoint.every_steps=1"]
    with monkeypatch.context() as patch:
        before_step(patch, step, die)
        with pytest.raises(Killed):
            train(started(backbone, tmp_path, *flags))
    train(started(backbone, tmp_path, *flags, "--resume=true"))
    for kind in ("best", "last"):
        assert equal(weights(whole / kind), weights(tmp_path / kind)), kind
    last = "checkpoints/step-000000009/tensors.pt"
    assert same_values(*(torch.load(folder / last, weights_only=True) for folder in (whole, tmp_path)))
    assert without_seconds(metrics(whole)) == without_seconds(metrics(tmp_path))


def test_the_backbone_moves_only_when_its_time_has_come(backbone, tmp_path, monkeypatch, capsys):
    """Weights, BatchNorm's statistics and their average; layer and classifier train from the first step."""
    seen: list[dict[str, dict[str, Tensor]]] = []
    finish = Trainer._finish_epoch

    def spy(trainer: Trainer, *args: Any) -> None:
        assert trainer.ema is not None
        models = {"trained": trainer.timm_model, "average": trainer.ema.module}
        seen.append({name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()})
        finish(trainer, *args)

    monkeypatch.setattr(Trainer, "_finish_epoch", spy)
    train(started(backbone, tmp_path))
    before = {key: value for key, value in weights(backbone).items() if not key.startswith("fc.")}
    assert len(seen) == 3
    for epoch, states in enumerate(seen):
        for name, state in states.items():
            assert all(torch.equal(before[key], state[key]) for key in before) == (epoch < 2), (epoch, name)
    learnt = {key for key, value in seen[0]["trained"].items() if key.startswith(("fsr.", "fc.")) and value.ndim > 1}
    assert any(key.startswith("fsr.") for key in learnt)
    assert not any(torch.equal(seen[0]["trained"][key], seen[1]["trained"][key]) for key in learnt)
    assert capsys.readouterr().out.count("epoch 3: from here on the whole model trains") == 1


def test_without_a_layer_the_classifier_alone_trains(backbone, tmp_path):
    train(started(backbone, tmp_path, "--model.layer=null", "--optim.epochs=1", "--optim.freeze=1"))
    before, after = weights(backbone), weights(tmp_path / "last")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}


def _rank(arguments: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # this process is a copy of one that may have trained
    train(Recipe.load(overrides=arguments))


def test_in_several_processes_every_gradient_is_waited_for(backbone, tmp_path):
    """DistributedDataParallel refuses a step in which a parameter has no gradient."""
    recipe = started(backbone, tmp_path, "--optim.epochs=2", "--optim.freeze=1")
    (tmp_path / "recipe.in.yaml").write_text(recipe.to_yaml())
    debug_launcher(_rank, ([f"--config={tmp_path / 'recipe.in.yaml'}"],), num_processes=2)
    assert len(metrics(tmp_path)) == 2
    assert not equal(base(backbone), base(tmp_path / "last"))


class Twin(nn.Module):
    """With two classifiers, as distilled networks have them, and a BatchNorm within the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ModuleList()
        self.heads.extend([nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.Linear(4, 2)])

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return tuple(self.heads)


def test_what_is_frozen():
    model = Twin()
    frozen = find_frozen(model)
    assert [id(p) for p in frozen.parameters] == [id(p) for p in model.body.parameters()]
    assert frozen.norms == (model.body[1],)
    model.train()
    frozen.keep_statistics()
    assert [module.training for module in (model.body[0], model.body[1], model.heads[0][0])] == [True, False, True]
    with pytest.raises(ValueError, match=r"optim.freeze leaves nothing to train"):
        find_frozen(nn.Conv2d(3, 4, 1))
    with_layer = with_fsr(tiny_resnet())
    own = {id(p) for p in (*with_layer.fsr.parameters(), *with_layer.fc.parameters())}
    assert {id(p) for p in with_layer.parameters()} - own == {id(p) for p in find_frozen(with_layer).parameters}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.freeze=4"], r"optim.freeze=4 must lie between 0 and optim.epochs=3"),
        (["--optim.freeze=-1"], r"optim.freeze=-1 must lie between"),
        (["--optim.awp_gamma=0.01"], r"set optim.awp_start=2"),
        (["--model.name=resnet_tiny_cifar"], r"begins with random weights"),
    ],
)
def test_mistakes(backbone, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        started(backbone, tmp_path, *flags).check()


def test_an_attack_on_weights_may_begin_when_all_of_them_train(backbone, tmp_path):
    started(backbone, tmp_path, "--optim.awp_gamma=0.01", "--optim.awp_start=2").check()


def test_it_is_refused_where_parameters_are_sharded(backbone, tmp_path):
    plugin = type("Plugin", (), {"fsdp_version": 2, "cpu_ram_efficient_loading": False})
    recipe = started(backbone, tmp_path, "--optim.ema_decay=0", "--channels_last=false")
    with pytest.raises(ValueError, match=r"optim.freeze=2 does not work with FSDP"):
        _check_sharding(recipe, plugin())  # type: ignore[arg-type]
