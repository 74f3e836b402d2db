"""`python -m timm_fsr.launch ...` is `accelerate launch ...` without its trace: what the processes say is enough."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
import torch.distributed.run  # noqa: F401  (makes the loggers that are silenced below)
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str]) -> int:
    """Launch processes as Accelerate does, and wait for them.

    Args:
        arguments: of `accelerate launch`.

    Returns:
        0; the exit status of the process that failed first, which has said why; 130 after Ctrl-C and 143 after SIGTERM,
        which the processes are told of and may save their work after.
    """
    options = launch_command_parser().parse_args(list(arguments))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    handlers = {signal.SIGINT: _wait_on, signal.SIGTERM: _pass_on}  # torch sets its own where there are several
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        launch_command(options)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        return _status(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _status(error.returncode)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"timm_fsr.launch: error: {error}\n")
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _wait_on(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C on a terminal reaches the process that works too, which ends by itself."""


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Others send a signal to the launcher alone."""
    for child in psutil.Process().children():
        child.send_signal(number)


def _status(code: int) -> int:
    """The exit status of a process, as shells say it where a signal ended it."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
