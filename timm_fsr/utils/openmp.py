"""Threads of OpenMP that wait for work give their core back soon."""

import os
import sys

SPINS = "20000"
"""Turns of the waiting loop. Without a bound threads spin for ever and hold the core that the working thread needs: on
a busy machine a training step took 15 to 20 times as long. On a quiet one the bound costs nothing
(`benchmarks/waiting_threads.py`)."""


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT, unless torch is loaded already, or the user has said how threads wait."""
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


bound_spinning()
