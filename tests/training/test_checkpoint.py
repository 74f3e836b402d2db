"""Checkpoints: whole or not at all, the newest few, and never one that is broken or harmful."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import timm_fsr.training.checkpoint
from timm_fsr.training.checkpoint import Checkpoints

FILES = {"tensors.pt", "values.json", "checksums.json"}


def tensors_of(step: int) -> dict[str, Any]:
    """Nested as a run's are, and different for each step."""
    return {
        "model": {"conv.weight": torch.full((2, 3), float(step)), "bn.count": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum": torch.arange(4.0)}}, "groups": [{"lr": 0.1, "name": "all"}]},
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "ema": None,
        "sums": {},
    }


def values_of(step: int) -> dict[str, Any]:
    return {"progress": {"step": step, "stopped": "épuisé", "one_step": None}, "identity": {"data": ["a", "b"]}}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints", keep)
    for step in steps:
        checkpoints.save(step, tensors_of(step), values_of(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def loaded(checkpoints: Checkpoints) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Tensors and values of the newest whole one, and the warnings on the way."""
    warnings: list[str] = []
    found = checkpoints.load_newest(warnings.append)
    assert found is not None
    return *found, warnings


def step_of(checkpoints: Checkpoints) -> tuple[int, list[str]]:
    tensors, values, warnings = loaded(checkpoints)
    step = values["progress"]["step"]
    assert torch.equal(tensors["model"]["conv.weight"], torch.full((2, 3), float(step))), "parts of two checkpoints"
    return step, warnings


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def written(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


class TestRoundTrip:
    def test_nested_tensors_and_values_come_back(self, tmp_path):
        tensors, values, warnings = loaded(saved(tmp_path, 7))
        assert values == values_of(7)
        expected = tensors_of(7)
        for name in ("conv.weight", "bn.count"):
            assert torch.equal(tensors["model"][name], expected["model"][name])
        assert torch.equal(tensors["optimizer"]["state"][0]["momentum"], torch.arange(4.0))
        assert tensors["optimizer"]["groups"] == expected["optimizer"]["groups"]
        assert tensors["half"].dtype == torch.bfloat16
        assert tensors["half"].isnan().tolist() == [False, True]
        assert (tensors["ema"], tensors["sums"], warnings) == (None, {}, [])

    def test_each_is_a_folder_named_by_its_step_with_a_checksum_per_file(self, tmp_path):
        checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
        path = checkpoints.save(12, tensors_of(12), values_of(12))
        assert path == tmp_path / "deep" / "checkpoints" / "step-000000012"
        assert {file.name for file in path.iterdir()} == FILES
        sums = json.loads((path / "checksums.json").read_text())
        assert sums == {name: sha256((path / name).read_bytes()).hexdigest() for name in ("tensors.pt", "values.json")}

    def test_there_is_none_where_none_was_saved(self, tmp_path):
        assert Checkpoints(tmp_path / "nowhere").load_newest(pytest.fail) is None
        assert not (tmp_path / "nowhere").exists(), "looking makes no folder"
        (tmp_path / "empty").mkdir()
        assert Checkpoints(tmp_path / "empty").load_newest(pytest.fail) is None


class TestRotation:
    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_stay(self, tmp_path, keep):
        checkpoints = saved(tmp_path, 3, 20, 100, 1000, keep=keep)
        assert names(checkpoints) == ["step-000000003", "step-000000020", "step-000000100", "step-000001000"][-keep:]
        assert step_of(checkpoints) == (1000, [])

    def test_what_a_killed_process_left_goes_with_the_next_save(self, tmp_path):
        checkpoints = saved(tmp_path, 1)
        scratch = checkpoints.folder / ".writing-abc"
        scratch.mkdir()
        (scratch / "tensors.pt").write_bytes(b"half a file")
        assert step_of(checkpoints) == (1, []), "it is no checkpoint"
        checkpoints.save(2, tensors_of(2), values_of(2))
        assert names(checkpoints) == ["step-000000001", "step-000000002"]

    def test_other_files_of_the_folder_stay(self, tmp_path):
        checkpoints = saved(tmp_path, 1)
        (checkpoints.folder / "notes.txt").write_text("mine")
        (checkpoints.folder / "step-notes").write_text("mine")
        checkpoints.save(2, tensors_of(2), values_of(2))
        checkpoints.save(3, tensors_of(3), values_of(3))
        assert names(checkpoints) == ["notes.txt", "step-000000002", "step-000000003", "step-notes"]


class TestFailingSave:
    @pytest.mark.parametrize(
        "error",
        [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64 vs 0")],
        ids=["OSError", "RuntimeError"],
    )
    def test_it_names_the_folder_and_leaves_the_older_ones_and_no_scratch(self, tmp_path, monkeypatch, error):
        checkpoints = saved(tmp_path, 1, 2)

        def full(_tensors: dict[str, Any], path: Path) -> None:
            path.write_bytes(b"half a file")
            raise error

        monkeypatch.setattr(timm_fsr.training.checkpoint.torch, "save", full)
        message = (
            r"could not write the checkpoint .*step-000000003 \(.*(No space|enforce).*the older ones are untouched"
        )
        with pytest.raises(OSError, match=message) as caught:
            checkpoints.save(3, tensors_of(3), values_of(3))
        assert caught.value.__cause__ is error
        assert caught.value.errno == getattr(error, "errno", None)
        assert names(checkpoints) == ["step-000000001", "step-000000002"]
        assert step_of(checkpoints) == (2, [])

    def test_the_same_step_stays_whole_when_its_replacement_fails(self, tmp_path, monkeypatch):
        checkpoints = saved(tmp_path, 1)

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(timm_fsr.training.checkpoint.torch, "save", full)
        with pytest.raises(OSError, match="step-000000001"):
            checkpoints.save(1, tensors_of(9), values_of(9))
        assert step_of(checkpoints) == (1, [])

    def test_values_that_json_does_not_hold_leave_no_scratch(self, tmp_path):
        checkpoints = saved(tmp_path, 1)
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(2, tensors_of(2), {"progress": object()})
        assert names(checkpoints) == ["step-000000001"]


class TestBroken:
    @pytest.mark.parametrize(
        ("file", "damage", "reason"),
        [
            ("tensors.pt", cut, "tensors.pt differs from its checksum"),
            ("tensors.pt", flip, "tensors.pt differs from its checksum"),
            ("values.json", flip, "values.json differs from its checksum"),
            ("tensors.pt", Path.unlink, "FileNotFoundError"),
            ("values.json", Path.unlink, "FileNotFoundError"),
            ("checksums.json", Path.unlink, "FileNotFoundError"),
            ("checksums.json", cut, "JSONDecodeError"),
            ("checksums.json", written("{}"), "KeyError"),
            ("checksums.json", written("[]"), "TypeError"),
            ("checksums.json", written("null"), "TypeError"),
            ("checksums.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
        ],
    )
    def test_one_that_is_not_whole_gives_way_to_the_one_before(self, tmp_path, file, damage, reason):
        checkpoints = saved(tmp_path, 1, 2)
        damage(checkpoints.folder / "step-000000002" / file)
        step, warnings = step_of(checkpoints)
        assert step == 1
        assert len(warnings) == 1
        assert "step-000000002 is not whole" in warnings[0]
        assert reason in warnings[0]
        assert warnings[0].endswith("going back to the one before")

    def test_if_none_is_whole_it_is_an_error_with_a_remedy(self, tmp_path):
        checkpoints = saved(tmp_path, 1, 2)
        for path in checkpoints.folder.glob("*/tensors.pt"):
            cut(path)
        warnings: list[str] = []
        with pytest.raises(ValueError, match=r"none of the 2 checkpoint\(s\) in .* is whole; .*--overwrite=true"):
            checkpoints.load_newest(warnings.append)
        assert [name in warning for name, warning in zip(("2", "1"), warnings, strict=True)] == [True, True]

    def test_saving_the_same_step_again_replaces_it(self, tmp_path):
        """A run that went back to the checkpoint before comes past the broken one again."""
        checkpoints = saved(tmp_path, 1, 2)
        flip(checkpoints.folder / "step-000000002" / "tensors.pt")
        (checkpoints.folder / "step-000000002" / "stray").write_text("")
        checkpoints.save(2, tensors_of(2), values_of(2))
        assert step_of(checkpoints) == (2, [])
        assert {file.name for file in (checkpoints.folder / "step-000000002").iterdir()} == FILES


class Bomb:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run_even_if_its_checksum_is_right(tmp_path):
    checkpoints = saved(tmp_path, 1)
    path = checkpoints.folder / "step-000000001" / "tensors.pt"
    torch.save({"model": Bomb(tmp_path / "exploded")}, path)
    sums = path.with_name("checksums.json")
    sums.write_text(json.dumps({**json.loads(sums.read_text()), path.name: sha256(path.read_bytes()).hexdigest()}))
    told: list[str] = []
    with pytest.raises(ValueError, match=r"none of the 1 checkpoint\(s\)"):
        checkpoints.load_newest(told.append)
    assert "UnpicklingError: it holds more than tensors and plain values" in told[0]
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").exists(), "it would have been harmful"


def test_what_comes_back_is_on_the_cpu(tmp_path, monkeypatch):
    asked: list[Any] = []
    load = torch.load

    def spy(path: Path, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(kwargs)
        return load(path, **kwargs)

    monkeypatch.setattr(timm_fsr.training.checkpoint.torch, "load", spy)
    loaded(saved(tmp_path, 1))
    assert asked == [{"map_location": "cpu", "weights_only": True}]


def test_a_broken_later_one_does_not_outlive_the_run_that_went_back(tmp_path):
    """Else rotation would keep it, and in the end it alone."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(200, tensors_of(200), values_of(200))
    (checkpoints.folder / "step-000000200" / "tensors.pt").write_bytes(b"")
    checkpoints.save(150, tensors_of(150), values_of(150))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000150"]
