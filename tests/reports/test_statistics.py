"""Calibration figures against plain Python loops and values worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from timm_fsr.reports.statistics import FEWEST_IMAGES, calibration, collapse, mean_interval, per_class_accuracy

NAN, INF = float("nan"), float("inf")


def example(count: int = 200, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * scale
    return logits, torch.randint(classes, (count,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


class TestCalibration:
    @pytest.mark.parametrize("bins", [1, 7, 15])
    def test_it_equals_plain_loops(self, bins):
        logits, labels = example()
        found = calibration(logits, labels, bins=bins)
        groups: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
        nll = brier = 0.0
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            probabilities = softmax(row)
            confidence = max(probabilities)
            right = probabilities.index(confidence) == label
            place = next(m for m in range(bins) if m / bins < confidence <= (m + 1) / bins)
            groups[place].append((confidence, right))
            nll -= math.log(probabilities[label])
            brier += sum((p - (k == label)) ** 2 for k, p in enumerate(probabilities))
        count = len(labels)
        pairs = [pair for group in groups for pair in group]
        assert found["bins"]["count"] == [len(group) for group in groups]
        assert found["negative_log_likelihood"] == pytest.approx(nll / count)
        assert found["brier_score"] == pytest.approx(brier / count)
        assert found["accuracy"] == sum(right for _, right in pairs) / count
        assert found["mean_confidence"] == pytest.approx(sum(confidence for confidence, _ in pairs) / count)
        ece = 0.0
        for group, confidence, accuracy in zip(
            groups, found["bins"]["confidence"], found["bins"]["accuracy"], strict=True
        ):
            if not group:
                assert confidence is accuracy is None
                continue
            assert confidence == pytest.approx(sum(value for value, _ in group) / len(group))
            assert accuracy == sum(right for _, right in group) / len(group)
            ece += len(group) / count * abs(accuracy - confidence)
        assert found["expected_calibration_error"] == pytest.approx(ece)

    def test_certain_and_right_is_perfect(self):
        found = calibration(torch.eye(3) * 1000, torch.arange(3))
        assert [
            found[key]
            for key in (
                "accuracy",
                "mean_confidence",
                "expected_calibration_error",
                "negative_log_likelihood",
                "brier_score",
            )
        ] == [1, 1, 0, 0, 0]
        assert found["bins"]["count"] == [0] * 14 + [3]

    def test_certain_and_wrong_is_worst(self):
        found = calibration(torch.eye(2) * 1000, torch.tensor([1, 0]))
        assert [
            found[key] for key in ("accuracy", "expected_calibration_error", "negative_log_likelihood", "brier_score")
        ] == [0, 1, 1000, 2]

    def test_a_border_belongs_to_the_bin_below(self):
        found = calibration(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), bins=10)
        assert found["bins"]["count"] == [0, 0, 0, 0, 4, 0, 0, 0, 0, 0]
        assert found["expected_calibration_error"] == pytest.approx(0.25)
        assert found["negative_log_likelihood"] == pytest.approx(math.log(2))

    def test_half_precision_logits_are_summed_in_double(self):
        logits, labels = example()
        low = calibration(logits.bfloat16(), labels)
        assert low == calibration(logits.bfloat16().double(), labels)

    def test_the_values_are_plain_json(self):
        found = calibration(*example())
        assert json.loads(json.dumps(found)) == found

    @pytest.mark.parametrize(
        ("logits", "labels", "bins", "message"),
        [
            (torch.zeros(2, 3).long(), torch.tensor([0, 1]), 15, "floating point"),
            (torch.zeros(2), torch.tensor([0, 1]), 15, r"shape \(2,\)"),
            (torch.zeros(0, 3), torch.tensor([]).long(), 15, "one image or more"),
            (torch.tensor([[0.0, NAN]]), torch.tensor([0]), 15, "NaN or infinite"),
            (torch.tensor([[0.0, INF]]), torch.tensor([0]), 15, "NaN or infinite"),
            (torch.zeros(2, 3), torch.tensor([0]), 15, r"labels have shape \(1,\)"),
            (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), 15, "int64"),
            (torch.zeros(2, 3), torch.tensor([0, 3]), 15, "labels run from 0 to 3, but there are 3 classes"),
            (torch.zeros(2, 3), torch.tensor([-1, 0]), 15, "labels run from -1"),
            (torch.zeros(2, 3), torch.tensor([0, 1]), 0, "bins=0 leaves no bin"),
        ],
    )
    def test_refusals(self, logits, labels, bins, message):
        with pytest.raises(ValueError, match=message):
            calibration(logits, labels, bins=bins)


class TestPerClassAccuracy:
    def test_it_equals_plain_loops(self):
        logits, labels = example(classes=6)
        correct = logits.argmax(1) == labels
        expected: list[float | None] = []
        for label in range(8):
            flags = [flag for flag, own in zip(correct.tolist(), labels.tolist(), strict=True) if own == label]
            expected.append(sum(flags) / len(flags) if flags else None)
        assert expected[6:] == [None, None]
        assert per_class_accuracy(correct, labels, 8) == expected

    def test_no_image_at_all(self):
        assert per_class_accuracy(torch.zeros(0).bool(), torch.zeros(0).long(), 2) == [None, None]

    @pytest.mark.parametrize(
        ("correct", "labels", "message"),
        [
            (torch.tensor([1, 0]), torch.tensor([0, 1]), "one bool per image"),
            (torch.tensor([[True]]), torch.tensor([0]), r"shape \(1, 1\)"),
            (torch.tensor([True]), torch.tensor([0, 1]), r"labels have shape \(2,\)"),
            (torch.tensor([True]), torch.tensor([2]), "labels run from 2 to 2, but there are 2 classes"),
        ],
    )
    def test_refusals(self, correct, labels, message):
        with pytest.raises(ValueError, match=message):
            per_class_accuracy(correct, labels, 2)


class TestCollapse:
    @pytest.mark.parametrize(
        ("right", "total", "said"),
        [
            ([0, 100, 0, 0], [100] * 4, "for nearly all images (100.0 % of that class are right, 0.0 % of all others)"),
            (
                [3, 98, 5, 2],
                [100] * 4,
                "it answers the class 'b' for nearly all images (98.0 % of that class are right",
            ),
            ([9_000, 20], [9_000, 1_000], "the class 'a'"),  # its accuracy is 90 %
            ([25, 26, 24, 27], [100] * 4, "its clean accuracy of 25.5 % is no better than guessing among 4 classes"),
            ([0, 0, 0, 0], [100] * 4, "no better than guessing"),
            ([0, 0, 30, 0], [0, 0, 60, 60], "no better than guessing among 2 classes"),
            ([60, 60, 60, 60], [100] * 4, ""),
            ([0, 100, 8, 8], [100] * 4, "no better than guessing"),  # 29 % of 400, and 5.3 % of the others
            ([0, 1_000, 100, 100], [1_000] * 4, ""),  # 30 % of 4,000 is more than chance
            ([9_000, 300], [9_000, 1_000], ""),
            ([0, 10, 0, 0], [10] * 4, ""),  # too few
            ([200], [200], ""),
            ([0, 0, 200], [0, 0, 200], ""),  # of one class alone, nobody can tell
        ],
    )
    def test_what_is_said(self, right, total, said):
        found = collapse(right, total, "abcd")
        assert said in found
        assert bool(found) == bool(said)

    def test_a_class_without_a_name_has_its_number(self):
        assert "the class 1 for" in collapse([0, 100], [100, 100])

    def test_the_fewest_images_count(self):
        half = FEWEST_IMAGES // 2
        assert collapse([half, 0], [half, half])
        assert not collapse([half - 1, 0], [half - 1, half])


class TestMeanInterval:
    @pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (6, 2.571), (31, 2.042), (101, 1.984)])
    def test_its_width_is_that_of_the_tables_of_students_t(self, count, quantile):
        values = [float(value) for value in range(count)]
        mean, low, high = mean_interval(values)
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        assert mean == pytest.approx((count - 1) / 2)
        assert (high - mean) / error == pytest.approx(quantile, abs=6e-4)
        assert mean - low == pytest.approx(high - mean)

    def test_one_value_has_none(self):
        assert mean_interval([0.5]) is None
        assert mean_interval([]) is None
