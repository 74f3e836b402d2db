from __future__ import annotations

import pytest
from huggingface_hub import errors as hub_errors

from timm_fsr.utils import hub_errors as remote
from timm_fsr.utils.hub_errors import explained, retried


class TransportError(Exception):
    """As the HTTP libraries call what comes of a broken connection."""


class ReadError(TransportError):
    pass


class Answered(Exception):  # noqa: N818
    def __init__(self, status: int, text: str = "told by the Hub") -> None:
        super().__init__(text)
        self.response = type("Response", (), {"status_code": status})()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class TestRetried:
    @pytest.mark.parametrize("error", [*(Answered(s) for s in (409, 412, 429, 500, 502, 503, 504)), ReadError("reset")])
    def test_what_may_pass_is_tried_again_after_growing_waits(self, waits, error):
        action = Flaky(error, error, error)
        assert retried(action) == "done"
        assert waits == list(remote.WAITS)
        assert sorted(waits) == waits

    def test_but_not_for_ever(self, waits):
        action = Flaky(*(Answered(503) for _ in range(9)))
        with pytest.raises(Answered):
            retried(action)
        assert action.calls == 1 + len(remote.WAITS)

    @pytest.mark.parametrize(
        "error", [Answered(401), Answered(403), Answered(404), ValueError("ours"), KeyError("ours")]
    )
    def test_what_stays_is_not(self, waits, error):
        action = Flaky(error)
        with pytest.raises(type(error)):
            retried(action)
        assert (action.calls, waits) == (1, [])

    @pytest.mark.parametrize("error", [ReadError("reset"), Answered(500), Answered(502), Answered(504)])
    def test_what_may_not_be_done_twice_is_not_when_it_may_be_done_already(self, waits, error):
        action = Flaky(error)
        with pytest.raises(type(error)):
            retried(action, once_sent=False)
        assert action.calls == 1

    @pytest.mark.parametrize("status", [409, 412, 429, 503])
    def test_but_it_is_when_the_hub_has_not_begun_it(self, waits, status):
        assert retried(Flaky(Answered(status)), once_sent=False) == "done"


class TestExplained:
    @pytest.mark.parametrize(
        ("error", "kind", "text"),
        [
            (Answered(401, "Invalid credentials in Authorization header"), PermissionError, "refused the access token"),
            (Answered(403), PermissionError, r"does not allow this .*told by the Hub.*hf auth login"),
            (Answered(503), ConnectionError, "answers 503 to requests for a/b; try again later"),
            (Answered(412), ConnectionError, "somebody else is changing a/b"),
            (ReadError("connection reset"), ConnectionError, r"the connection to the Hub broke \(connection reset\)"),
            (hub_errors.OfflineModeIsEnabled("off"), ConnectionError, "HF_HUB_OFFLINE is set; unset it"),
            (hub_errors.LocalEntryNotFoundError("no"), FileNotFoundError, "a/b is not in the cache"),
            (hub_errors.HFValidationError("too many slashes"), ValueError, r"'a/b' is no name .*too many slashes"),
        ],
    )
    def test_every_error_names_the_remedy(self, error, kind, text):
        with pytest.raises(kind, match=text) as caught, explained("a/b"):
            raise error
        assert caught.value.__cause__ is error

    def test_the_cause_of_an_error_counts(self):
        outer = hub_errors.LocalEntryNotFoundError("cannot find the file")
        outer.__cause__ = Answered(503)
        with pytest.raises(ConnectionError, match="answers 503"), explained("a/b"):
            raise outer

    def test_a_push_says_in_what_state_things_are(self):
        with pytest.raises(PermissionError, match="nothing of the model was committed"), explained("a/b", writing=True):
            raise Answered(403)
        with pytest.raises(ConnectionError, match="all of this push or nothing"), explained("a/b", writing=True):
            raise ReadError("reset")

    @pytest.mark.parametrize(
        ("cause", "text"),
        [
            (ReadError("reset by peer"), r"the connection to the Hub broke \(reset by peer\).*the same command"),
            (Answered(503), "answers 503"),
            (Answered(403, "expired"), r"refused uploads for a/b \(status 403\).*the same command completes it"),
            (None, r"an upload for a/b broke off \(Error while uploading\)"),
        ],
    )
    def test_an_upload_that_fails_inside_the_client(self, waits, cause, text):
        outer = RuntimeError("Error while uploading")
        outer.__cause__ = cause
        with pytest.raises(ConnectionError, match=text), explained("a/b", writing=True):
            raise outer

    def test_one_that_broke_off_is_tried_again(self, waits):
        outer = RuntimeError("Error while uploading")
        outer.__cause__ = ReadError("reset")
        assert retried(Flaky(outer)) == "done"

    @pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), FileNotFoundError("ours")])
    def test_other_errors_are_left_alone(self, error):
        with pytest.raises(type(error), match=r"^ours$") as caught, explained("a/b"):
            raise error
        assert caught.value is error
