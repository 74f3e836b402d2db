"""What was asked of Accelerate against what runs: contradictions are refused before anything is read or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from support.runs import tiny

from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.trainer import train

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, and a process that Accelerate knows to be alone."""
    for name in (*LAUNCHED, *(name for name in os.environ if name.startswith("ACCELERATE_"))):
        monkeypatch.delenv(name, raising=False)
    PartialState(cpu=not torch.cuda.is_available())


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if data is read."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("data was read")

    monkeypatch.setattr("timm_fsr.data.dataset.load_data", load)


def precision(accelerator: Accelerator) -> torch.dtype:
    """What a matrix product is computed in."""
    matrix = torch.ones(2, 2, device=accelerator.device)
    with accelerator.autocast():
        return (matrix @ matrix).dtype


@pytest.mark.usefixtures("no_data")
class TestRefused:
    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            (
                {"WORLD_SIZE": "2"},
                r"2 processes were launched but Accelerate joined 1, so each would work alone; .*--multi_gpu",
            ),
            (
                {"ACCELERATE_MIXED_PRECISION": "bf16"},
                r"asks for bf16 but the recipe, which decides, for 'no'; add --mixed_precision=bf16",
            ),
            (
                {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
                r"asks for the compiler 'inductor', .* --dynamo_backend no and add --compile=inductor",
            ),
            ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"asks for the compiler 'inductor'"),
            ({"ACCELERATE_USE_FSDP": "true"}, r"asks for FSDP, but what runs here is NO; .*configuration without it"),
            ({"ACCELERATE_USE_FSDP": "1"}, r"asks for FSDP, but what runs here is NO"),
            ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"asks for DeepSpeed"),
            ({"ACCELERATE_USE_DEEPSPEED": "1"}, r"asks for DeepSpeed"),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_what_the_launcher_asks_for_in_vain(self, tmp_path, monkeypatch, variables, message):
        """WORLD_SIZE is what `accelerate launch` leaves when it starts copies of a script, not one joint run."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message):
            train(tiny(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
        for name in variables:
            monkeypatch.delenv(name)
        assert build_accelerator(tiny(tmp_path / "new")).num_processes == 1, "the refusal spoils the next run"

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--batch_norm=sync", r"batch_norm='sync' needs GPUs, .* use 'average' or 'first'"),
            ("--mixed_precision=fp16", r"mixed_precision='fp16' does nothing on a CPU; use 'bf16' or 'no'"),
        ],
    )
    @on_cpu
    def test_what_a_cpu_cannot_do(self, tmp_path, flag, message):
        with pytest.raises(ValueError, match=message):
            train(tiny(tmp_path / "new", flag))
        assert not (tmp_path / "new").exists()

    def test_the_recipe_is_not_overruled_by_another_precision(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(ValueError, match=r"asks for fp16 but the recipe, which decides, for 'bf16'"):
            train(tiny(tmp_path / "new", "--mixed_precision=bf16"))
        assert not (tmp_path / "new").exists()


class TestAccepted:
    @pytest.mark.parametrize("asked", ["no", "bf16"])
    def test_a_launcher_that_agrees_or_has_no_opinion(self, tmp_path, monkeypatch, asked):
        """`accelerate launch` sets the precision to "no" and the compiler to "no" by itself."""
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
        monkeypatch.setenv("WORLD_SIZE", "1")
        accelerator = build_accelerator(tiny(tmp_path / "new", "--mixed_precision=bf16"))
        assert accelerator.mixed_precision == "bf16"
        assert precision(accelerator) == torch.bfloat16
        assert not (tmp_path / "new").exists()

    def test_two_runs_of_different_precision_in_one_process(self, tmp_path):
        found = [
            precision(build_accelerator(tiny(tmp_path, f"--mixed_precision={kind}"))) for kind in ("no", "bf16", "no")
        ]
        assert found == [torch.float32, torch.bfloat16, torch.float32]

    def test_the_recipe_decides_on_the_accumulation(self, tmp_path, monkeypatch):
        """Also that of a second run in the same process."""
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
        for parts in (4, 1, 2):
            accelerator = build_accelerator(tiny(tmp_path, f"--optim.accumulate={parts}"))
            assert accelerator.gradient_accumulation_steps == parts

    @on_cpu
    def test_without_a_gpu_it_is_the_cpu(self, tmp_path: Path):
        assert build_accelerator(tiny(tmp_path)).device.type == "cpu"
