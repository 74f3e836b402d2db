"""How a recipe is written: YAML and flags read into dataclasses, strictly, with numbers such as 8/255."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type

from timm_fsr.training.catalog import find_recipe
from timm_fsr.utils.documents import DocumentError, read_yaml
from timm_fsr.utils.errors import unknown

Options = TypeVar("Options")


class _Number(float):
    """A float that may be written as a fraction."""


Number = _Number | float  # what jsonargparse tries first accepts "8/255"


def parse_number(value: Any) -> float:
    """A float from a number or from text such as "1e-3" or "8/255".

    Raises:
        ValueError: anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        fraction = isinstance(value, str) and "/" in value
        number = _Number(Fraction(value.replace(" ", "")) if fraction else value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value!r} is no number; write 0.03, 1e-3 or 8/255") from error
    return number


register_type(_Number, serializer=float, deserializer=parse_number)


def options_parser(options: type, *, prog: str, description: str) -> ArgumentParser:
    """A parser with --config and one flag per key of the dataclass `options`."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=description)
    parser.add_argument("--config", action="config", help="a YAML recipe; later flags override its keys")
    parser.add_class_arguments(options, as_group=False)
    return parser


def read_options(options: type[Options], arguments: Sequence[str], parser: ArgumentParser) -> Options:
    """The dataclass `options` from command-line arguments, by its `options_parser`.

    Raises:
        FileNotFoundError: no such recipe file.
        ValueError: an unknown key (the message names the nearest), or a value of another type.
    """
    arguments = _with_files(arguments)
    for key, value in _flags(arguments):
        if key == "config" and value is not None:
            _check_keys(options, _read_yaml(Path(value)), f" in {value}")
        elif key not in ("config", "help", "print_config"):
            _check_keys(options, _flag_values(key, value), "")
    flags = {key for key, _ in _flags(arguments)}

    def told(key: str, value: str) -> str:
        return f"--{key}={value}" if key in flags else f"{key}: {value} in the recipe"

    return _instance(options, parser, lambda: parser.parse_args(list(arguments)), told)


def read_values(options: type[Options], values: Mapping[str, Any], parser: ArgumentParser) -> Options:
    """The dataclass `options` from keys and values, by its `options_parser`.

    Raises:
        ValueError: see `read_options`.
    """
    _check_keys(options, values, "")
    return _instance(options, parser, lambda: parser.parse_object(dict(values)), lambda key, value: f"{key}={value}")


def _instance(
    options: type[Options], parser: ArgumentParser, parse: Callable[[], Any], told: Callable[[str, str], str]
) -> Options:
    """What `parse` gives as `options`; `told` writes a key and its value as the user has written them."""
    try:
        values = vars(parser.instantiate(parse()))
    except ArgumentError as error:
        raise ValueError(_explained(options, " ".join(str(error).split()), told)) from error
    values.pop("config", None)
    return _with_floats(options(**values))


def _explained(options: type, text: str, told: Callable[[str, str], str]) -> str:
    """A message of jsonargparse in our words, as far as it is one of those that users cause."""
    if found := re.match("[Uu]nrecognized arguments: (.*)", text):
        first = found[1].split()[0]
        if first.endswith((".yaml", ".yml")):
            return f"{first} stands alone; give a recipe by --config={first}"
        return f"{first!r} is no flag; write --{first}" if "=" in first else f"{first!r} is no flag of a recipe"
    found = re.match(r'Parser key "([\w.]+)"', text)
    values = re.findall(r"(?:Got value|Given value): (.*?)(?= - |$)", text)
    if not (found and values):
        return text
    wanted = _wanted(_hint(options, found[1]))
    return f"{told(found[1], values[-1])} is {wanted}" if wanted else text


def _hint(options: Any, key: str) -> Any:
    """The type of a dotted key; None if there is no such key."""
    head, _, rest = key.partition(".")
    hint = typing.get_type_hints(options).get(head)
    return _hint(hint, rest) if rest and dataclasses.is_dataclass(hint) else None if rest else hint


def _wanted(hint: Any) -> str:
    """What a value that is none of this type should be; "" for types without a word of their own."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) is Literal:
        return f"none of the choices; use {', '.join(map(str, kinds))}"
    if typing.get_origin(hint) in (list, dict):
        kinds = [typing.get_origin(hint)]
    known = {
        bool: "neither true nor false; write one of these",
        int: "no whole number; write one such as 10",
        _Number: "no number; write 0.03, 1e-3 or 8/255",
        list: "no list; write [ONE, TWO] in brackets",
        dict: "no keys and values; write {KEY: VALUE} in braces",
    }
    return next((known[kind] for kind in kinds if isinstance(kind, type) and kind in known), "")


def _with_floats(value: Any) -> Any:
    """Options whose numbers are plain floats: another class could not be read back from a checkpoint."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {entry.name: _with_floats(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **entries)
    return _plain(value)


def write_options(options: Any) -> str:
    """All keys of a dataclass, defaults included, as YAML that `read_options` reads."""
    return yaml.safe_dump(_plain(dataclasses.asdict(options)), sort_keys=False)


def _with_files(arguments: Sequence[str]) -> list[str]:
    """The arguments with the file of each recipe that --config names."""
    found = list(arguments)
    for position, argument in enumerate(found):
        if argument.startswith("--config="):
            found[position] = f"--config={find_recipe(argument.removeprefix('--config='))}"
        elif argument == "--config" and position + 1 < len(found):
            found[position + 1] = str(find_recipe(found[position + 1]))
    return found


def _flags(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """(key, value) of each "--key=value" or "--key value"."""
    found: list[tuple[str, str | None]] = []
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else None
            found.append((key, value if equals else following))
    return found


def _flag_values(key: str, value: str | None) -> dict[str, Any]:
    try:
        return _nested(key, value)
    except DocumentError as error:
        raise ValueError(f"--{key} cannot be read: {error}") from error


def _nested(key: str, value: str | None) -> dict[str, Any]:
    """What YAML would hold in place of a flag: {"optim": {"epochs": 5}} for "optim.epochs" and "5"."""
    head, _, rest = key.removesuffix("+").partition(".")
    if rest:
        return {head: _nested(rest, value)}
    try:
        return {head: read_yaml(value or "''")}
    except DocumentError:
        raise
    except ValueError:
        return {head: value}


def _check_keys(options: Any, given: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuse keys that the dataclass `options` has no field for, and null where it is no value.

    Dictionaries inside take any key.
    """
    hints = typing.get_type_hints(options)
    for key, value in given.items():
        if key not in hints:
            raise ValueError(unknown(f"recipe key{where}", f"{prefix}{key}", [f"{prefix}{name}" for name in hints]))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"recipe key{where} '{prefix}{key}' holds {value!r}; write keys and values below it")
            _check_keys(hints[key], value, where, f"{prefix}{key}.")
        elif value is None and type(None) not in typing.get_args(hints[key]):
            raise ValueError(f"recipe key{where} '{prefix}{key}' is null; write a value or leave it out")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except DocumentError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no recipe; write keys and values, such as 'seed: 0'")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, float) else value
