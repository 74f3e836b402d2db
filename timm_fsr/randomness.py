"""Random numbers that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever draws from torch's default generators in here, afterwards those of CPU and device are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
