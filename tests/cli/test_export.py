"""timm-fsr export and push --with, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.hub_tools import FILES, save

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.models.saving import load


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its `model.pt2`, which was written next to the weights."""
    folder = save(tmp_path_factory.mktemp("models") / "mine")
    assert main(["export", str(folder)]) == 0
    return folder


def test_beside_the_weights_unless_a_folder_is_given(model_folder, tmp_path, capsys):
    assert (model_folder / "model.pt2").is_file()
    assert main(["export", f"local-dir:{model_folder}"]) == 2
    assert f"{model_folder} holds model.pt2 already; choose another --output or add --overwrite" in (
        capsys.readouterr().err
    )
    assert main(["export", str(model_folder), "--output", str(tmp_path), "--size=24"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'model.pt2'}: 0.8 MB, logits equal, SHA-256 ")
    images = torch.rand(3, 3, 24, 24)
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    assert torch.equal(found, load(str(model_folder)).eval()(images))


def test_a_name_is_no_folder(capsys):
    assert main(["export", "resnet_tiny_cifar_fsr.at_fashion_mnist"]) == 2
    assert "is no folder to write into; say where the files go with --output" in capsys.readouterr().err


def test_a_size_in_the_words_of_the_command_line(model_folder, tmp_path, capsys):
    assert main(["export", str(model_folder), "--output", str(tmp_path), "--size=0"]) == 2
    assert "--size=0 must be 1 or more" in capsys.readouterr().err


class TestCardAndPush:
    def test_what_the_folder_has_is_told_and_sent(self, model_folder, tmp_path, capsys):
        card = tmp_path / "CARD.md"
        assert main(["card", str(model_folder), "us/toy", "--output", str(card)]) == 0
        text = card.read_text()
        assert f"`model.pt2` needs torch alone, {torch.__version__.partition('+')[0]} or newer." in text
        assert 'torch.export.load(hf_hub_download("us/toy", "model.pt2"))' in text
        assert "logits = model(images)  # images (N, 3, 32, 32), float32, pixels in [0, 1]\n```\n\n## How" in text
        assert "model.onnx" not in text
        capsys.readouterr()
        assert main(["push", str(model_folder), "us/toy", "--dry-run", "--output", str(tmp_path / "look")]) == 0
        assert {path.name for path in (tmp_path / "look").iterdir()} == {*FILES, "model.pt2"}
        assert (tmp_path / "look" / "README.md").read_text() == text

    def test_what_is_asked_for_is_made(self, tmp_path):
        folder = save(tmp_path / "mine")
        push = ["push", str(folder), "us/toy", "--with", "pt2", "onnx", "--dry-run", "--output", str(tmp_path / "look")]
        assert main(push) == 0
        assert {path.name for path in (tmp_path / "look").iterdir()} == {*FILES, "model.pt2", "model.onnx"}
        assert "`model.onnx` needs onnxruntime alone" in (tmp_path / "look" / "README.md").read_text()
        assert not (folder / "model.onnx").exists()

    def test_a_card_that_does_not_fit(self, tmp_path, capsys):
        folder = save(tmp_path / "mine")
        assert main(["card", str(folder), "us/toy"]) == 0
        assert main(["push", str(folder), "us/toy", "--with", "pt2", "--dry-run"]) == 2
        assert (
            "the card does not tell of model.pt2, or of another file of this name; write the file into the folder by"
            in (capsys.readouterr().err)
        )
        assert main(["export", str(folder)]) == 0
        assert "README.md does not tell of them yet: make it again by timm-fsr card" in capsys.readouterr().out
        assert main(["card", str(folder), "us/toy"]) == 0
        assert main(["push", str(folder), "us/toy", "--dry-run"]) == 0
        (folder / "model.pt2").unlink()
        capsys.readouterr()
        assert main(["push", str(folder), "us/toy", "--dry-run"]) == 2
        assert "the card tells how to use model.pt2, which is not there; write it by timm-fsr export" in (
            capsys.readouterr().err
        )

    def test_a_file_of_other_weights(self, tmp_path, capsys):
        folder, other = save(tmp_path / "mine"), save(tmp_path / "other", seed=1)
        timm_fsr.export(load(str(other)), folder)
        assert main(["push", str(folder), "us/toy", "--dry-run"]) == 2
        assert "model.pt2 was made from other weights; export this model again" in capsys.readouterr().err
