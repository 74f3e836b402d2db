"""How a command fails: in one sentence, with the full trace in a file, or on the screen with `--debug`."""

from __future__ import annotations

import platform
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from timm_fsr.training.step import InterruptedRunError
from timm_fsr.utils.errors import UnsoundError
from timm_fsr.version import __version__

DEBUG = "--debug"
DEBUG_HELP = "`--debug`, with any command, prints the full trace of an error."

EXPECTED = (ValueError, OSError, FloatingPointError, ImportError, UnsoundError)
"""Errors whose message is written for the user: what was given, why it cannot work, what to do."""

_LESS_MEMORY = {
    "train": (
        "split each batch into parts with --optim.accumulate=2, recompute activations with "
        "--gradient_checkpointing=true, or lower --optim.batch_size; images that fill the memory are read one by one "
        "with --data.streamed=true"
    ),
    "evaluate": "lower --batch-size; images that fill the memory are fewer with --limit, or smaller with --size",
    "demo": "lower --limit",
}
"""By command, which flag lowers the need for memory."""


def without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may stand anywhere, and whether it was there."""
    own = arguments.index("--") if "--" in arguments else len(arguments)
    others = [argument for argument in arguments[:own] if argument != DEBUG]
    return [*others, *arguments[own:]], len(others) < own


def reported(command: str, run: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command, and print in one sentence what went wrong.

    Args:
        command: its name.
        run: does the work.
        debug: print the full trace of an error too.

    Returns:
        The exit status: 0; 1 after an error that nobody foresaw; 2 after one that the sentence explains; 128 plus the
        number of the signal that ended it, as shells say it: 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        run()
    except InterruptedRunError as stopped:
        _say(f"timm-fsr {command}: {stopped}")
        return 128 + stopped.number
    except KeyboardInterrupt:
        _say(f"timm-fsr {command}: interrupted; what was written so far is whole")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, sentence = explanation(command, error)
        where = "" if debug or status == 2 else f"; {_written_trace(error)}"
        _say(f"timm-fsr {command}: error: {sentence}{where}")
        return status
    return 0


def explanation(command: str, error: Exception) -> tuple[int, str]:
    """The exit status for an error, and a sentence that says what failed and what to do."""
    if is_out_of_memory(error):
        remedy = _LESS_MEMORY.get(command, "close other programs, or use a machine with more")
        return 2, f"the memory is full ({_short(error, 200)}); {remedy}"
    if isinstance(error, EXPECTED):
        return 2, str(error) or type(error).__name__
    return 1, f"it failed for a reason that timm-fsr did not foresee: {type(error).__name__}: {_short(error, 300)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that the memory of the machine or of a GPU is full."""
    found: BaseException | None = error
    while found is not None:
        text = str(found).lower()
        if isinstance(found, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(found, RuntimeError)
            and any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))
        ):
            return True
        found = found.__cause__
    return False


def _written_trace(error: Exception) -> str:
    """Write the trace to a new file, and say where it is."""
    trace = "".join(traceback.format_exception(error))
    versions = f"timm_fsr {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="timm-fsr-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(versions + trace)
    except OSError:
        return f"{DEBUG} shows the full trace"
    return f"the full trace is in {file.name} ({DEBUG} prints it)"


def _short(error: BaseException, length: int) -> str:
    return textwrap.shorten(str(error), length, placeholder=" ...") or "no message"


def _say(text: str) -> None:
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(text, markup=False)
