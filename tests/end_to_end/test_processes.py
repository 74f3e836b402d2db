"""Training on several processes, started as a user starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from support.runs import TINY, equal, metrics, same_values, tiny, weights, without_seconds
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from timm_fsr.reports.report import Report
from timm_fsr.training.prepare import count_steps
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.step import InterruptedRunError
from timm_fsr.training.trainer import Trainer, train

# Runs as each of the two processes that `accelerate launch` starts: trains, and keeps what each process has.
RANK = """
import sys, torch
torch.set_num_threads(1)
from timm_fsr.cli.main import main
from timm_fsr.training.trainer import Trainer
import timm_fsr.data.sampling as batch_module, timm_fsr.training.step as steps
save, derive, batches = Trainer.save_checkpoint, steps.derive_generator, batch_module.epoch_batches
seeds, indices = [], []
def spy(trainer):
    rank = trainer.accelerator.process_index
    known = {"state": trainer.judged.state_dict(), "seeds": seeds, "indices": indices}
    torch.save(known, f"{trainer.recipe.folder.parent}/rank{rank}.pt")
    save(trainer)
def spy_derive(*args, **kwargs):
    generator = derive(*args, **kwargs)
    seeds.append(generator.initial_seed())
    return generator
def spy_batches(*args, **kwargs):
    for batch in batches(*args, **kwargs):
        indices.extend(batch.tolist())
        yield batch
Trainer.save_checkpoint, steps.derive_generator, batch_module.epoch_batches = spy, spy_derive, spy_batches
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_two_processes_train_one_model(tmp_path):
    """As the README says, on CPUs too: accelerate's other spellings start one process, or two that do not meet."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = [*TINY, f"--output={tmp_path / 'run'}", "--optim.epochs=1", "--data.limit_train=84"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # by the host's name it may choose an address that does not answer
    result = subprocess.run(
        [*launch, *port, str(script), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "64 images" in result.stdout
    assert "2 process(es) on cpu" in result.stdout
    assert result.stdout.count("epoch 1/1") == 1, "every process prints"
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert equal(*(rank["state"] for rank in ranks)), "the processes drifted apart"
    assert equal(ranks[0]["state"], weights(tmp_path / "run" / "last"))
    assert sorted(ranks[0]["indices"] + ranks[1]["indices"]) == list(range(64)), "an image was seen twice"
    assert not set(ranks[0]["seeds"]) & set(ranks[1]["seeds"]), "the processes share random starts or noise"
    assert Report.load(tmp_path / "run" / "report.json").count == 20
    assert int(weights(tmp_path / "run" / "last")["bn1.num_batches_tracked"]) == 2, "batch_size is over all processes"


# The rest forks this process, which has imported everything already.

FLAGS = [
    "--optim.epochs=2",
    "--optim.ema_decay=0.9",
    "--optim.accumulate=2",
    "--optim.awp_gamma=0.01",
    "--objective.name=trades",
    "--checkpoint.every_steps=2",
    "--checkpoint.keep=9",
    "--evaluation.attacks=[]",
]


def rank_main(arguments: list[str], die_at: int | None, state_of: str | None, stop_at: int | None) -> None:
    """What each process does: train, be killed or (the second one) told to stop before a step, leave its model."""
    AcceleratorState._reset_state(reset_partial_state=True)  # this process is a copy of one that may have trained
    take_step, save = Trainer.take_step, Trainer.save_checkpoint

    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.progress.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.progress.step == stop_at and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(trainer, *args, **kwargs)

    def kept(trainer: Trainer) -> None:
        if state_of:
            torch.save(trainer.timm_model.state_dict(), f"{state_of}{trainer.accelerator.process_index}.pt")
        save(trainer)

    Trainer.take_step, Trainer.save_checkpoint = watched, kept
    with contextlib.suppress(InterruptedRunError) if stop_at else contextlib.nullcontext():
        train(Recipe.load(overrides=arguments))


def on_two(
    output: Path, *flags: str, die_at: int | None = None, state_of: Path | None = None, stop_at: int | None = None
) -> None:
    arguments = [*TINY, *FLAGS, f"--output={output}", *flags]
    debug_launcher(rank_main, args=(arguments, die_at, state_of and str(state_of), stop_at), num_processes=2)


def assert_same_end(one: Path, other: Path) -> None:
    last = "checkpoints/step-000000006/tensors.pt"
    states = [torch.load(folder / last, weights_only=True) for folder in (one, other)]
    assert same_values(*states)
    assert states[0]["sums"] == {}, "an epoch's end leaves no sums"
    for kind in ("best", "last"):
        assert equal(weights(one / kind), weights(other / kind))
    assert without_seconds(metrics(one)) == without_seconds(metrics(other))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    on_two(output)
    return output


def test_a_run_that_is_killed_ends_as_an_uninterrupted_one(whole, tmp_path):
    """By SIGKILL, in the middle of the second epoch; sums, buffers and random starts of both processes included."""
    with pytest.raises(ProcessExitedException):
        on_two(tmp_path, die_at=5)
    assert not (tmp_path / "checkpoints" / "step-000000006").exists()
    on_two(tmp_path, "--resume=true")
    assert_same_end(whole, tmp_path)
    middle = torch.load(tmp_path / "checkpoints/step-000000004/tensors.pt", weights_only=True)["sums"]
    assert all(rows.shape == (2,) for rows in middle.values()), "one entry per process"


def test_a_sigterm_to_one_process_stops_both_at_the_same_step(whole, tmp_path):
    on_two(tmp_path, stop_at=4)
    assert (tmp_path / "checkpoints" / "step-000000005").is_dir()
    assert not (tmp_path / "checkpoints" / "step-000000006").exists()
    on_two(tmp_path, "--resume=true")
    assert_same_end(whole, tmp_path)


def test_it_is_not_resumed_by_another_number_of_processes(whole):
    with pytest.raises(ValueError, match=r"had other processes: 2, now 1"):
        train(Recipe.load(overrides=[*TINY, *FLAGS, f"--output={whole}", "--resume=true"]))


@pytest.mark.parametrize("rule", ["average", "first"])
def test_the_running_statistics_are_the_same_everywhere(tmp_path, rule):
    flags = ["--optim.epochs=1", "--data.limit_train=52", f"--batch_norm={rule}", "--optim.ema_decay=0"]
    on_two(tmp_path / "run", *flags, "--optim.awp_gamma=0", "--optim.accumulate=1", state_of=tmp_path / "rank")
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert equal(one, other)
    assert equal(one, weights(tmp_path / "run" / "last"))


def test_too_few_held_out_images_are_refused_instead_of_waited_for(tmp_path):
    with pytest.raises(ProcessRaisedException, match=r"1 held-out image\(s\) do not give each of 2 processes one"):
        on_two(tmp_path, "--data.held_out=1")


@pytest.mark.parametrize(
    ("batch_size", "processes", "parts", "message"),
    [
        (32, 3, 1, r"batch_size=32 does not divide among 3 processes with optim.accumulate=1; make it a multiple of 3"),
        (32, 4, 3, r"multiple of 12"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(tmp_path, batch_size, processes, parts, message):
    recipe = tiny(tmp_path, f"--optim.batch_size={batch_size}", f"--optim.accumulate={parts}")
    with pytest.raises(ValueError, match=message):
        count_steps(recipe, 100, 20, processes)
