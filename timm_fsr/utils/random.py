"""Random numbers: generators seeded by position, and draws that leave no trace."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
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


@contextmanager
def seeded_libraries() -> Iterator[Callable[[int], None]]:
    """For code that draws from the global generators of Python, NumPy and torch (on the CPU).

    Afterwards all three are as before, also after an exception. Other threads draw from them too, so they must not
    meanwhile.

    Yields:
        What seeds all three; to be called before the first draw.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield _seed_libraries
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _seed_libraries(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
