"""Attacks and objectives in words: what a report writes out as Python, such as "PGD(steps=20)", for readers."""

from __future__ import annotations

import ast
import re
from typing import Any

from timm_fsr.reports.report import format_eps

_LONGEST_CALL, _LONGEST = 300, 4_000  # characters: a report may come from anywhere, and parsing takes time
_CALL = re.compile(r"\b[A-Za-z_]\w*\(")
_LOSSES = {"ce": "cross-entropy", "dlr": "DLR", "carlini_wagner": "Carlini-Wagner"}
_LOSS = re.compile(r"\bon the loss (\w+)")
_PARTS = {  # of AutoAttack
    "apgd-ce": "APGD on the cross-entropy",
    "apgd-dlr": "APGD on the DLR loss",
    "apgd-t": "targeted APGD on the DLR loss",
    "fab": "FAB",
    "fab-t": "targeted FAB",
    "square": "Square, a black-box attack",
}


def in_words(detail: str, threat: tuple[str, float] | None = None) -> str:
    """An attack or an objective that is written out as Python, as a reader would say it.

    Args:
        detail: such as "PGD(norm='linf', eps=0.1, steps=20, restarts=1) on the loss dlr". What is no Python stays.
        threat: norm and eps that the reader knows: an attack in this very ball does not name it again.

    Returns:
        Such as "PGD (20 steps) on the DLR loss".
    """
    if len(detail) > _LONGEST:
        return detail
    found, rest = "", detail
    while match := _CALL.search(rest):
        call, length = _first_call(rest[match.start() :][:_LONGEST_CALL])
        words = rest[match.start() : match.end()] if call is None else _spoken(call, threat)
        found += rest[: match.start()] + words
        rest = rest[match.start() + length :] if call is not None else rest[match.end() :]
    return _LOSS.sub(lambda loss: f"on the {_LOSSES.get(loss[1], loss[1].replace('_', ' '))} loss", found + rest)


def stages_in_words(detail: str, names: list[str], threat: tuple[str, float] | None = None) -> dict[str, str]:
    """What each stage of a suite does, by its name; {} if `detail` does not have the form "name: what; name: what"."""
    places: list[tuple[int, int]] = []
    for name in names:
        start = 0 if not places else places[-1][1]
        place = detail.find(f"{'; ' if places else ''}{name}: ", start)
        if place < 0 or (not places and place > 0):
            return {}
        places.append((place, place + len(name) + (4 if places else 2)))
    if not places:
        return {}
    ends = [*(place for place, _ in places[1:]), len(detail)]
    return {
        name: in_words(detail[start:end], threat) for name, (_, start), end in zip(names, places, ends, strict=True)
    }


def _first_call(text: str) -> tuple[ast.Call | None, int]:
    """The Python call that a text begins with, and its length; None if it begins with none of keywords alone."""
    for close in re.finditer(r"\)", text):
        try:
            parsed = ast.parse(text[: close.end()], mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        if isinstance(parsed, ast.Call) and not parsed.args and all(word.arg for word in parsed.keywords):
            return parsed, close.end()
        break
    return None, 0


def _spoken(call: ast.Call, threat: tuple[str, float] | None) -> str:
    name = ast.unparse(call.func)
    given: dict[str, Any] = {str(word.arg): _value(word.value, threat) for word in call.keywords}
    part = given.get("name")
    if name == "Component" and isinstance(part, str):  # of AutoAttack
        name = f"AutoAttack's {_PARTS.get(part, part)}"
        given = {key: value for key, value in given.items() if key != "name"}
    terms = [*_ball(given, threat), *(_term(key, value) for key, value in given.items() if key not in ("norm", "eps"))]
    said = ", ".join(filter(None, terms))
    return f"{name} ({said})" if said else name


def _value(node: ast.expr, threat: tuple[str, float] | None) -> Any:
    if isinstance(node, ast.Call):
        return in_words(ast.unparse(node), threat)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _ball(given: dict[str, Any], threat: tuple[str, float] | None) -> list[str]:
    """The ball of an attack, unless it is the one of `threat`."""
    norm, eps = given.get("norm"), given.get("eps")
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if threat is not None and norm in (None, threat[0]) and (eps == threat[1] if number else eps is None):
        return []
    radius = [format_eps(float(eps), norm or "linf") if number else str(eps)] if eps is not None else []
    return [" ".join([str(norm).capitalize() if norm else "eps", *radius])] if norm or radius else []


def _term(key: str, value: Any) -> str:
    """One setting; "" for what needs no word: what is left to its default, and a single run."""
    words = key.replace("_", " ")
    if value is None or (key == "restarts" and value == 1):
        return ""
    if isinstance(value, bool):
        return f"{'' if value else 'no '}{words}"
    if key in ("steps", "restarts"):
        return f"{value} {words if value != 1 else words[:-1]}"
    if key == "version":
        return f"{value} version"
    return f"{words} {value:.4g}" if isinstance(value, float) else f"{words} {value}"
