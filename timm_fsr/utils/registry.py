"""Open families: layers, objectives, attacks and suites, found by name wherever they were defined."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from timm_fsr.utils.errors import unknown

Entry = TypeVar("Entry")

FLAG = "--import FILE_OR_MODULE"
_EXTENSION = "timm_fsr_extension_"
_extensions: dict[str, str] = {}  # the paths that `import_extension` was given, by the names of the modules it made


class Registry(Generic[Entry]):
    """The members of one family by name.

    A member is registered by a module of the family's own package, by an installed package's entry point, or by the
    user's code. The first two are loaded on first use.

    Args:
        what: noun for one member, used in messages, such as "feature layer".
        package: full name of the package whose modules register the members that come with timm_fsr.
        group: entry points of other packages; each has the name of the member that its module registers.
        dashes: whether "-" may stand in a name.
    """

    def __init__(self, what: str, *, package: str, group: str, dashes: bool = False) -> None:
        self.what, self.package, self.group, self.dashes = what, package, group, dashes
        self._entries: dict[str, Entry] = {}
        self._modules: dict[str, str] = {}
        self._places: dict[str, str] = {}  # where each was defined, for messages
        self._observers: list[Callable[[str], object]] = []
        self._package_imported = self._plugins_imported = False

    def add(self, name: str, entry: Entry, *, definition: Callable[..., object] | None = None) -> None:
        """Make `entry` known by `name`; the same definition may be added again, as by a module that is reloaded.

        Args:
            name: the name to look it up by.
            entry: the member.
            definition: the user's class or function, if `entry` wraps it.

        Raises:
            ValueError: the name is no identifier, or belongs to something else.
        """
        defined: Any = entry if definition is None else definition
        module = str(defined.__module__)
        where = f"{defined.__qualname__} in {_extensions.get(module, module)}"
        if not isinstance(name, str) or not (name.replace("-", "_") if self.dashes else name).isidentifier():
            raise RegistrationError(
                f"the {self.what} {where} has the name {name!r}; give it a class attribute `name` that is an identifier"
            )
        if self._places.get(name, where) != where:
            raise RegistrationError(
                f"the {self.what} name {name!r} is taken by {self._places[name]}; give {where} another name, or import "
                "that code only once"
            )
        if name in self._entries:
            self._entries[name], self._modules[name] = entry, module
            return
        self._entries[name], self._modules[name], self._places[name] = entry, module, where
        try:
            for observer in self._observers:
                observer(name)
        except ValueError:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Remove a member; an unknown name does nothing."""
        for known in (self._entries, self._modules, self._places):
            known.pop(name, None)

    def observe(self, observer: Callable[[str], object], *, past: bool = False) -> None:
        """Call `observer` with the name of every member that is added from now on.

        A ValueError from it refuses the member. With `past`, it is called for those that are known already too.
        """
        for name in list(self._entries) if past else ():
            observer(name)
        self._observers.append(observer)

    def own_names(self) -> list[str]:
        """Names of the members that are known without importing other packages, sorted."""
        self._import_package()
        return sorted(self._entries)

    def promised_names(self) -> list[str]:
        """Names that installed packages announce by their entry points, none of which is imported."""
        return sorted({point.name for point in importlib.metadata.entry_points(group=self.group)})

    def names(self) -> list[str]:
        """Names of all members, sorted; this imports the packages that announce some."""
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
            hint = unknown(self.what, name, self.names())
            raise ValueError(f"{hint}; if it is your own, import its code first: {FLAG}")
        return found

    def origin(self, name: str) -> str | None:
        """The file or module to import before `name` is known; None for what comes with timm_fsr."""
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
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._package_imported = False
            raise

    def _import_plugins(self) -> None:
        if self._plugins_imported:
            return
        self._plugins_imported = True
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                point.load()
            except (Exception, SystemExit) as error:  # foreign code may raise anything
                warnings.warn(
                    f"the entry point {point.name!r} of {self.group} ({point.value}) cannot be imported and is left "
                    f"out: {type(error).__name__}: {error}; update or uninstall the package that has it",
                    stacklevel=2,
                )


class RegistrationError(ValueError):
    """A member that cannot be registered; its message names the remedy."""


def import_extension(source: str) -> ModuleType:
    """Import the user's code that registers layers, objectives, attacks or suites; a second import does nothing.

    Args:
        source: path of a Python file, or the full name of a module, which is also looked for in the working directory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such module, or the code raises an error when it is imported.
    """
    if is_file_name(source):
        return _import_file(Path(source).expanduser().resolve(), source)
    if not all(part.isidentifier() for part in source.split(".")):
        raise ValueError(f"{source!r} is neither a Python file nor a module; write {FLAG}")
    directory = str(Path.cwd())
    if not {"", directory} & set(sys.path):  # the console script's first entry is its own folder
        sys.path.append(directory)
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
            raise ValueError(
                f"there is no module {source} to import; install its package, or give the path of a file: {source}.py"
            ) from error
        raise _failure(source, error) from error


def is_file_name(source: str) -> bool:
    """Whether `import_extension` takes it for a path, not for the name of a module."""
    return source.endswith(".py") or any(mark in source for mark in "/\\~") or Path(source).is_dir()


def split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What `--import` names in a command's arguments, and the arguments without them.

    Raises:
        ValueError: a flag without a value.
    """
    sources: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag != "--import":
            others.append(argument)
            continue
        source = value if equals else next(rest, "")
        if not source or source.startswith("-"):
            raise ValueError(f"--import has no value; write {FLAG}")
        sources.append(source)
    return sources, others


def _import_file(path: Path, source: str) -> ModuleType:
    if path.is_dir():
        raise ValueError(f"{source} is a folder; give the path of a Python file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {source} to import; give the path of a Python file, or a module")
    name = f"{_EXTENSION}{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    _extensions[name] = source
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)):
            raise _failure(source, error) from error
        raise
    return module


def _failure(source: str, error: BaseException) -> ValueError:
    if isinstance(error, RegistrationError):
        return error
    return ValueError(f"{source} cannot be imported: {type(error).__name__}: {error}; correct it and try again")
