"""Memo: what takes long is kept in a file as soon as it is known, for as long as it is about the same thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm_fsr.files import write_text


class Memo:
    """Plain JSON values by name.

    Args:
        path: of the file; one that is damaged, or about something else, counts for nothing.
        key: what they are about.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        self._key = json.loads(json.dumps(key))
        self._known: dict[str, Any] = {}
        try:
            found = json.loads(path.read_bytes())
            if found["key"] == self._key:
                self._known = dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            return

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known as `name`, else what `make` gives, which is on the disk when this returns."""
        if name not in self._known:
            self._known[name] = make()
            write_text(self._path, json.dumps({"key": self._key, "parts": self._known}) + "\n")
        return json.loads(json.dumps(self._known[name]))  # a copy, and the same whether it was known or not
