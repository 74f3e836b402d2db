"""Accelerate as a recipe asks for it; what was asked is compared with what runs before anything starts."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin

from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.distributed import check_processes


def build_accelerator(recipe: Recipe) -> Accelerator:
    """An Accelerator that uses the processes it was launched with, on the CPU where there is no GPU.

    Raises:
        ValueError: the launcher started processes that do not see each other, or asks for what the recipe does not;
            or something was asked for that would silently run as something else here (fp16, FSDP, DeepSpeed or
            synchronised BatchNorm on a CPU).
    """
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
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
        project_dir=recipe.folder / "trackers",
    )
    check_processes(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_sharding(recipe, accelerator.state.fsdp_plugin)
    if recipe.batch_norm == "sync" and accelerator.device.type == "cpu":
        raise ValueError("batch_norm='sync' needs GPUs, torch cannot do it on a CPU; use 'average' or 'first'")
    return accelerator


def _check_precision(mixed_precision: str, on_cpu: bool) -> None:
    if mixed_precision == "fp16" and on_cpu:
        raise ValueError("mixed_precision='fp16' does nothing on a CPU; use 'bf16' or 'no'")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"`accelerate launch` asks for {asked}, which is not supported; launch with --mixed_precision no"
        )
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"`accelerate launch` asks for {asked} but the recipe, which decides, for {mixed_precision!r}; add "
            f"--mixed_precision={asked} to the script's own arguments"
        )


def _check_launcher() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError(
            "`accelerate launch` asks for DeepSpeed, which steps within its backward pass, so that no bad step could "
            "be skipped; FSDP2 shards as its ZeRO does: use recipes/accelerate/fsdp2.yaml"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            f"`accelerate launch` asks for the compiler {backend!r}, but the recipe decides; launch with "
            f"--dynamo_backend no and add --compile={backend} to the script's own arguments"
        )


def _check_sharding(recipe: Recipe, plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse what does not work with sharded parameters."""
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "of FSDP, version 2 without efficient loading is supported; launch with fsdp_version: 2 and "
            "fsdp_cpu_ram_efficient_loading: false, as in recipes/accelerate/fsdp2.yaml"
        )
    unsupported = {
        "optim.ema_decay": recipe.optim.ema_decay,
        "optim.awp_gamma": recipe.optim.awp_gamma,
        "optim.layer_decay": recipe.optim.layer_decay,
        "optim.freeze": recipe.optim.freeze,
        "compile": recipe.compile,
        "channels_last": recipe.channels_last,
    }
    for key, value in unsupported.items():
        if value:
            raise ValueError(f"{key}={value} does not work with FSDP; leave it out or launch without FSDP")
