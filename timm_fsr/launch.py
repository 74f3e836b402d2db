"""Accelerate as a recipe asks for it: what was asked is compared with what runs, before anything starts."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from timm_fsr.recipe import Recipe


def build_accelerator(recipe: Recipe) -> Accelerator:
    """An Accelerator that uses the processes it was launched with, on the CPU where there is no GPU.

    Raises:
        ValueError: the launcher started processes that do not see each other, or asks for what the recipe does not;
            or something was asked for that would silently run as something else here (fp16, FSDP, DeepSpeed or
            synchronised BatchNorm on a CPU).
    """
    on_cpu = not torch.cuda.is_available()
    _check_precision(recipe.mixed_precision, on_cpu)
    _check_launcher()
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        cpu=on_cpu,
        # As a plugin: a plain number would give way to the one that `accelerate launch` always sets, which is 1.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.optim.accumulate, sync_with_dataloader=False
        ),
        log_with=recipe.trackers or None,
        project_dir=recipe.output,
    )
    _check_processes(accelerator)
    if recipe.batch_norm == "sync" and accelerator.device.type == "cpu":
        raise ValueError("batch_norm='sync' needs GPUs, torch cannot do it on a CPU; use 'average' or 'first'")
    return accelerator


def _check_precision(mixed_precision: str, on_cpu: bool) -> None:
    if mixed_precision == "fp16" and on_cpu:
        raise ValueError("mixed_precision='fp16' does nothing on a CPU; use 'bf16' or 'no'")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"`accelerate launch` asks for {asked} but the recipe, which decides, for {mixed_precision!r}; add "
            f"--mixed_precision={asked} to the script's own arguments"
        )


def _check_launcher() -> None:
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            f"`accelerate launch` asks for the compiler {backend!r}, but the recipe decides; launch with "
            f"--dynamo_backend no and add --compile={backend} to the script's own arguments"
        )


def _check_processes(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but Accelerate joined {accelerator.num_processes}, so each would "
            "train alone; start with `accelerate launch --multi_gpu --num_processes N` (on CPUs too)"
        )
    for name, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1")
        if asked and accelerator.distributed_type != kind:
            raise ValueError(
                f"`accelerate launch` asks for {name}, but what runs here is {accelerator.distributed_type.value}; "
                "use GPUs, or a configuration without it"
            )
