"""Training by the engine on several processes, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_engine import TINY, equal, tiny, weights

import timm_fsr.engine
from timm_fsr.report import Report

# Runs as each of the two processes that `accelerate launch` starts: trains, and keeps what each process has.
RANK = """
import sys, torch
torch.set_num_threads(1)
import timm_fsr.engine as engine
from timm_fsr.cli import main
save, derive, batches = engine._save, engine.derive_generator, engine.epoch_batches
seeds, indices = [], []
def spy(run, folder):
    rank = run.accelerator.process_index
    known = {"state": run.judged.state_dict(), "seeds": seeds, "indices": indices}
    torch.save(known, f"{folder.parent.parent}/{folder.name}{rank}.pt")
    save(run, folder)
def spy_derive(*args, **kwargs):
    generator = derive(*args, **kwargs)
    seeds.append(generator.initial_seed())
    return generator
def spy_batches(*args, **kwargs):
    for batch in batches(*args, **kwargs):
        indices.extend(batch.tolist())
        yield batch
engine._save, engine.derive_generator, engine.epoch_batches = spy, spy_derive, spy_batches
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
    for kind in ("best", "last"):
        ranks = [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2)]
        assert equal(*(rank["state"] for rank in ranks)), "the processes drifted apart"
        assert equal(ranks[0]["state"], weights(tmp_path / "run" / kind))
    assert sorted(ranks[0]["indices"] + ranks[1]["indices"]) == list(range(64)), "an image was seen twice"
    assert not set(ranks[0]["seeds"]) & set(ranks[1]["seeds"]), "the processes share random starts or noise"
    assert Report.load(tmp_path / "run" / "report.json").count == 20
    assert int(weights(tmp_path / "run" / "last")["bn1.num_batches_tracked"]) == 2, "batch_size is over all processes"


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    recipe = tiny(tmp_path)
    data, held_out = recipe.data.build(seed=0, progress=False)
    accelerator = type("Three", (), {"num_processes": 3})()
    model = torch.nn.Identity()
    three = timm_fsr.engine.Run(recipe, accelerator, model, model, None, None, data, held_out, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optim.batch_size=32 does not divide among 3 processes"):
        timm_fsr.engine._steps_per_epoch(three)
