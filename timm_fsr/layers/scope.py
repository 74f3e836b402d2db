"""Scopes: what is open around a forward pass, for the thread or task that opened it and for no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import nn


class Call(NamedTuple):
    """How a site calls its layer.

    Attributes:
        wants_aux: somebody will look at the auxiliary outputs.
        surrogate: the stand-in that is selected, if any.
    """

    wants_aux: bool
    surrogate: str | None


class Scope:
    """One open block and the modules it is about.

    A block may end out of order, or in another thread than it began in. It is closed then for whoever still holds it.
    """

    def __init__(self, modules: Iterable[nn.Module], value: Any) -> None:
        self.members = {id(module): module for module in modules}  # held, so that no other module gets their ids
        self.value = value
        self.closed = False

    def close(self) -> None:
        """End the block, and let go of all that it held."""
        self.closed = True
        self.members, self.value = {}, None


Scopes = ContextVar[tuple[Scope, ...]]

# Context variables: a new thread begins with none, and torch.compile looks at what they hold before it runs old code.
CALL: ContextVar[Call | None] = ContextVar("timm_fsr_call", default=None)
RECORDINGS: Scopes = ContextVar("timm_fsr_recordings", default=())
SURROGATES: Scopes = ContextVar("timm_fsr_surrogates", default=())


@contextmanager
def opened(scopes: Scopes, modules: Iterable[nn.Module], value: Any) -> Iterator[Scope]:
    """Within it `innermost(scopes, module)` is this scope for each of `modules`, unless another one is opened."""
    scope = Scope(modules, value)
    scopes.set((*scopes.get(), scope))
    try:
        yield scope
    finally:
        scope.close()
        scopes.set(tuple(other for other in scopes.get() if not other.closed))


def innermost(scopes: Scopes, module: nn.Module) -> Scope | None:
    """The scope opened last that is about `module` and still open."""
    for scope in reversed(scopes.get()):
        if not scope.closed and id(module) in scope.members:
            return scope
    return None
