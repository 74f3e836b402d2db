"""Reports: counting, intervals and reading back what was written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import timm_fsr.utils.files
from timm_fsr.reports.report import Report, format_eps
from timm_fsr.reports.statistics import clopper_pearson


@pytest.fixture
def report() -> Report:
    """Seven images; one more than any power of two, so that shares are no exact binary fractions."""
    outcomes = {"clean": "1111110", "fgsm": "1110000", "pgd20": "0111000"}
    return Report(
        correct={name: torch.tensor([flag == "1" for flag in flags]) for name, flags in outcomes.items()},
        attacks={"fgsm": "FGSM(...)", "pgd20": "PGD(...)"},
        norm="linf",
        eps=8 / 255,
        seed=3,
        conditions={"model": "tiny", "data": "ünïcode", "classes": ["a", "b", "c", "d"]},
        stages={"pgd20": {"first": torch.tensor([True] * 5 + [False] * 2)}},
        labels=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        notes=("one", "two"),
        calibration={"clean": {"brier_score": 0.25}},
        evidence={"findings": [{"level": "ok", "text": "fine"}]},
        corruptions={"fog": {"1": 0.5}},
    )


class TestCounting:
    def test_accuracies_are_exact_shares(self, report):
        assert report.accuracy == {"clean": 6 / 7, "fgsm": 3 / 7, "pgd20": 3 / 7}
        assert report.count == 7

    def test_the_worst_case_counts_images_right_under_all(self, report):
        assert report.worst_case == 2 / 7

    def test_classes_are_counted_apart(self, report):
        assert report.per_class("clean") == [1.0, 1.0, 0.5, None]
        assert report.per_class("fgsm") == [1.0, 0.0, 0.0, None]
        assert report.per_class() == [2 / 3, 0.0, 0.0, None]

    def test_intervals_are_of_the_named_share(self, report):
        assert report.interval("fgsm") == clopper_pearson(3, 7)
        assert report.interval("worst_case") == clopper_pearson(2, 7)
        with pytest.raises(KeyError):
            report.interval("pgd100")

    @pytest.mark.parametrize(
        ("successes", "count", "low", "high"),
        # Newcombe (1998), Statistics in Medicine 17, table I, method 5.
        [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
    )
    def test_intervals_are_the_published_ones(self, successes, count, low, high):
        assert clopper_pearson(successes, count) == pytest.approx((low, high), abs=5e-5)
        mirrored = (1 - high, 1 - low)
        assert clopper_pearson(count - successes, count) == pytest.approx(mirrored, abs=5e-5)

    @pytest.mark.parametrize(
        ("eps", "text"),
        [(8 / 255, "8/255"), (1 / 255, "1/255"), (0.1, "0.1"), (0.5, "0.5"), (0.0, "0"), (1.0, "255/255")],
    )
    def test_eps_is_written_as_the_field_does(self, eps, text):
        assert format_eps(eps) == text

    @pytest.mark.parametrize(
        ("eps", "norm", "text"),
        [
            (6.25 / 255, "linf", "6.25/255"),
            (12.5 / 255, "linf", "12.5/255"),
            (0.025, "linf", "0.025"),
            (1.0, "l2", "1"),
            (0.5, "l2", "0.5"),
            (128 / 255, "l2", "0.502"),
            (12.0, "l1", "12"),
        ],
    )
    def test_only_linf_counts_in_255ths(self, eps, norm, text):
        assert format_eps(eps, norm) == text

    def test_the_summary_names_everything(self, report):
        assert report.summary() == (
            "clean 85.71 %, fgsm 42.86 %, pgd20 42.86 %, worst case 28.57 % (Linf 8/255, 7 images); "
            "upper bound: FGSM and PGD-20 only; AutoAttack and adaptive attacks usually lower it"
        )

    @pytest.mark.parametrize(
        ("attacks", "said"),
        [
            (["fgsm", "pgd20", "pgd100x5"], "FGSM, PGD-20 and PGD-100 with 5 restarts only"),
            (["cw30"], "C&W-30 only"),
            (["mine", "square"], "mine and square only"),
            (["fgsm", "official-ensemble"], "FGSM only"),
            ([], "no attack was run"),
            (["fgsm", "autoattack"], ""),
            (["adaptive"], ""),
            (["rand"], ""),
        ],
    )
    def test_weak_attacks_alone_give_an_upper_bound(self, report, attacks, said):
        correct = dict.fromkeys(["clean", *attacks], torch.tensor([True, False]))
        found = dataclasses.replace(report, correct=correct, attacks=dict.fromkeys(attacks, "..."), labels=None)
        expected = f"upper bound: {said}; AutoAttack and adaptive attacks usually lower it" if said else ""
        assert found.upper_bound == expected
        assert found.summary().endswith(expected or "images)")


class TestCollapse:
    def report(self, clean: torch.Tensor, **changes: object) -> Report:
        values = {"conditions": {"classes": ["ant", "bee"]}, "labels": torch.arange(200) % 2}
        return Report(
            correct={"clean": clean, "autoattack": clean},
            attacks={},
            norm="linf",
            eps=0.1,
            seed=0,
            **{**values, **changes},
        )

    def test_it_is_found_in_the_outcomes(self):
        """Also in those of a report that was written before it was looked for."""
        found = self.report(torch.arange(200) % 2 == 0)
        assert found.collapsed.startswith("the model does not work: it answers the class 'ant' for nearly all images")
        assert found.collapsed in found.summary()
        assert Report.from_dict(found.to_dict()).collapsed == found.collapsed
        assert self.report(torch.arange(200) % 2 == 0, labels=None).collapsed == ""

    def test_a_model_that_works_is_not_named(self):
        found = self.report(torch.arange(200) < 150)
        assert found.collapsed == ""
        assert found.summary().endswith("images)")


class TestReadingBack:
    def test_a_report_survives_the_disk(self, report, tmp_path):
        report.save(tmp_path / "new" / "report.json")
        again = Report.load(tmp_path / "new" / "report.json")
        assert again.to_dict() == report.to_dict()
        assert {name: flags.dtype for name, flags in again.correct.items()} == dict.fromkeys(report.correct, torch.bool)
        assert (again.norm, again.eps, again.seed, again.conditions) == ("linf", 8 / 255, 3, report.conditions)

    def test_a_folder_is_read_as_the_command_reads_it(self, report, tmp_path):
        report.save(tmp_path / "report.json")
        assert Report.load(tmp_path).to_dict() == Report.load(tmp_path / "report.json").to_dict()
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"empty holds no report\.json; give the folder of an evaluation"):
            Report.load(tmp_path / "empty")

    def test_it_prints_as_one_line(self, report):
        assert str(report) == f"tiny on ünïcode: {report.summary()}"
        assert repr(report) == f"<Report: {report}>"
        assert str(dataclasses.replace(report, conditions={})).startswith("a model on unnamed images: clean 85.71 %")

    def test_the_file_shows_the_numbers(self, report, tmp_path):
        report.save(tmp_path / "report.json")
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["accuracy"] == {"clean": 6 / 7, "fgsm": 3 / 7, "pgd20": 3 / 7, "worst_case": 2 / 7}
        assert written["threat_model"] == {"norm": "linf", "eps": 8 / 255}
        assert written["correct"]["fgsm"] == "1110000"
        assert written["interval_95"]["fgsm"] == list(report.interval("fgsm"))
        assert written["stages"]["pgd20"]["first"] == "1111100"
        assert written["labels"] == [0, 0, 0, 1, 1, 2, 2]
        assert written["schema_version"] == 2

    def test_a_report_of_version_1_is_read(self, report):
        """As the first release wrote it."""
        text = (
            '{"schema_version": 1, "threat_model": {"norm": "linf", "eps": 0.1}, "seed": 3, "images": 2, '
            '"accuracy": {"clean": 1.0, "fgsm": 0.5, "worst_case": 0.5}, "attacks": {"fgsm": "FGSM()"}, '
            '"conditions": {"model": "tiny"}, "correct": {"clean": "11", "fgsm": "10"}}'
        )
        old = Report.from_dict(json.loads(text))
        assert (old.worst_case, old.labels, old.stages, old.notes) == (0.5, None, {}, ())
        with pytest.raises(ValueError, match="without labels"):
            old.per_class()

    def test_a_failed_save_keeps_the_old_file(self, report, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        report.save(path)
        before = path.read_bytes()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(timm_fsr.utils.files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            report.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("", "is not JSON"),
            ("[1, 2]", "holds no report"),
            ("{}", "schema version None, this timm_fsr reads 1 to 2; update"),
            ('{"schema_version": 3}', "schema version 3"),
            ('{"schema_version": 1}', "lacks the key 'correct'; evaluate the model again"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, text, message):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Report.load(tmp_path / "report.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("threat_model", {"norm": "linf", "eps": "abc"}),
            ("threat_model", {"norm": "linf", "eps": None}),
            ("threat_model", {"norm": "linf", "eps": float("nan")}),
            ("threat_model", {"norm": "l7", "eps": 0.1}),
            ("threat_model", {"norm": 7, "eps": 0.1}),
            ("labels", ["a"] * 7),
            ("labels", [1, 2]),
            ("labels", [-1] * 7),
            ("correct", {}),
            ("correct", {"fgsm": "1110000"}),
            ("correct", {"clean": "01", "fgsm": "1110000"}),
            ("correct", {"clean": ""}),
            ("conditions", {"classes": 5}),
            ("conditions", {"recipe": 5}),
            ("notes", [5]),
            ("attacks", {"fgsm": 5}),
            ("calibration", {"clean": 5}),
            ("evidence", {"findings": 5}),
            ("corruptions", {"fog": 5}),
        ],
    )
    def test_values_that_no_evaluation_writes_are_refused(self, report, tmp_path, key, value):
        (tmp_path / "report.json").write_text(json.dumps({**report.to_dict(), key: value}))
        with pytest.raises(ValueError, match=r"report\.json: the report is damaged \(.*\); evaluate the model again"):
            Report.load(tmp_path / "report.json")

    def test_damaged_values_are_refused(self, report):
        values = {**report.to_dict(), "threat_model": None}
        with pytest.raises(ValueError, match="evaluate the model again"):
            Report.from_dict(values)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no report .*nothing\.json; give"):
            Report.load(tmp_path / "nothing.json")
