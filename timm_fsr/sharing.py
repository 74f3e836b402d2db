"""Sharing: what one process finds out, known to all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

Result = TypeVar("Result")


def check_agreement(accelerator: Accelerator | None, value: str, what: str) -> None:
    """Refuse to go on where processes that share work do not have the same, which would count some of it twice.

    Args:
        accelerator: of the processes; None is one process alone.
        value: this process's.
        what: they have to agree in, for the message.

    Raises:
        ValueError: they differ; on every process.
    """
    if accelerator is None:
        return
    found = gather_object([value])
    if len(set(found)) > 1:
        raise ValueError(
            f"the processes have different {what} ({', '.join(found)}); give each one the same, in the same order"
        )


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
