"""Everything about a model in one folder: by the command, resumed, compared, and refused in clear words."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from support.tiny import tiny_resnet, with_fsr

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.data.streaming import stream_data
from timm_fsr.evaluation.benchmark import assess, load_entry
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with the report of its training beside it."""
    conditions = {"checkpoint_rule": "best PGD-10 accuracy on held-out", "training": "AT()", "data": "others"}
    flags = {"clean": torch.tensor([True])}
    report = Report(correct=flags, attacks={}, norm="linf", eps=0.1, seed=0, conditions=conditions)
    return save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "model", report=report)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


class TestCommand:
    def test_a_folder_with_everything(self, saved, tmp_path, capsys):
        pytest.importorskip("pyautoattack")
        pytest.importorskip("imagecorruptions")
        folder = tmp_path / "out"
        flags = ["--limit", 12, "--attacks", "fgsm", "transfer", "--transfer-from", saved, "--output", folder]
        extra = ["--save-images", "--batch-size", 6, "--evidence", 2, "--corruptions", 1, "--eps", "2/255"]
        assert run("evaluate", saved, *flags, *extra) == 0
        report = Report.load(folder / "report.json")
        assert list(report.correct) == ["clean", "fgsm", f"transfer from {saved}"]
        assert report.count == 12
        assert set(report.evidence) >= {"eps", "square", "masks", "findings"}
        assert len(report.corruptions) == 15
        assert set(report.corruptions["fog"]) == set("12345")
        assert report.calibration["clean"]["accuracy"] == report.accuracy["clean"]
        assert report.conditions["batch_size"] == 6
        assert report.conditions["checkpoint_rule"] == "best PGD-10 accuracy on held-out"
        assert report.conditions["data"] == "fashion_mnist[test] limited to 12"
        assert len(report.conditions["classes"]) == 10
        assert len(report.conditions["data_fingerprint"]) == 16
        assert len(json.loads((folder / "examples.json").read_text())["images"]) == 6
        page = (folder / "report.html").read_text()
        assert "Are the gradients honest?" in page
        printed = capsys.readouterr().out
        assert "worst case" in printed
        assert f"results in {folder}" in printed
        # Afterwards: the same images on the same model, and a page of two models.
        assert run("evaluate", saved, "--attacked", folder) == 0
        assert f"fgsm: {100 * report.accuracy['fgsm']:.2f} % right (12 images)" in capsys.readouterr().out
        assert run("report", folder, folder, "--names", "one", "two", "--output", tmp_path / "both.html") == 0
        assert "In the worst case two is +0.0 points against one" in (tmp_path / "both.html").read_text()

    def test_the_same_command_again_attacks_nothing(self, saved, tmp_path, monkeypatch):
        flags = ["evaluate", saved, "--limit", 12, "--attacks", "fgsm", "--output", tmp_path / "out"]
        assert run(*flags) == 0
        before = Report.load(tmp_path / "out" / "report.json")
        monkeypatch.setattr("timm_fsr.attacks.pgd.PGD.__call__", lambda *_, **__: pytest.fail("attacked again"))
        monkeypatch.setattr("timm_fsr.evaluation.benchmark.draw_examples", lambda *_, **__: {})
        assert run(*flags) == 0
        assert Report.load(tmp_path / "out" / "report.json").to_dict()["correct"] == before.to_dict()["correct"]

    def test_another_model_needs_overwrite(self, saved, tmp_path, capsys):
        flags = ["--limit", 12, "--attacks", "--output", tmp_path / "out"]
        other = save_pretrained(with_fsr(tiny_resnet(in_chans=1), tau=0.3), tmp_path / "other")
        assert run("evaluate", saved, *flags) == 0
        assert run("evaluate", other, *flags) == 2
        assert "holds the outcomes of another evaluation: its model is" in capsys.readouterr().err
        assert run("evaluate", other, *flags, "--overwrite") == 0

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_weights_of_a_file(self, tmp_path, suffix, capsys):
        """Any timm model; a pickle is read as plain tensors only."""
        model = timm.create_model("test_resnet", num_classes=10)
        path = tmp_path / f"weights{suffix}"
        if suffix == ".pth":
            torch.save(model.state_dict(), path)
        else:
            from safetensors.torch import save_file

            save_file(model.state_dict(), path)
        flags = ["--num-classes", 10, "--channels", 3, "--size", 64, "--limit", 6, "--attacks"]
        assert run("evaluate", "test_resnet", "--checkpoint", path, *flags) == 0
        assert "6 images" in capsys.readouterr().out

    def test_a_pickle_with_code_is_refused(self, tmp_path, capsys):
        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return (print, ("the code ran",))

        torch.save({"state_dict": Trap()}, tmp_path / "weights.pth")
        assert run("evaluate", "test_resnet", "--checkpoint", tmp_path / "weights.pth") == 2
        printed = capsys.readouterr()
        assert "the code ran" not in printed.out
        assert "ask its author for a state dict" in printed.err


