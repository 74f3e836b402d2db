"""Sharing: what one process finds out, known to all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def from_main(accelerator: Accelerator | None, make: Callable[[], Result]) -> Result:
    """What `make` gives on the main process, given to each one; so is an error, lest the others wait for ever.

    Args:
        accelerator: of the processes; None is one process alone.
        make: called on the main process only; what it returns can be pickled.
    """
    if accelerator is None:
        return make()
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            found[1] = error
    found = broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: Result = found[0]
    return result
