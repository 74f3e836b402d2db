"""Talking to the Hub: its errors in words that say what to do, and another try where that can help."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0)
"""Seconds before the second, third and fourth try."""

_BUSY = (429, 500, 502, 503, 504)
_UNDONE = (429, 503)  # with these the request was not even begun
_CONFLICT = (409, 412)  # somebody else has committed at the same time
_TOKEN = "run `hf auth login`, set HF_TOKEN to a valid token, or unset it for public models"
_log = logging.getLogger(__name__)


@contextmanager
def explained(name: str, *, writing: bool = False) -> Iterator[None]:
    """Errors of the Hub within it become the system's own kinds, with a sentence that says what to do.

    Args:
        name: of the repository, for the message.
        writing: is something being pushed? The message then says in what state that is left.

    Raises:
        FileNotFoundError: no such repository, revision or file, or it is not in the cache and there is no network.
        PermissionError: the token is missing, wrong or not entitled.
        ConnectionError: the Hub cannot be reached, or is busy.
        ValueError: a name that no repository can have.
    """
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository ({_first(error)}); write user/name") from error
    except Exception as error:
        found = _explanation(error, name, _UPLOADS if writing else _CASES)
        if found is None:
            raise
        kind, text = found
        after = "; nothing of the model was committed" if writing and kind is not ConnectionError else ""
        if writing and kind is ConnectionError:
            after = "; the Hub holds either all of this push or nothing of it: the same command completes it"
        raise kind(f"{text}{after}") from error


def retried(action: Callable[[], Result], *, once_sent: bool = True) -> Result:
    """What `action` returns, tried again while the Hub is busy, unreachable or somebody commits at the same time.

    Args:
        action: has to do no harm when it is done twice.
        once_sent: try again too when nobody knows whether the action was done: after a broken connection, or when what
            stands before the Hub (500, 502, 504) has answered in its place.
    """
    passing = (*_CONFLICT, *(_BUSY if once_sent else _UNDONE))
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            status = _status(error)
            if not (status in passing or (once_sent and _is_broken_connection(error))):
                raise
            _log.warning("the Hub answered %s; trying again in %g s", status or "nothing", wait)
            time.sleep(wait)
    return action()


class _Case(NamedTuple):
    """How errors of one sort are told: the first case that applies to an error and its HTTP status is taken."""

    applies: Callable[[BaseException, int | None], bool]
    kind: type[OSError]
    text: str


_CASES = (
    _Case(
        lambda error, _: isinstance(error, GatedRepoError),
        PermissionError,
        f"{{name}} is gated: ask for access on its page, then {_TOKEN}",
    ),
    _Case(
        lambda error, status: status == 401 and "Invalid credentials" in str(error),
        PermissionError,
        f"the Hub refused the access token, with which not even public models can be had ({{reason}}); {_TOKEN}",
    ),
    _Case(
        lambda error, _: isinstance(error, RepositoryNotFoundError),
        FileNotFoundError,
        f"the Hub has no model {{name}}, or it is private; check the name, and {_TOKEN}",
    ),
    _Case(
        lambda error, _: isinstance(error, RevisionNotFoundError),
        FileNotFoundError,
        "{name} has no such revision; give an existing branch, tag or commit",
    ),
    _Case(
        lambda _, status: status in (401, 403),
        PermissionError,
        f"the Hub does not allow this with the token at hand ({{reason}}); {_TOKEN}",
    ),
    _Case(
        lambda _, status: status in _BUSY,
        ConnectionError,
        "the Hub answers {status} to requests for {name}; try again later",
    ),
    _Case(
        lambda _, status: status in _CONFLICT,
        ConnectionError,
        "somebody else is changing {name} at the same time ({reason}); try again",
    ),
    _Case(
        lambda error, _: isinstance(error, OfflineModeIsEnabled),
        ConnectionError,
        "{name} needs the Hub, but HF_HUB_OFFLINE is set; unset it",
    ),
    _Case(
        lambda error, _: isinstance(error, LocalEntryNotFoundError),
        FileNotFoundError,
        "{name} is not in the cache, and the Hub cannot be asked for it; check your connection, the name, and whether "
        "HF_HUB_OFFLINE is set",
    ),
    _Case(
        lambda error, _: isinstance(error, EntryNotFoundError),
        FileNotFoundError,
        "{name} lacks a file that a timm model has ({reason}); check the name",
    ),
    _Case(
        lambda error, _: _is_broken_connection(error),
        ConnectionError,
        "the connection to the Hub broke ({reason}); check it",
    ),
    _Case(
        lambda error, _: isinstance(error, HfHubHTTPError),
        OSError,
        "the Hub refused the request about {name}: {reason}",
    ),
)

_UPLOADS = (
    _Case(
        lambda error, status: isinstance(error, RuntimeError) and status in (401, 403),
        ConnectionError,
        "the storage of the Hub refused uploads for {name} (status {status}), as it does when its address has expired",
    ),
    *_CASES,
    _Case(
        lambda error, _: isinstance(error, RuntimeError),
        ConnectionError,
        "an upload for {name} broke off ({reason}); check the connection",
    ),
)
"""In a push the client's `RuntimeError`s are of its uploads, whichever of its two ways they go."""


def _explanation(error: Exception, name: str, cases: Sequence[_Case]) -> tuple[type[OSError], str] | None:
    """The kind of error to raise and its message; None for what has nothing to do with the Hub."""
    status = _status(error)
    case = next((case for case in cases if case.applies(error, status)), None)
    return case and (case.kind, case.text.format(name=name, status=status, reason=_first(_telling(error))))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that caused it: the client wraps what breaks an upload in errors of its own."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(answer.status_code) for answer in answers if answer is not None), None)


def _is_transport(error: BaseException) -> bool:
    """Is it an error of the HTTP library without an answer? Its package has changed names; its class has not."""
    return isinstance(error, ConnectionError) or any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _is_broken_connection(error: BaseException) -> bool:
    return _status(error) is None and any(_is_transport(cause) for cause in _causes(error))


def _telling(error: BaseException) -> BaseException:
    """The first of an error and its causes that comes from the Hub or the connection; else the error itself."""
    told = (cause for cause in _causes(error) if getattr(cause, "response", None) is not None or _is_transport(cause))
    return next(told, error)


def _first(error: BaseException) -> str:
    """The first line of a message that says something, without the request's number."""
    lines = [line.split(" (Request ID")[0].strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line and "http" not in line), type(error).__name__)
