"""What a saved model holds for transformers, which runs it: it is ours, and never stale."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.hub_tools import FILES
from support.tiny import tiny_resnet

import timm_fsr
from timm_fsr.hub.publish import collect
from timm_fsr.models.remote_code import ENTRIES, MODELLING, modelling_code


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_file_has_the_classes_that_are_named_and_does_nothing_but_import():
    body = ast.parse(modelling_code()).body
    assert [type(statement) for statement in body] == [ast.Expr, ast.ImportFrom, ast.Assign]
    named = {entry.removeprefix("modeling_timm_fsr.") for entry in ENTRIES["auto_map"].values()}
    assert {alias.name for alias in body[1].names} == named


def test_without_transformers_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    for name in ("for_transformers", "modeling_timm_fsr"):
        monkeypatch.delitem(sys.modules, f"timm_fsr.models.{name}", raising=False)
    with pytest.raises(ImportError, match=r'pip install "timm-fsr\[transformers\]"'):
        importlib.import_module("timm_fsr.models.modeling_timm_fsr")


def test_what_is_saved_holds_it(tmp_path):
    timm_fsr.save_pretrained(tiny_resnet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in ENTRIES} == dict(ENTRIES)
    assert (tmp_path / MODELLING).read_bytes() == modelling_code()


class TestPublishing:
    def test_it_is_pushed_also_where_the_folder_lacks_it(self, saved):
        (saved / MODELLING).unlink()
        files = collect(saved, "owner/name")
        assert set(files) == set(FILES)
        assert files[MODELLING] == modelling_code()

    def test_nothing_is_added_to_a_model_that_does_not_name_it(self, saved):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ENTRIES}))
        files = collect(saved, "owner/name")
        assert MODELLING not in files
        assert "transformers" not in files["README.md"].decode()

    def test_a_file_of_others_is_neither_run_nor_pushed(self, saved, tmp_path):
        (saved / MODELLING).write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        with pytest.raises(ValueError, match="is not the file that this timm_fsr writes"):
            collect(saved, "owner/name")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "named",
        [
            {"AutoModelForImageClassification": "evil/repo--modeling.Model"},
            {**ENTRIES["auto_map"], "AutoTokenizer": ["modeling_timm_fsr.X", None]},
            "modeling.Model",
            {},
        ],
    )
    def test_code_of_others_is_not_named(self, saved, named):
        change(saved, auto_map=named)
        with pytest.raises(ValueError, match="names code of its own"):
            collect(saved, "owner/name")


class TestChecksums:
    """transformers' own classes copy our record to weights that they have changed."""

    @pytest.mark.parametrize("load", [timm_fsr.from_pretrained, lambda f: timm.create_model(f"local-dir:{f}", True)])
    def test_a_stale_one_is_no_damage(self, saved, load):
        change(saved, architectures=["TimmWrapperForImageClassification"])
        self.exchange(saved)
        assert torch.equal(load(saved).fc.bias, torch.full((4,), 5.0))

    @pytest.mark.parametrize("writer", [None, "TimmFsrForImageClassification"])
    def test_ours_is_checked(self, saved, writer):
        if writer:
            change(saved, architectures=[writer])
        self.exchange(saved)
        with pytest.raises(ValueError, match="damaged or were exchanged"):
            timm_fsr.from_pretrained(saved)

    @staticmethod
    def exchange(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        save_file({**state, "fc.bias": torch.full((4,), 5.0)}, folder / "model.safetensors")
