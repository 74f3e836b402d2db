"""What is taken out of texts before they leave the machine: where files lie, and secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SECRET = "***"
"""What is shown in place of a token or password."""

_ROLES = ("best", "last")  # folders inside a run, which say nothing without its name
_SHORTEST = 8  # characters of a token that can be looked for: shorter ones stand in other words
_LONG = 20  # characters from which on the value of any parameter of an address is taken for a secret

_PART = r"(?:[^\s/\\\[\],;|\"'<>]|[,;](?=\S))+"
_FOUND = re.compile(
    rf"""
    (?P<path>
        (?: (?<![\w.+-]) (?:file|smb|cifs|nfs|sftp|ssh|scp|ftps?):(?=[/\\])  # addresses that are places, not pages
          | (?<![\w/\\.~:$%-]) [\w.-]+@[\w.-]+:(?=[/~])                      # joe@host:/home/joe
          | (?<![\w/\\.~$%]) )
        (?: (?: ~[\w.-]* | \$\w+ | \$\{{\w+\}} | %\w+% | [A-Za-z]: | \.\.? ) [/\\]+ (?:{_PART}[/\\]+)*
          | [/\\]+ (?:{_PART}[/\\]+)+ )
        (?:{_PART})? )
  | (?<![\w.+-]) (?P<address> [A-Za-z][A-Za-z0-9+.-]+:// [^\s"'<>]+ )
  | local-dir:(?P<folder> [/\\]* (?:{_PART}[/\\]+)* {_PART} [/\\]* )
  | (?<![^\s\[\]|"'<>]) (?P<above> (?:{_PART}[/\\]+)+ \.\. [/\\]+ (?:{_PART}[/\\]+)* {_PART} )
    """,
    re.VERBOSE,
)
_PLACE = re.compile(r"[/\\]|~|[A-Za-z]:[/\\]|\.\.?[/\\]|\$\{?\w+\}?[/\\]|%\w+%[/\\]")
_HOME = re.compile(r"(?:(?:[A-Za-z]:)?[/\\]+(?:home|users)[/\\]+[^/\\]+|~[^/\\]*)[/\\]*", re.IGNORECASE)

_SECRET_NAMES = (
    r"(?:(?:hf|hub|api|auth|access|bearer|refresh|github|client)[_-]?)?(?:token|secret)"
    r"|(?:api|access|secret|private|wandb)[_-]?(?:api[_-]?)?key|passw(?:or)?d|pwd"
)
_NAMED = re.compile(rf"(?<![\w-])(?P<name>(?:{_SECRET_NAMES})\s*=\s*)[^\s&,;)\"']{{6,}}", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:(?:hf|ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|AKIA[A-Z0-9]{12,}|xox[abprs]-[\w-]{10,})"
)
_LOGIN = re.compile(r"(?<![\w/:@.%+-])(?!hf[-_]hub:)[\w.%+-]+:[^\s/:@]+@(?=(?:[\w-]+\.)+[A-Za-z]{2,})")


def without_traces(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """The same JSON values without secrets, and with each path that says where something lay cut to its last part.

    Paths are cut that begin at a root (of a drive or share too), at a home or above the folder, also in "local-dir:"
    and "hf-hub:" names and in addresses of files. Other addresses lose their login and what looks like a secret.

    Args:
        value: JSON values.
        known: what to show of paths that may stand in it and could not be recognised inside a sentence, because they
            are relative or have spaces.
    """
    known = known or {}
    if isinstance(value, str):
        return _without_traces(value, known)
    if isinstance(value, Mapping):
        return {
            without_traces(key, known): SECRET if _names_secret(key, entry) else without_traces(entry, known)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_traces(entry, known) for entry in value]
    return value


def without_secrets(text: str) -> str:
    """The text with access tokens, logins and named secrets replaced by "***" or left out."""
    return _NAMED.sub(rf"\g<name>{SECRET}", _TOKEN.sub(SECRET, _LOGIN.sub("", text)))


def holds_token(text: str, own: str | None = None) -> bool:
    """Whether a text has an access token in it: one of a known form, or `own`, the one in use."""
    return _TOKEN.search(text) is not None or (own is not None and len(own) >= _SHORTEST and own in text)


def is_place(text: str) -> bool:
    """Whether a whole text is a path from a root, from somebody's home or from "." or "..", spaces included."""
    return _PLACE.match(text) is not None


def texts(value: Any) -> Iterator[str]:
    """Every text in JSON values, keys of dictionaries among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from texts(entry)


def telling_part(path: str) -> str:
    """The last part of a path that says something; "~" for somebody's home."""
    if _HOME.fullmatch(path):
        return "~"
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", "~", ".", "..")]
    telling = [part for part in parts if part not in _ROLES]
    return (telling or parts or [path])[-1]


def _without_traces(text: str, known: Mapping[str, str]) -> str:
    for path in sorted(known, key=len, reverse=True):
        shown = known[path].replace("\\", "\\\\")
        text = re.sub(rf"(?<![\w./~-]){re.escape(path)}(?![\w-])", shown, text)
    home = re.escape(str(Path.home()))  # which may have spaces
    text = re.sub(rf"(?<![\w./~-]){home}(?=[/\\])", "~", text)
    return without_secrets(_FOUND.sub(_cut, text))


def _names_secret(key: Any, entry: Any) -> bool:
    return isinstance(entry, str) and re.fullmatch(_SECRET_NAMES, str(key), re.IGNORECASE) is not None


def _cut(found: re.Match[str]) -> str:
    """What is shown in place of an address or path."""
    if found["address"]:
        return _address(found["address"])
    if found["folder"]:
        return f"local-dir:{telling_part(found['folder'])}"
    path = re.sub(r"^(?:[A-Za-z]{2,}:|[\w.-]+@[\w.-]+:)", "", found["path"] or found["above"])
    return "~" if _HOME.fullmatch(path) else re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _address(url: str) -> str:
    """An address without the login and the secrets in it."""
    scheme, _, rest = url.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    path = re.split("[?#]", rest[len(host) :], maxsplit=1)[0]
    parameters = re.sub(r"[^&;?#]+", _parameter, rest[len(host) + len(path) :])
    return f"{scheme}://{host.rpartition('@')[2]}{path}{parameters}"


def _parameter(found: re.Match[str]) -> str:
    """A parameter of an address, if it holds no secret."""
    name, equals, value = found[0].partition("=")
    if not equals:
        return SECRET if len(name) >= _LONG else name
    secret = len(value) >= _LONG or re.search("token|key|secret|sig|pass|pwd|auth|cred|user|login", name, re.IGNORECASE)
    return f"{name}={SECRET if secret else value}"
