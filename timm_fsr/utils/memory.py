"""The memory of this machine, and refusing what can never fit into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container, or "max"


def total_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes of memory that the machine, its container or its GPU has in all; None if that is not known."""
    import torch  # here: recipes' keys need this file, and are shown without torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:
        return min(installed, int(_CGROUP.read_text()))
    except (OSError, ValueError):
        return installed


def check_memory(needed: int, what: str, remedy: str, *, device: torch.device | str = "cpu") -> None:
    """Refuse what needs more memory than there is, before it is asked for: the system would kill the process.

    Args:
        needed: bytes, estimated from below: what might fit is tried.
        what: needs it, as the plural subject of a sentence.
        remedy: what to do, as the end of a sentence.
        device: that the memory belongs to.

    Raises:
        ValueError: the device has less.
    """
    import torch

    total = total_memory(device)
    if total is not None and needed > total:
        where = "this machine" if torch.device(device).type == "cpu" else f"the device {device}"
        raise ValueError(f"{what} need {_gib(needed)} of memory or more, but {where} has {_gib(total)}; {remedy}")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
