"""`python -m timm_fsr.launch`: what Accelerate and torch raise becomes an exit status; the processes say the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import timm_fsr.launch


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (SignalException("got signal", sigval=signal.SIGINT), 130),
        (SignalException("got signal", sigval=signal.SIGTERM), 143),
        (subprocess.CalledProcessError(2, "train.py"), 2),
        (subprocess.CalledProcessError(130, "train.py"), 130),
        (subprocess.CalledProcessError(-9, "train.py"), 137),
        (ChildFailedError("train.py", {0: ProcessFailure(local_rank=0, pid=1, exitcode=-15, error_file="")}), 143),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_no_trace(error: Any, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def launched(options: Any) -> None:
        assert options.training_script == "train.py"
        assert options.training_script_args == ["--seed=1"]
        if error is not None:
            raise error

    monkeypatch.setattr(timm_fsr.launch, "launch_command", launched)
    before = signal.getsignal(signal.SIGINT)
    assert timm_fsr.launch.main(["--num_processes", "2", "train.py", "--seed=1"]) == status
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is before


def test_options_that_exclude_each_other_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert timm_fsr.launch.main(["--cpu", "--multi_gpu", "train.py"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("timm_fsr.launch: error: You can only use one of")


def test_a_signal_to_the_launcher_alone_reaches_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import signal, os; signal.signal(15, lambda *_: os._exit(143)); print('up', flush=True); signal.pause()"

    def launched(_: Any) -> None:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            signal.raise_signal(signal.SIGINT)  # of which the process has heard itself, on a terminal
            signal.raise_signal(signal.SIGTERM)
            raise subprocess.CalledProcessError(process.wait(), code)

    monkeypatch.setattr(timm_fsr.launch, "launch_command", launched)
    assert timm_fsr.launch.main(["train.py"]) == 143
    assert capfd.readouterr().err == ""
