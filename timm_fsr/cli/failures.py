"""How a command fails: in one sentence, with the full trace in a file, or on the screen with `--debug`."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Sequence

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


_FLAGS = {
    "evaluate": ("size", "channels", "limit", "split", "config", "image_column", "label_column", "class_order", "norm")
    + ("eps", "attacks", "seed", "batch_size", "num_classes", "model_args"),
    "demo": ("epochs", "limit", "seed"),
}
"""By command, arguments of Python that are flags of the same name."""

_UNQUOTED = r"(?<![\w.\-/'\"`{(])"


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
    except KeyboardInterrupt:
        _say(f"timm-fsr {command}: interrupted; what was written so far is whole")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, sentence = explanation(command, error)
        where = "" if debug or status != 1 else f"; {_written_trace(error)}"
        _say(f"timm-fsr {command}: {sentence}{where}")
        return status
    return 0


def explanation(command: str, error: Exception) -> tuple[int, str]:
    """The exit status for an error, and a sentence that says what failed and what to do."""
    # Here, as they load torch: a command that does not fail, such as one for help, need not wait for it.
    from timm_fsr.training.step import InterruptedRunError
    from timm_fsr.utils.errors import UnsoundError, is_out_of_memory, killed_worker

    if isinstance(error, InterruptedRunError):
        return 128 + error.number, str(error)
    if is_out_of_memory(error):
        remedy = _LESS_MEMORY.get(command, "close other programs, or use a machine with more")
        return 2, f"error: the memory is full ({_short(error, 200)}); {remedy}"
    if killed := killed_worker(error):
        return 2, f"error: {killed}"
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError, UnsoundError)):  # written for users
        return 2, f"error: {in_flags(command, str(error) or type(error).__name__)}"
    return 1, f"error: {type(error).__name__}, which timm-fsr did not foresee: {_short(error, 300)}"


def in_flags(command: str, text: str) -> str:
    """A message about arguments in the words of the command line: "size=0" is "--size=0" there.

    Keys of recipes get the dashes too. What stands in quotes or in a path is left alone.
    """
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


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
