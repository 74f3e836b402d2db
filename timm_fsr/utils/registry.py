"""Open families: layers, objectives, attacks and suites, found by name wherever they were defined."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from timm_fsr.utils.errors import unknown

Entry = TypeVar("Entry")

_EXTENSION = "timm_fsr_extension_"
_extensions: dict[str, str] = {}  # what `import_extension` was given, by the name of the module that it made


class Registry(Generic[Entry]):
    """The members of one family by name.

    A member comes from one of three places: a module of the family's own package, which registers it when it is
    imported; an installed package that names it as an entry point; or code of the user, imported by hand or by
    `import_extension`. The first two are looked for when they are first needed.

    Args:
        what: one member is called, for messages: "feature layer".
        package: full name of the package whose modules register the members that come with timm_fsr.
        group: the entry points of other packages that are imported for theirs.
        dashes: whether "-" may stand in a name.
    """

    def __init__(self, what: str, *, package: str, group: str, dashes: bool = False) -> None:
        self.what, self.package, self.group, self.dashes = what, package, group, dashes
        self._entries: dict[str, Entry] = {}
        self._modules: dict[str, str] = {}
        self._places: dict[str, str] = {}  # of the definition, for people
        self._observers: list[Callable[[str], None]] = []
        self._package_imported = self._plugins_imported = False

    def add(self, name: str, entry: Entry, *, definition: Callable[..., object] | None = None) -> None:
        """Make `entry` known by `name`; the same definition may be added again, as by a module that is reloaded.

        Args:
            name: by which it will be asked for.
            entry: the member.
            definition: the class or function that the user wrote, where `entry` is made of it.

        Raises:
            ValueError: the name is no identifier, or belongs to something else.
        """
        defined: Any = entry if definition is None else definition
        module = str(defined.__module__)
        where = f"{defined.__qualname__} in {_extensions.get(module, module)}"
        if not isinstance(name, str) or not (name.replace("-", "_") if self.dashes else name).isidentifier():
            raise ValueError(f"the {self.what} {where} is called {name!r}; give it a `name` that is an identifier")
        if self._places.get(name, where) != where:
            raise ValueError(
                f"a {self.what} named {name!r} is registered already ({self._places[name]}); choose another"
            )
        new = name not in self._entries
        self._entries[name], self._modules[name], self._places[name] = entry, module, where
        if new:
            for observer in self._observers:
                observer(name)

    def remove(self, name: str) -> None:
        """Forget a member; unknown names are ignored."""
        for known in (self._entries, self._modules, self._places):
            known.pop(name, None)

    def observe(self, observer: Callable[[str], None]) -> None:
        """Call `observer` with the name of every member that is added from now on."""
        self._observers.append(observer)

    def own_names(self) -> list[str]:
        """Names of the members that are known without looking into other packages, sorted."""
        self._import_package()
        return sorted(self._entries)

    def names(self) -> list[str]:
        """Names of all members, sorted."""
        self._import_package()
        self._import_plugins()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> Entry:
        """The member called `name`.

        Raises:
            ValueError: there is none; the message names the nearest.
        """
        found = self._find(name)
        if found is None:
            raise ValueError(unknown(self.what, name, self.names()))
        return found

    def origin(self, name: str) -> str | None:
        """What has to be imported before `name` is known: a file or a module; None for what comes with timm_fsr."""
        module = self._modules.get(name, "")
        if module.partition(".")[0] == self.package.partition(".")[0]:
            return None
        return _extensions.get(module, module) or None

    def _find(self, name: object) -> Entry | None:
        if name not in self._entries:
            self._import_package()
        if name not in self._entries:
            self._import_plugins()
        return self._entries.get(name) if isinstance(name, str) else None

    def _import_package(self) -> None:
        if self._package_imported:
            return
        self._package_imported = True  # first, as these modules may ask for names themselves
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _import_plugins(self) -> None:
        if self._plugins_imported:
            return
        self._plugins_imported = True
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # whatever foreign code raises
                warnings.warn(
                    f"the entry point {point.name!r} of {self.group} ({point.value}) cannot be imported and is left "
                    f"out: {type(error).__name__}: {error}; update or uninstall the package that has it",
                    stacklevel=2,
                )


def import_extension(source: str) -> ModuleType:
    """Import code of the user that registers layers, objectives or attacks; twice does nothing new.

    Args:
        source: path of a Python file, or the full name of a module.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such module, or the code raises an error when it is imported.
    """
    if source.endswith(".py") or "/" in source or "\\" in source:
        path = Path(source).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source} to import; give the path of a Python file, or a module")
        name = _EXTENSION + re.sub(r"\W", "_", str(path.with_suffix("")))
        _extensions[name] = source
        return sys.modules[name] if name in sys.modules else _run(name, path, source)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(f"{error.name}.")):
            raise ValueError(
                f"there is no module {source} to import; install its package, or give the path of a file: {source}.py"
            ) from error
        raise ValueError(_failed(source, error)) from error
    except Exception as error:
        raise ValueError(_failed(source, error)) from error


def _run(name: str, path: Path, source: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(_failed(source, error)) from error
    return module


def _failed(source: str, error: Exception) -> str:
    return f"{source} cannot be imported: {type(error).__name__}: {error}; correct it and try again"
