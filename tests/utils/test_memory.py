"""What needs more memory than there is."""

from __future__ import annotations

import pytest

from timm_fsr.utils import memory


def test_what_fits_passes_and_what_does_not_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda _: 2**30)
    memory.check_memory(2**30, "weights", "choose fewer")
    message = "weights need 1.5 GiB of memory or more, but this machine has 1.0 GiB; choose fewer"
    with pytest.raises(ValueError, match=f"^{message}$"):
        memory.check_memory(3 * 2**29, "weights", "choose fewer")
    with pytest.raises(ValueError, match="but the device cuda:0 has"):
        memory.check_memory(3 * 2**29, "weights", "choose fewer", device="cuda:0")


def test_where_the_memory_is_not_known_everything_is_tried():
    assert memory.total_memory("meta") is None
    memory.check_memory(2**80, "weights", "choose fewer", device="meta")


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    installed = memory.total_memory()
    assert installed is not None
    assert 2**28 < installed < 2**50
    for text, expected in (("max\n", installed), ("12345\n", 12345), (f"{2 * installed}\n", installed)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(memory, "_CGROUP", tmp_path / "limit")
        assert memory.total_memory() == expected
