from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from support.hub_tools import FILES

import timm_fsr
from timm_fsr.cli import hub as hub_commands
from timm_fsr.cli.main import main
from timm_fsr.models.saving import weights_digest
from timm_fsr.reports.report import Report

RECIPE = {"seed": 0, "model": {"name": "resnet_tiny_cifar", "layer": "fsr"}, "data": {"source": "fashion_mnist"}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = timm.create_model("resnet_tiny_cifar_fsr")
    right = torch.tensor([True, False])
    report = Report(
        correct={"clean": right, "autoattack": right},
        attacks={"autoattack": "..."},
        norm="linf",
        eps=0.1,
        seed=0,
        conditions={"data": "fashion_mnist[test]", "weights_sha256": weights_digest(model)},
    )
    folder = tmp_path / "resnet_tiny_cifar_fsr.toy"
    return timm_fsr.save_pretrained(model, folder, report=report, recipe=RECIPE, license="apache-2.0")


class TestModels:
    def test_every_tag_is_listed_with_the_figures_of_its_report(self, monkeypatch, saved, capsys):
        entry = timm_fsr.models.pretrained.read_pretrained(saved)
        monkeypatch.setattr(hub_commands, "list_pretrained", lambda: [entry])
        assert main(["models"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "resnet_tiny_cifar_fsr.toy",
            "    clean 50.0 %, robust 50.0 % (Linf 0.1, autoattack, 2 images)",
            "    data: fashion_mnist[test]",
            "    1.5 MB, from package",
        ]
        assert main(["models", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["robust"] == 0.5

    def test_weights_elsewhere(self, monkeypatch, saved, capsys):
        (saved / "model.safetensors").unlink()
        monkeypatch.setenv("TIMM_FSR_HUB", "us")
        entry = timm_fsr.models.pretrained.read_pretrained(saved)
        monkeypatch.setattr(hub_commands, "list_pretrained", lambda: [entry])
        assert main(["models"]) == 0
        assert "hf-hub:us/resnet_tiny_cifar_fsr.toy" in capsys.readouterr().out

    def test_none(self, monkeypatch, capsys):
        monkeypatch.setattr(hub_commands, "list_pretrained", list)
        assert main(["models"]) == 0
        assert "describes no checkpoints" in capsys.readouterr().out


class TestCard:
    def test_it_is_written_beside_the_model(self, saved, capsys):
        assert main(["card", str(saved), "us/toy", "--tag", "x.y"]) == 0
        assert "review it before it is pushed" in capsys.readouterr().out
        text = (saved / "README.md").read_text()
        assert "hf-hub:us/toy" in text
        assert 'timm.create_model("x.y"' in text

    def test_elsewhere_with_a_baseline_and_a_licence(self, saved, tmp_path):
        output, baseline = str(tmp_path / "card.md"), Report.load(saved / "report.json")
        baseline.conditions["weights_sha256"] = "of the other model"
        (tmp_path / "plain").mkdir()
        baseline.save(tmp_path / "plain" / "report.json")
        given = ["card", str(saved), "us/toy", "--output", output, "--license", "mit"]
        given += ["--baseline", str(tmp_path / "plain")]
        assert main(given) == 0
        text = Path(output).read_text()
        assert "license: mit" in text
        assert "Against the same training without the layer" in text

    def test_what_is_missing(self, saved, capsys):
        (saved / "report.json").unlink()
        assert main(["card", str(saved), "us/toy"]) == 2
        assert "lacks report.json" in capsys.readouterr().err
        assert not (saved / "README.md").exists()


class TestPush:
    def test_a_dry_run_checks_and_sends_nothing(self, saved, capsys):
        assert main(["push", str(saved), "us/toy", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "model.safetensors" in out
        assert "nothing was sent to us/toy" in out

    def test_what_would_be_sent_can_be_looked_at(self, saved, tmp_path, capsys):
        output = tmp_path / "look"
        assert main(["push", str(saved), "us/toy", "--dry-run", "--output", str(output)]) == 0
        assert {path.name for path in output.iterdir()} == set(FILES)
        assert (output / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
        assert main(["push", str(output), "us/toy", "--dry-run"]) == 0, "what would be sent can be sent"
        assert main(["push", str(saved), "us/toy", "--output", str(output)]) == 2
        assert "add --dry-run" in capsys.readouterr().err

    def test_what_is_wrong_is_one_sentence(self, saved, capsys):
        (saved / "report.json").unlink()
        assert main(["push", str(saved), "us/toy"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("timm-fsr push: error: ")
        assert "lacks report.json" in error

    @pytest.mark.parametrize("option", ["--license=mit", "--base-model=a/b", "--baseline={saved}"])
    def test_options_of_the_card_beside_a_card_are_not_ignored(self, saved, capsys, option):
        assert main(["card", str(saved), "us/toy"]) == 0
        assert main(["push", str(saved), "us/toy", "--dry-run", option.format(saved=saved)]) == 2
        name = option.split("=")[0].strip("-").replace("-", "_")
        assert f"so {name} would be ignored; make it again by timm-fsr card with them" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["noslash", "a/b/c", ""])
    @pytest.mark.parametrize("command", ["card", "push"])
    def test_a_name_that_none_can_have_is_found_without_the_hub(self, saved, capsys, command, name):
        assert main([command, str(saved), name]) == 2
        assert "is no name of a repository" in capsys.readouterr().err
        assert not (saved / "README.md").exists()

    def test_the_card_of_another_repository(self, saved, capsys):
        assert main(["card", str(saved), "us/toy"]) == 0
        assert main(["push", str(saved), "us/other", "--dry-run"]) == 2
        assert "nowhere names hf-hub:us/other" in capsys.readouterr().err

    def test_private_and_public_exclude_each_other(self, saved):
        with pytest.raises(SystemExit):
            main(["push", str(saved), "us/toy", "--private", "--public"])

    def test_offline_it_says_so(self, saved, capsys):
        assert main(["push", str(saved), "us/toy"]) == 2
        assert "HF_HUB_OFFLINE is set; unset it" in " ".join(capsys.readouterr().err.split())


def test_numbers_that_are_none(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "x", "--arch", "resnet18_cifar", "--output", str(tmp_path), "--mean", "a,b"])
    assert "write 0.49,0.48,0.45" in capsys.readouterr().err
