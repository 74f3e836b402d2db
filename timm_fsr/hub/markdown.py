"""Text from outside in Markdown: shown as it was written, and nothing more than text."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# What renderers turn into a link without brackets (GitHub's "extended autolinks"). Escapes do not stop all of them,
# since some look at the finished text; none looks into code.
_AUTOLINK = re.compile(
    r"(?:[a-z][a-z0-9+.-]{1,30}://|www\.)[^\s`|<>]+|[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+", re.IGNORECASE
)

# By numbers where a backslash would not do: "\\(" and "$$" begin a formula on the Hub, and some look for HTML first.
_ENTITIES = {"\\": "&#92;", "$": "&#36;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\$<>]|[`*\[|~]|&(?=#?\w+;)|(?<![^\W_])_+|_+(?![^\W_])|(?<=\s)#(?=#*$)")
_BLOCK = re.compile(r"^([#+-](?!\d)|\d{1,9}(?=[.)](?:\s|$)))")  # begins a heading, list or rule where a line begins

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that only change the order in which others are shown."""

_ACTIVE = re.compile(r"<[A-Za-z/!?]|\]\s*[(\[:]|```|~~~|[\r\n]")


class Markup(str):
    """Markdown that is meant to act: it is not escaped again."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """One line of Markdown that shows the text of a value and does nothing else, in text, headings, lists and tables.

    Addresses become code, since renderers make links of them.
    """
    if isinstance(value, Markup):
        return value
    text, done, end = one_line(value), [], 0
    for address in _AUTOLINK.finditer(text):
        done += [_escaped(text[end : address.start()]), f"`{address[0]}`"]
        end = address.end()
    done.append(_escaped(text[end:]))
    return Markup(_BLOCK.sub(_block, "".join(done)))


def code(value: Any) -> Markup:
    """The text of a value as inline code, outside tables; "" for an empty one."""
    text = one_line(value)
    if not text:
        return Markup()
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def one_line(value: Any) -> str:
    """The text of a value without line breaks, control characters and changes of direction."""
    kept = (c for c in " ".join(str(value).split()) if unicodedata.category(c) != "Cc" and c not in _DIRECTIONS)
    return " ".join("".join(kept).split())


def without_code(line: str) -> str:
    """A line of Markdown without its inline code."""
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)


def is_active(text: str) -> bool:
    """Whether a text, as it is, would be HTML, a link, a picture, a code fence or several lines of Markdown."""
    return _ACTIVE.search(text.strip()) is not None


@functools.cache
def environment(package: str) -> Environment:
    """Where Markdown templates of a package are rendered: whatever they insert is escaped, but for `Markup`.

    The filter `markup` is for literal Markdown in a template's expressions, `code` for names of code, and `line` for
    text inside a block of code.
    """
    made = Environment(
        loader=PackageLoader(package), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=escape
    )
    made.filters |= {"markup": Markup, "code": code, "line": lambda value: Markup(one_line(value))}
    return made


def _escaped(text: str) -> str:
    return _SPECIAL.sub(_special, text)


def _special(found: re.Match[str]) -> str:
    text = found[0]
    if text == "&":
        return "&amp;"
    return _ENTITIES.get(text) or "".join(f"\\{character}" for character in text)


def _block(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"
