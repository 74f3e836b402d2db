"""Processes: joining them, checking that they agree, and sharing what one of them found."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

Result = TypeVar("Result")


def check_agreement(accelerator: Accelerator | None, value: str, what: str) -> None:
    """Refuse to go on where processes that share work do not have the same, which would count some of it twice.

    Args:
        accelerator: of the processes; None is one process alone.
        value: this process's.
        what: they have to agree in, for the message.

    Raises:
        ValueError: they differ; on every process.
    """
    if accelerator is None:
        return
    found = gather_object([value])
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes have different {what} ({', '.join(found)}); give each one the same, in the same order"
        )


def from_main(accelerator: Accelerator | None, make: Callable[[], Result]) -> Result:
    """Run `make` on the main process and give its result, or its error, to all, so that none waits for ever.

    Args:
        accelerator: of the processes; None is one process alone.
        make: called on the main process only; what it returns can be pickled.
    """
    if accelerator is None:
        return make()
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            found[1] = error
    found = broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result


def join_processes() -> Accelerator | None:
    """What shares an evaluation over the processes that `accelerate launch` started; None if it started only one.

    Raises:
        ValueError: the processes do not see each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    check_processes(accelerator)
    return accelerator


def check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError where the launched processes do not see each other, or FSDP was asked for and does not run."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but Accelerate joined {accelerator.num_processes}, so each would "
            "work alone; start with `accelerate launch --multi_gpu --num_processes N` (on CPUs too)"
        )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"`accelerate launch` asks for FSDP, but what runs here is {accelerator.distributed_type.value}; use "
            "several GPUs, or a configuration without it"
        )
