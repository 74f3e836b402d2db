"""Training with parameters sharded by FSDP2: on two CPU processes, where Accelerate by itself would not shard."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from support.runs import TINY, equal, metrics, same_values, weights, without_seconds
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException

import timm_fsr.training.accelerator
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import Trainer, train

FLAGS = [
    "--optim.epochs=2",
    "--channels_last=false",
    "--optim.accumulate=2",
    "--optim.clip_grad=1",
    "--objective.name=trades",
    "--checkpoint.every_steps=2",
    "--evaluation.attacks=[]",
]


def sharding_accelerator(**kwargs: Any) -> Accelerator:
    """An Accelerator in the state that `accelerate launch` with FSDP2 gives it on GPUs."""
    accelerator = Accelerator(**kwargs)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    return accelerator


def rank_main(arguments: list[str], die_at: int | None, shard: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # this process is a copy of one that may have trained
    take_step = Trainer.take_step

    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.progress.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert isinstance(next(trainer.timm_model.parameters()), DTensor) is shard
        take_step(trainer, *args, **kwargs)

    Trainer.take_step = watched
    if shard:
        timm_fsr.training.accelerator.Accelerator = sharding_accelerator
    train(Recipe.load(overrides=arguments))


def on_two(output: Path, *flags: str, die_at: int | None = None, shard: bool = True) -> None:
    debug_launcher(rank_main, args=([*TINY, *FLAGS, f"--output={output}", *flags], die_at, shard), num_processes=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded") / "run"
    on_two(output)
    return output


def test_it_computes_what_whole_parameters_compute(tmp_path):
    """For one step: later on rounding decides signs in PGD."""
    for shard in (True, False):
        flags = ["--optim.epochs=1", "--data.limit_train=52", "--optim.accumulate=1"]
        on_two(tmp_path / str(shard), *flags, shard=shard)
    one, other = (weights(tmp_path / shard / "last") for shard in ("True", "False"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_that_is_killed_ends_as_an_uninterrupted_one(sharded, tmp_path):
    with pytest.raises(ProcessExitedException):
        on_two(tmp_path, die_at=5)
    on_two(tmp_path, "--resume=true")
    last = "checkpoints/step-000000006/tensors.pt"
    assert same_values(*(torch.load(folder / last, weights_only=True) for folder in (sharded, tmp_path)))
    for kind in ("best", "last"):
        assert equal(weights(sharded / kind), weights(tmp_path / kind))
    assert without_seconds(metrics(sharded)) == without_seconds(metrics(tmp_path))


@pytest.mark.parametrize("flag", ["--optim.ema_decay=0.9", "--optim.awp_gamma=0.01", "--channels_last=true"])
def test_what_does_not_work_with_it_is_refused(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(timm_fsr.training.accelerator, "Accelerator", sharding_accelerator)
    with pytest.raises(ValueError, match=r"does not work with FSDP; leave it out or launch without FSDP"):
        build_accelerator(Recipe.load(overrides=[*TINY, *FLAGS, flag]))
    AcceleratorState._reset_state()
