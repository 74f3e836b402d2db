"""What takes long is done once, as long as it is about the same thing and its file is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from timm_fsr.evaluation.benchmark import Cache

KEY = {"model": "abc", "eps": 8 / 255}


def made(path: Path, key: dict[str, object], name: str = "fog") -> bool:
    """Whether something has to be made."""
    calls: list[int] = []
    value = Cache(path, key).once(name, lambda: (calls.append(1), {"5": 0.25, "list": (1, 2)})[1])
    assert value == {"5": 0.25, "list": [1, 2]}
    return bool(calls)


def test_once(tmp_path):
    path = tmp_path / "new" / "memo.json"
    assert [made(path, KEY) for _ in range(3)] == [True, False, False]
    assert made(path, KEY, "snow")
    assert not made(path, KEY, "fog"), "the second part has replaced the first"


def test_what_changes_outside_does_not_change_what_is_kept(tmp_path):
    cache = Cache(tmp_path / "memo.json", KEY)
    cache.once("fog", lambda: {"a": [1]})["a"].append(2)
    assert cache.once("fog", dict) == {"a": [1]}


def test_parts_of_something_else_count_for_nothing(tmp_path):
    assert made(tmp_path / "memo.json", KEY)
    assert made(tmp_path / "memo.json", {**KEY, "model": "xyz"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"key": {"model": "abc"}}'])
def test_a_damaged_file_counts_for_nothing(tmp_path, content):
    (tmp_path / "memo.json").write_bytes(content)
    assert made(tmp_path / "memo.json", KEY)
