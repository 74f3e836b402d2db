"""Statistics of a report: confidence intervals, calibration and accuracy per class."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_IMAGES = 100
"""Of fewer images nothing is said: a weak model of ten classes may well be no better than chance on them."""

ONE_CLASS, OTHER_CLASSES = 0.95, 0.05
"""A model answers one class for nearly all images if it gets at least the first share of that class right and at most
the second of all others: those called by their own names are then the exception."""


def collapse(right: Sequence[int], total: Sequence[int], names: Sequence[str] = ()) -> str:
    """Whether a classifier has collapsed: it answers one class for nearly all images, or is no better than guessing.

    Robust accuracy says nothing about such a model: no attack can change an answer that does not depend on the image.

    Args:
        right: clean images of each class that were classified correctly.
        total: all images of each class.
        names: of the classes.

    Returns:
        What is wrong, as a clause; "" for a model that works, or where there are too few images or one class alone.
    """
    present = [index for index, count in enumerate(total) if count]
    images, correct = sum(total), sum(right)
    if images < FEWEST_IMAGES or len(present) < 2:
        return ""
    best = max(present, key=lambda index: right[index] / total[index])
    own, others = right[best] / total[best], (correct - right[best]) / (images - total[best])
    if own >= ONE_CLASS and others <= OTHER_CLASSES:
        name = repr(str(names[best])) if best < len(names) else str(best)
        return (
            f"it answers the class {name} for nearly all images ({100 * own:.1f} % of that class are right, "
            f"{100 * others:.1f} % of all others)"
        )
    if clopper_pearson(correct, images)[0] <= 1 / len(present):
        accuracy = f"{100 * correct / images:.1f} %"
        return f"its clean accuracy of {accuracy} is no better than guessing among {len(present)} classes"
    return ""


def calibration(logits: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, Any]:
    """Calibration of a classifier on labelled images, as plain JSON values.

    Confidence is the largest softmax probability. Bin m of M holds the images with confidence in ((m-1)/M, m/M].

    Args:
        logits: (N, classes), finite floating point, N of 1 or more.
        labels: (N,) int64 in [0, classes).
        bins: M, their number, 1 or more.

    Returns:
        - "accuracy", "mean_confidence": in [0, 1]
        - "expected_calibration_error": Guo et al. 2017 (arXiv 1706.04599, eq. 3), in [0, 1]: the distance of accuracy
          and mean confidence of a bin, averaged with the bins' shares of the images
        - "negative_log_likelihood": mean in nats, 0 or more
        - "brier_score": mean over the images of the squared distance between the probabilities and the one-hot label,
          summed over the classes (Brier 1950), in [0, 2]
        - "bins": by name "confidence" and "accuracy", `bins` values in [0, 1], None for a bin without images, and
          "count", `bins` whole numbers

    Raises:
        ValueError: the tensors are no such logits and labels, or there is no bin.
    """
    _check_logits(logits, labels)
    if bins < 1:
        raise ValueError(f"bins={bins} leaves no bin to put an image in; use 1 or more, 15 is usual")
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    correct = (predicted == labels).double()
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = place.bincount(minlength=bins)
    confidence_sum = place.bincount(confidence, minlength=bins)
    correct_sum = place.bincount(correct, minlength=bins)
    one_hot = F.one_hot(labels, logits.shape[1])
    return {
        "accuracy": int(correct.sum()) / len(labels),
        "mean_confidence": float(confidence.mean()),
        "expected_calibration_error": float((confidence_sum - correct_sum).abs().sum()) / len(labels),
        "negative_log_likelihood": float(F.cross_entropy(logits, labels)),
        "brier_score": float((probabilities - one_hot).square().sum(dim=1).mean()),
        "bins": {
            "confidence": _means(confidence_sum, count),
            "accuracy": _means(correct_sum, count),
            "count": count.tolist(),
        },
    }


def per_class_accuracy(correct: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    """The share of each class's images that were classified correctly.

    Args:
        correct: (N,) bool: was the image classified correctly?
        labels: (N,) int64 true classes in [0, num_classes).
        num_classes: the number of classes, 1 or more.

    Returns:
        `num_classes` values in [0, 1], None where a class has no image.

    Raises:
        ValueError: the tensors are no such flags and labels.
    """
    if correct.dtype != torch.bool or correct.ndim != 1:
        raise ValueError(
            f"correct has shape {tuple(correct.shape)} and dtype {correct.dtype}; give one bool per image, such as "
            "logits.argmax(1) == labels"
        )
    _check_labels(labels, len(correct), num_classes)
    correct, labels = correct.cpu(), labels.cpu()
    return _means(labels[correct].bincount(minlength=num_classes), labels.bincount(minlength=num_classes))


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}; give the model's raw output, floating "
            "point (N, classes), for one image or more"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinite values, which no probability follows from; check the weights")
    _check_labels(labels, len(logits), logits.shape[1])


def _check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give one int64 class per image, "
            f"shape ({count},)"
        )
    if count and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); give the labels that the model was trained with"
        )


def _means(sums: Tensor, counts: Tensor) -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


@functools.lru_cache(maxsize=4096)  # a report, its page and its card ask for the same intervals
def clopper_pearson(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion seen in `count` independent trials (Clopper and Pearson, 1934), within [0, 1].

    Exact in that it covers the true proportion at least 95 times of 100, whatever that is.
    """
    tail = 0.025
    low = 0.0 if successes == 0 else _root(lambda p: 1 - _at_most(successes - 1, count, p) - tail)
    high = 1.0 if successes == count else _root(lambda p: tail - _at_most(successes, count, p))
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of a sample and the 95 % interval of what it estimates, by Student's t distribution.

    Args:
        values: such as the accuracies of a training with several seeds.

    Returns:
        Mean, lower and upper bound; None for fewer than two values, whose spread is unknown.
    """
    if len(values) < 2:
        return None
    mean, half = fmean(values), _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """What 97.5 % of Student's t distribution with this many degrees of freedom lies below: 12.706 for 1."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2

    def below(place: float) -> float:
        angles = torch.linspace(0, math.atan(place / math.sqrt(freedom)), 4001, dtype=torch.float64)
        # With t = sqrt(freedom) tan(angle) the density is a power of a cosine, smooth on a finite range.
        return 0.5 + math.exp(log_scale) * math.sqrt(freedom) * float(
            torch.trapezoid(angles.cos() ** (freedom - 1), angles)
        )

    found = _root(lambda share: below(share / max(1 - share, 1e-12)) - 0.975)
    return found / (1 - found)


def _at_most(successes: int, count: int, probability: float) -> float:
    """The probability of at most this number of successes in `count` trials."""
    k = torch.arange(successes + 1, dtype=torch.float64)
    ways = math.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    logs = ways + k * math.log(probability) + (count - k) * math.log1p(-probability)
    return float(logs.logsumexp(dim=0).exp())


def _root(rising: Any) -> float:
    """Where a rising function of a probability crosses zero, by bisection to the last bits."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
