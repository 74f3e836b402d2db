from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_fsr
from timm_fsr.models.weights import FORMAT, check_digest, check_record, load_weights, make_record, verify_folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return timm_fsr.save_pretrained(timm.create_model("resnet_tiny_cifar_fsr", fsr_hidden=4), tmp_path / "saved")


def test_the_record_says_what_the_file_is(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    record = make_record(tmp_path / "a")
    assert record["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert (record["bytes"], record["format"], record["version"]) == (7, FORMAT, timm_fsr.__version__)
    assert check_record({"timm_fsr": record}, "here") == record


def test_configurations_of_other_packages_have_none():
    assert check_record({"architecture": "resnet18"}, "here") == {}


@pytest.mark.parametrize("record", [3, "x", {"format": "2"}, {"format": FORMAT + 1}, {"sha256": 5}, {"sha256": "no"}])
def test_a_record_that_cannot_be_read(record):
    with pytest.raises(ValueError, match=r"here .*(is damaged|update timm_fsr)|configuration of here is damaged"):
        check_record({"timm_fsr": record}, "here")


def test_without_a_digest_nothing_is_said(tmp_path):
    check_digest(tmp_path / "not even there", None, "here")


def test_a_folder_without_configuration_or_checksum_is_not_judged(saved):
    assert verify_folder(saved) == saved / "model.safetensors"
    (saved / "config.json").rename(saved / "other.json")
    assert verify_folder(saved) is None
    config = json.loads((saved / "other.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "timm_fsr": {}}))
    assert verify_folder(saved) is None


@pytest.mark.parametrize("by", [timm_fsr.from_pretrained, lambda name: timm.create_model(name, pretrained=True)])
def test_another_file_does_not_take_the_place_of_the_noted_one(saved, by):
    tensors = load_file(saved / "model.safetensors")
    torch.save({key: value + 1 for key, value in tensors.items()}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*noted checksum.*publish the model again"):
        by(f"local-dir:{saved}")


def test_a_changed_byte_is_found(saved):
    verify_folder(saved)
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or were exchanged"):
        verify_folder(saved)


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_damaged_configuration(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        verify_folder(saved)


class TestSources:
    def test_none(self):
        assert load_weights({}, None) is None

    def test_a_state_dict(self):
        given = {"a": torch.ones(1)}
        assert load_weights({"state_dict": given}, None) == given

    def test_a_file_with_and_without_its_digest(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.ones(1)}, path)
        for digest in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            assert load_weights({"file": str(path)}, None, digest)["a"] == 1
        with pytest.raises(ValueError, match="exchanged"):
            load_weights({"file": str(path)}, None, "0" * 64)

    def test_a_folder(self, saved):
        found = load_weights({"source": "local-dir", "file": str(saved)}, None)
        assert set(found) == set(load_file(saved / "model.safetensors"))


def test_others_may_read_what_is_saved(saved):
    """safetensors itself writes files that only their owner can read: useless in a team's folder."""
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


def test_timm_keeps_the_record_out_of_the_model(saved):
    assert "timm_fsr" in json.loads((saved / "config.json").read_text())
    assert "timm_fsr" not in timm.create_model(f"local-dir:{saved}", pretrained=True).pretrained_cfg
