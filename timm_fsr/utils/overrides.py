"""Attributes that a block changes for its while: blocks end in any order, and threads do not contradict each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Setting = tuple[Any, str, Any]
"""An object, one of its attributes, and the value it has within the block."""


class _Slot:
    """One attribute of one object: its value before, and what the blocks that are open want it to be."""

    def __init__(self, owner: Any, before: Any) -> None:
        self.owner, self.before = owner, before
        self.wanted: dict[object, tuple[int, Any]] = {}  # by block, in the order of opening: its thread and its value


_SLOTS: dict[tuple[int, str], _Slot] = {}
_LOCK = threading.RLock()


@contextmanager
def overridden(settings: Iterable[Setting], *, by: Callable[[], object] | None = None) -> Iterator[None]:
    """Within it the attributes have these values; of several open blocks the one opened last decides.

    What an attribute was before comes back when the last block that changes it ends, also after an exception.

    Args:
        settings: object, attribute and value.
        by: called in the place of plain assignments; what it leaves in the attributes is what they are meant to be.

    Raises:
        RuntimeError: a block of another thread wants another value of an attribute at the same time.
    """
    block, keys = object(), []
    settings, thread = list(settings), threading.get_ident()
    with _LOCK:
        for owner, name, value in settings:
            slot = _SLOTS.get((id(owner), name))
            if slot is not None and any(
                owned_by != thread and other != value for owned_by, other in slot.wanted.values()
            ):
                raise RuntimeError(
                    f"another thread has set {name!r} of a {type(owner).__name__} of this model otherwise, as "
                    "attack_mode and noisy do for their while; give each thread its own copy.deepcopy(model)"
                )
        for owner, name, value in settings:
            key = id(owner), name
            if key not in _SLOTS:
                _SLOTS[key] = _Slot(owner, getattr(owner, name))
            _SLOTS[key].wanted[block] = thread, value
            keys.append(key)
    try:
        with _LOCK:
            if by is not None:
                by()
            for owner, name, value in settings:
                if by is None:
                    setattr(owner, name, value)
                else:
                    _SLOTS[id(owner), name].wanted[block] = thread, getattr(owner, name)
        yield
    finally:
        with _LOCK:
            for key in reversed(keys):
                slot = _SLOTS[key]
                slot.wanted.pop(block, None)
                if slot.wanted:
                    setattr(slot.owner, key[1], list(slot.wanted.values())[-1][1])
                else:
                    setattr(slot.owner, key[1], slot.before)
                    del _SLOTS[key]
