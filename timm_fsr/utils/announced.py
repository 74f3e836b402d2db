"""Names of the members of an open family, read from the source of its package without importing it.

Help texts list them. Importing layers, objectives or attacks takes seconds, as they need torch.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LISTED = "NAMES"  # a module's own list of names that it registers otherwise than by decorators


def announced(package: str, decorator: str) -> dict[str, frozenset[str]]:
    """What the modules of `package` register, in the order of their names.

    Found are classes decorated with `@<decorator>` that have a class attribute `name`, functions decorated with
    `@<decorator>("name", ...)`, and the texts in a tuple that the module calls NAMES.

    Args:
        package: full name.
        decorator: such as "register_layer".

    Returns:
        By name: the attributes of the class, or those keyword arguments of the decorator that are True.
    """
    found: dict[str, frozenset[str]] = {}
    for file in _files(package):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            found.update(_of_node(node, decorator))
    return dict(sorted(found.items()))


def _files(package: str) -> Iterator[Path]:
    """The modules of a package, which is not imported; but what it lies in is, so that must be light."""
    parent, _, _ = package.rpartition(".")
    spec = importlib.util.find_spec(package) if parent else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for module in pkgutil.iter_modules([folder]):
            if not module.ispkg:
                yield Path(folder) / f"{module.name}.py"


def _of_node(node: ast.stmt, decorator: str) -> dict[str, frozenset[str]]:
    if isinstance(node, ast.Assign) and [_name(target) for target in node.targets] == [_LISTED]:
        return dict.fromkeys(ast.literal_eval(node.value), frozenset())
    if isinstance(node, ast.ClassDef) and decorator in map(_name, node.decorator_list):
        values = _attributes(node)
        return {values["name"]: frozenset(values)} if isinstance(values.get("name"), str) else {}
    if isinstance(node, ast.FunctionDef):
        calls = [call for call in node.decorator_list if isinstance(call, ast.Call) and _name(call.func) == decorator]
        return {ast.literal_eval(call.args[0]): _true_keywords(call) for call in calls}
    return {}


def _attributes(node: ast.ClassDef) -> dict[str, Any]:
    """Names that the body of a class assigns or annotates, with the values that are literals, else None."""
    values: dict[str, Any] = {}
    for entry in node.body:
        targets = entry.targets if isinstance(entry, ast.Assign) else [getattr(entry, "target", None)]
        value = getattr(entry, "value", None)
        for name in filter(None, map(_name, targets)):
            values[name] = value.value if isinstance(value, ast.Constant) else None
    return values


def _true_keywords(call: ast.Call) -> frozenset[str]:
    constants = [word for word in call.keywords if isinstance(word.value, ast.Constant) and word.value.value is True]
    return frozenset(word.arg for word in constants if word.arg)


def _name(node: ast.expr | None) -> str:
    """The identifier, or the last one of a dotted name."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
