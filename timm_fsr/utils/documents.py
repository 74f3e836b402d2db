"""YAML and JSON texts, read strictly: what is ambiguous, endless or too deep is refused in one sentence."""

from __future__ import annotations

import json
from typing import Any

import yaml

DEEPEST = 50
"""Levels of lists and mappings inside each other; recipes and reports have fewer than ten."""

LARGEST = 100_000
"""Values that a YAML text may stand for once its aliases are written out."""


class DocumentError(ValueError):
    """A text that its format allows and nobody means: a key twice, an endless or exploding alias, too many levels."""


def read_yaml(text: str) -> Any:
    """The plain value that a YAML text stands for; no code in it is run.

    Raises:
        DocumentError: a key is there twice, aliases refer to themselves or explode, or levels are too many.
        ValueError: it is no YAML, or holds a value that YAML itself cannot read, such as the 13th month.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_json(text: str | bytes) -> Any:
    """The plain value that a JSON text stands for.

    Raises:
        DocumentError: a key is there twice, or levels are too many.
        ValueError: it is no JSON, or no UTF-8.
    """
    try:
        return json.loads(text, object_pairs_hook=_unambiguous)
    except RecursionError:
        raise DocumentError("it has too many lists and mappings inside each other") from None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DocumentError(f"the key {twice!r} is there twice; keep one of them")
    return found


class _StrictLoader(yaml.SafeLoader):
    """Refuses while the nodes are composed, before any of them is written out."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of the nodes that are complete, by id; aliases inside are written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST:
            raise DocumentError(f"line {line} has more than {DEEPEST} lists and mappings inside each other")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and id(node) not in self._sizes:
            raise DocumentError(f"the alias in line {line} refers to something that holds it, so it has no end")
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
        if self._sizes[id(node)] > LARGEST:
            raise DocumentError(f"the aliases up to line {line} stand for more than {LARGEST:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                line = key.start_mark.line + 1
                raise DocumentError(f"the key {key.value!r} is there twice, again in line {line}; keep one of them")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
