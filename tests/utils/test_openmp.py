"""Waiting threads: bounded before torch is loaded, unless the user has said how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINT = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("given", "first", "expected"),
    [
        ({}, "import timm_fsr", "20000 None"),
        ({}, "from timm_fsr.cli.main import main", "20000 None"),
        ({}, "import torch, timm_fsr", "None None"),  # too late: torch has read it
        ({"GOMP_SPINCOUNT": "7"}, "import timm_fsr", "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "import timm_fsr", "None ACTIVE"),
    ],
)
def test_the_bound_is_set_before_torch_is_loaded(given: dict[str, str], first: str, expected: str) -> None:
    own = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", f"{first}; {PRINT}"], env=own | given, capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[0] == expected


def test_torch_hears_of_it() -> None:
    """libgomp tells on stderr what it has read; torch with another OpenMP runtime has no such line."""
    own = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", "import timm_fsr"],
        env={**own, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in run.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("torch does not use libgomp here")
    assert all("20000" in line for line in lines), lines
