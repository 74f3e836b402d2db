"""Random numbers: generators seeded by position, and draws that leave no trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever draws from torch's default generators in here, afterwards those of CPU and device are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def derive_generator(
    seed: int, epoch: int, step: int, rank: int, device: torch.device | str = "cpu", stream: str = "augment"
) -> torch.Generator:
    """A generator on `device` whose state depends on (stream, seed, epoch, step, rank) and on nothing else.

    `stream` names a use of randomness ("augment", "attack", "model"), so that one use never shifts another.
    """
    digest = hashlib.sha256(f"{stream}/{seed}/{epoch}/{step}/{rank}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))
