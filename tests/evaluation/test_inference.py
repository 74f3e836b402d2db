"""Float32 without shortcuts, whichever of torch's ways to ask for them was used before, and batches as they come."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import images, labels

from timm_fsr.evaluation.inference import _precision_switches, as_batches, full_precision

# In processes of their own: torch's older and newer settings, once mixed, cannot be told apart again.
SCRIPT = """
import json, os, sys, warnings, torch
from timm_fsr.evaluation.inference import full_precision
warnings.simplefilter("ignore")
b = torch.backends
holders = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn]

def read(get):
    try:
        return str(get())
    except RuntimeError:
        return "refused"

def state():
    old = [lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32, torch.get_float32_matmul_precision]
    new = [lambda holder=holder: holder.fp32_precision for holder in holders if hasattr(holder, "fp32_precision")]
    return [read(get) for get in old], [read(get) for get in new]

def states(given):
    exec(given)
    found = [state()]
    try:
        with full_precision(torch.device("cpu")):
            found.append(state())
            raise KeyError
    except KeyError:
        return [*found, state()]

for given in sys.argv[1:]:
    if os.fork() == 0:
        print(json.dumps([given, states(given)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, given
"""
GIVEN = [
    "pass",
    "b.cuda.matmul.allow_tf32 = b.cudnn.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "b.cuda.matmul.fp32_precision = 'tf32'",
    "b.cudnn.conv.fp32_precision = 'ieee'",
    "b.mkldnn.matmul.fp32_precision = 'bf16'",
    "b.fp32_precision = 'tf32'",
    "b.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('high'); b.fp32_precision = 'tf32'",
]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What torch's settings were before, inside and after."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, *GIVEN], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(line) for line in result.stdout.splitlines())


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch: see below")
@pytest.mark.parametrize("given", GIVEN)
def test_shortcuts_are_off_inside_and_as_before_afterwards(seen, given):
    before, inside, after = seen[given]
    assert set(inside[1]) == {"ieee"}
    assert after == before


def test_an_older_torch_has_its_flags_set(monkeypatch):
    matmul, cudnn = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=True)
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=matmul), cudnn=cudnn)
    monkeypatch.setattr(torch, "backends", backends)
    switches = _precision_switches()
    monkeypatch.undo()
    monkeypatch.setattr("timm_fsr.evaluation.inference._precision_switches", lambda: switches)
    with full_precision(torch.device("cpu")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision_become_float32(dtype):
    ((given, _),) = as_batches((images().to(dtype), labels()))
    assert given.dtype == torch.float32
    assert torch.equal(given, images().to(dtype).float())
