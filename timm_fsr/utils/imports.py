"""Something that is done as soon as another package is imported, so that nobody has to import it for that alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(package: str, action: Callable[[], object]) -> None:
    """Call `action` at once if `package` is imported already, else right after it is imported.

    An error of `action` is then that of the import. A package that is never imported costs nothing.

    Args:
        package: a package or a module of one, by its full name.
        action: what is done.
    """
    if package in sys.modules:
        action()
        return
    sys.meta_path.insert(0, _Watch(package, action))


class _Watch(MetaPathFinder):
    """Finds one package by the finders after it, and adds to what its loader does."""

    def __init__(self, package: str, action: Callable[[], object]) -> None:
        self.package, self.action, self.searching = package, action, False

    def find_spec(self, fullname: str, *_: Sequence[str] | ModuleType | None) -> ModuleSpec | None:
        """The specification of the package, by the finders after this one; None for every other package."""
        if fullname != self.package or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        loader = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return None
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # the spec may be looked up, and loaded, twice
                sys.meta_path.remove(self)
                self.action()

        loader.exec_module = execute_and_act  # type: ignore[method-assign]  # the import system asks the object for it
        return spec