class TestReportCommand:
    def test_mistakes(self, tmp_path, capsys):
        for arguments, message in (
            ([tmp_path], f"{tmp_path} holds no report.json"),
            ([tmp_path / "nothing.json"], "nothing.json"),
            ([tmp_path, "--names", "a", "b"], "2 names were given for 1 reports"),
        ):
            assert run("report", *arguments) == 2
            assert message in capsys.readouterr().err

    def test_a_report_alone_has_no_examples(self, saved):
        entry = load_entry(saved)
        assert entry.examples == {}
        assert entry.report.count == 1


class TestAssess:
    def test_from_python(self, tmp_path):
        data = timm_fsr.load_data("fashion_mnist", "test", limit=10)
        report = assess(tiny_resnet(in_chans=1), data, tmp_path, attacks=["fgsm"], name="mine")
        assert report.to_dict() == Report.load(tmp_path / "report.json").to_dict()
        assert load_entry(tmp_path).title == "mine"

    def test_streamed_images(self, tmp_path, monkeypatch):
        """The same report as of images in memory, but for the fingerprint, which has no pixels in it."""
        evidence = {"images": 3, "findings": []}
        monkeypatch.setattr("timm_fsr.evaluation.benchmark.gather_evidence", lambda *_, **__: evidence)
        data = timm_fsr.load_data("fashion_mnist", "test", limit=10)
        streamed = stream_data("fashion_mnist", "test", size=28, limit=10, workers=0)
        model = tiny_resnet(in_chans=1)
        options = {"attacks": ["fgsm"], "evidence_images": 3, "batch_size": 4}
        one, other = (
            assess(model, images, tmp_path / name, **options) for name, images in (("a", data), ("b", streamed))
        )
        assert other.conditions["data_fingerprint"] == streamed.fingerprint
        for report in (one, other):
            del report.conditions["data_fingerprint"]
        calibrations = [report.calibration["clean"].pop("negative_log_likelihood") for report in (one, other)]
        assert calibrations[0] == pytest.approx(calibrations[1])
        assert one.to_dict().keys() == other.to_dict().keys()
        for key in ("correct", "attacks", "labels", "notes", "conditions", "evidence"):
            assert one.to_dict().get(key) == other.to_dict().get(key)
        assert load_entry(tmp_path / "a").examples == load_entry(tmp_path / "b").examples

    def test_later_runs_do_not_lose_what_is_known(self, tmp_path, monkeypatch):
        """Else leaving out an attack, or the evidence, would make a report look better."""
        evidence, fog = {"images": 3, "findings": []}, {"1": 0.5}
        monkeypatch.setattr("timm_fsr.evaluation.benchmark.gather_evidence", lambda *_, **__: evidence)
        monkeypatch.setattr(
            "timm_fsr.evaluation.benchmark.corruption_accuracy", lambda *_, names, **__: {names[0]: fog}
        )
        data = timm_fsr.load_data("fashion_mnist", "test", limit=10)
        model = tiny_resnet(in_chans=1)
        run = partial(assess, model, data, tmp_path)
        full = run(attacks=["pgd2"], evidence_images=3, corruption_images=2)
        assert len(full.corruptions) == 15
        later = run(attacks=["fgsm"])
        assert list(later.correct) == ["clean", "fgsm", "pgd2"]
        assert (later.evidence, later.corruptions) == (evidence, full.corruptions)
        assert later.to_dict() == Report.load(tmp_path / "report.json").to_dict()
        other = assess(model, data.head(8), tmp_path, attacks=["fgsm"])
        assert (other.evidence, other.corruptions) == ({}, {}), "they are about other images"
        (tmp_path / "report.json").write_text("{")
        assert run(attacks=["fgsm"]).evidence == {}

    def test_what_is_known_after_a_kill_is_not_computed_again(self, tmp_path, monkeypatch):
        calls: list[str] = []

        def accuracy(*_: object, names: list[str], **__: object) -> dict[str, dict[int, float]]:
            calls.append(names[0])
            if len(calls) == 5:
                raise KeyboardInterrupt
            return {names[0]: {1: 0.5}}

        monkeypatch.setattr("timm_fsr.evaluation.benchmark.corruption_accuracy", accuracy)
        data = timm_fsr.load_data("fashion_mnist", "test", limit=10)
        run = partial(assess, tiny_resnet(in_chans=1), data, tmp_path, attacks=[], corruption_images=2)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(run().corruptions) == 15
        assert len(calls) == 16, "only the one that was cut off is computed twice"
        monkeypatch.setattr("timm_fsr.evaluation.benchmark.gather_evidence", lambda *_, once, **__: once("eps", dict))
        run(evidence_images=3)
        assert "eps on 3 images by 250" in json.loads((tmp_path / "memo.json").read_text())["parts"]

    def test_the_batch_size_reaches_everything(self, tmp_path, monkeypatch):
        asked: dict[str, object] = {}
        monkeypatch.setattr(
            "timm_fsr.evaluation.benchmark.gather_evidence", lambda *_, **given: asked.update(given) or {}
        )
        sizes: list[int] = []
        model = tiny_resnet(in_chans=1)
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        data = timm_fsr.load_data("fashion_mnist", "test", limit=20)
        report = assess(model, data, tmp_path, attacks=["fgsm"], evidence_images=3, batch_size=7)
        assert max(sizes) == 7
        assert asked["batch_size"] == 7
        assert report.conditions["batch_size"] == 7
        lines = (tmp_path / "outcomes" / "0.jsonl").read_text().splitlines()
        assess(model, data, tmp_path, attacks=["fgsm"], batch_size=5)
        again = (tmp_path / "outcomes" / "0.jsonl").read_text().splitlines()
        assert len(again) == len(lines) + 8, "outcomes of other batches were taken for these"

    def test_l1_goes_without_examples(self, tmp_path):
        data = timm_fsr.load_data("fashion_mnist", "test", limit=4)
        assess(tiny_resnet(in_chans=1), data, tmp_path, attacks=[], norm="l1", eps=1.0)
        assert json.loads((tmp_path / "examples.json").read_text()) == {}

    def test_what_it_cannot_do_is_known_before_the_attacks(self, tmp_path, monkeypatch):
        data, model = timm_fsr.load_data("fashion_mnist", "test", limit=4), tiny_resnet(in_chans=1)
        monkeypatch.setattr("timm_fsr.evaluation.benchmark.evaluate", lambda *_, **__: pytest.fail("the attacks ran"))
        with pytest.raises(ValueError, match="no evidence of honest gradients for norm='l1'"):
            assess(model, data, tmp_path, norm="l1", attacks=[], evidence_images=2)
        with pytest.raises(ValueError, match=r"data is tuple; give what timm_fsr.load_data returns"):
            assess(model, (data.images, data.labels), tmp_path)
        for package in ("pyautoattack", "autoattack", "imagecorruptions"):
            monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ModuleNotFoundError, match="AutoAttack is not installed"):
            assess(model, data, tmp_path, evidence_images=2)
        with pytest.raises(ImportError, match="corruptions"):
            assess(model, data, tmp_path, corruption_images=2)


def test_a_model_that_answers_one_class_is_named_in_the_evidence_and_on_the_page(tmp_path):
    pytest.importorskip("pyautoattack")
    model = tiny_resnet(in_chans=1)
    with torch.no_grad():
        model.fc.weight *= 0.01
        model.fc.bias[3] += 100
    data = timm_fsr.load_data("fashion_mnist", "test", limit=120)
    report = assess(model, data, tmp_path, attacks=["fgsm"], evidence_images=2)
    said = f"the model does not work: it answers the class {data.classes[3]!r} for nearly all images"
    assert report.notes[0].startswith(said)
    assert report.evidence["findings"][0]["level"] == "warning"
    assert report.evidence["findings"][0]["text"].startswith(said)
    assert "Robust accuracy says nothing here: the model does not work" in (tmp_path / "report.html").read_text()
    again = assess(model, data, tmp_path, attacks=["fgsm"], evidence_images=2)
    assert again.to_dict() == report.to_dict(), "the warning is not added twice"
