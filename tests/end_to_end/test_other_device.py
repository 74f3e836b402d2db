"""Training and attacks on a device that is not the CPU, without having one: see stand_in.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.utils.backend_registration as registration

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no devices in Python"
)
CPU, OTHER = "cpu", "stand_in"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script, folder = Path(__file__).parents[1] / "support" / "on_stand_in.py", tmp_path_factory.mktemp("devices")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_refuses_what_an_accelerator_refuses(found):
    assert "expected all tensors to be on stand_in" in found["refused"]["mixture"]
    assert "generator is on cpu" in found["refused"]["generator"]
    assert "can't convert stand_in tensor to numpy" in found["refused"]["numpy"]


def test_training_is_that_of_the_cpu(found):
    assert found[OTHER]["trained"] == pytest.approx(found[CPU]["trained"], abs=1e-5)


def test_a_run_resumes(found):
    assert found["resumed"] == found[OTHER]["trained"]


def test_attacks_find_what_they_find_on_the_cpu(found):
    assert found[OTHER]["attacked"] == found[CPU]["attacked"]
    assert {"autoattack", "adaptive"} <= set(found[OTHER]["attacked"]["correct"])
    assert any(found[OTHER]["attacked"]["correct"]["clean"])
    assert len(found[OTHER]["attacked"]["findings"]) > 5
