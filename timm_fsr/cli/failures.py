"""How a command fails: in one sentence, with the full trace in a file, or on the screen with `--debug`."""

from __future__ import annotations

import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from timm_fsr.utils.errors import UnsoundError, is_out_of_memory
from timm_fsr.version import __version__

DEBUG = "--debug"
DEBUG_HELP = "`--debug`, with any command, prints the full trace of an error."

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

_FEWER_WORKERS = (
    "if the memory was full, lower --data.workers (0 decodes without further processes), --data.size or "
    "--optim.batch_size; a training that has saved a checkpoint goes on with --resume=true"
)

_READING = ("size", "channels", "limit", "split", "config", "image_column", "label_column", "class_order", "on_error")
_FLAGS: dict[str, tuple[str, ...]] = {
    "evaluate": (*_READING, "norm", "eps", "attacks", "seed", "batch_size"),
    "demo": ("epochs", "limit", "seed"),
    "export": ("size", "formats"),
}
"""By command, arguments of Python that are flags of the same name."""

_STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_UNQUOTED = r"(?<![\w.\-/'\"`{(])"


def without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may stand anywhere, and whether it was there."""
    own = arguments.index("--") if "--" in arguments else len(arguments)
    others = [argument for argument in arguments[:own] if argument != DEBUG]
    return [*others, *arguments[own:]], len(others) < own


class Terminated(KeyboardInterrupt):
    """SIGTERM came; no `except Exception` is to swallow it."""


def reported(command: str, run: Callable[[], None], arguments: Sequence[str] = (), *, debug: bool = False) -> int:
    """Run a command, and print in one sentence what went wrong.

    Args:
        command: its name.
        run: does the work.
        arguments: of the command, for the line that tells how to go on.
        debug: print the full trace of an error too.

    Returns:
        The exit status: 0; 1 after an error that nobody foresaw; 2 after one that the sentence explains; 128 plus the
        number of the signal that ended it, as shells say it: 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _terminable():
            run()
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        _say_once(f"timm-fsr {command}: stopped by {_STOPS[number]}; {going_on(command, arguments)}")
        return 128 + number
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, sentence = explanation(command, error)
        where = "" if debug or status != 1 else f"; {_written_trace(error)}"
        (_say_once if status > 128 else _say)(f"timm-fsr {command}: {sentence}{where}")
        return status
    return 0


def going_on(command: str, arguments: Sequence[str]) -> str:
    """What a user does after a command was stopped."""
    if command == "evaluate":
        if not any(argument.split("=")[0] == "--output" for argument in arguments):
            return "nothing is kept; with --output FOLDER the same command would go on from here"
        again = [argument for argument in arguments if argument != "--overwrite"]  # it would delete what was reached
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return "the same command goes on from here"
        return f"go on with timm-fsr evaluate {shlex.join(again)}"
    return "what was written so far is whole"


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends the command as Ctrl-C does: files that are half written are removed."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explanation(command: str, error: Exception) -> tuple[int, str]:
    """The exit status for an error, and a sentence that says what failed and what to do."""
    status = getattr(error, "status", None)  # of an InterruptedRunError, whose file would have to load torch
    if isinstance(error, RuntimeError) and isinstance(status, int):
        return status, str(error)
    if is_out_of_memory(error):
        remedy = _LESS_MEMORY.get(command, "close other programs, or use a machine with more")
        return 2, f"error: the memory is full ({_short(error, 200)}); {remedy}"
    unsound = next((cause for cause in (error, error.__cause__) if isinstance(cause, UnsoundError)), None)
    if unsound is not None:  # also in an error of torch's compiler
        return 2, f"error: {unsound}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return 2, f"error: a process that decodes images was killed ({_short(error, 200)}); {_FEWER_WORKERS}"
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)):  # written for users
        return 2, f"error: {in_flags(command, str(error) or type(error).__name__)}"
    return 1, f"error: {type(error).__name__}, which timm-fsr did not foresee: {_short(error, 300)}"


def in_flags(command: str, text: str) -> str:
    """A message about arguments in the words of the command line: "size=0" is "--size=0" there.

    Keys of recipes get the dashes too. Text in quotes or in a path is left alone.
    """
    if "on the command line" in text:  # it says it itself
        return text
    if command == "train":
        from timm_fsr.training.recipe import recipe_parser

        keys = sorted((action.dest for action in recipe_parser()._actions), key=len, reverse=True)
        inner, outer = [key for key in keys if "." in key], [key for key in keys if "." not in key]
        named = rf"(?:{_any_of(inner)})(?![\w/-])|(?:{_any_of(outer)})(?==)"
        return re.sub(_UNQUOTED + f"(?:{named})", lambda found: f"--{found[0]}", text)
    if command not in _FLAGS:
        return text
    named = rf"(?:{_any_of(_FLAGS[command])})(?==)"
    text = re.sub(_UNQUOTED + named, lambda found: f"--{found[0].replace('_', '-')}", text)
    return text.replace(", or None ", ", or leave it out ")


def _any_of(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _written_trace(error: Exception) -> str:
    """Write the trace to a new file, and say where it is."""
    import torch

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


def _say_once(text: str) -> None:
    """Print what all processes of a launch would say, on the first one alone."""
    if os.environ.get("RANK", "0") == "0":
        _say(text)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
