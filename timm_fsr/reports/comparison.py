"""Comparing reports: which recipes had an equal budget, and which differences are chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm_fsr.layers import list_layers
from timm_fsr.reports.report import Report

RECIPE_KEYS = frozenset(
    {
        "output",
        "imports",
        "overwrite",
        "resume",
        "seed",
        "mixed_precision",
        "channels_last",
        "compile",
        "gradient_checkpointing",
        "batch_norm",
        "trackers",
        "model",
        "data",
        "attack",
        "objective",
        "optim",
        "evaluation",
        "checkpoint",
    }
)
"""The keys of `timm_fsr.Recipe`. Values with another key describe a training by other code."""

# None of it touches the arithmetic of training.
FREE = (
    "output",
    "imports",
    "overwrite",
    "resume",
    "trackers",
    "checkpoint",
    "data.source",
    "data.extra_source",
    "data.workers",
    "evaluation.attacks",
    "optim.nonfinite",
    "data.on_error",
)
# Keys that older recipes lack, with what they meant without them.
IMPLICIT: dict[str, Any] = {
    "attack.args": {},
    "optim.freeze": 0,
    "data.auto_augment": None,
    "data.random_erasing": 0.0,
    "data.erasing_mode": "pixel",
    "data.erasing_count": 1,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.cutmix_minmax": None,
    "data.mixup_prob": 1.0,
    "data.mixup_switch_prob": 0.5,
    "data.mixup_mode": "batch",
    "data.mixup_off_epoch": 0,
}
_LAYER = ("model.layer", "model.layer_args", "model.at")


def layer_of(recipe: Mapping[str, Any]) -> str | None:
    """The feature layer that a recipe, as plain values, trains with, whether it stands apart or in the model's name."""
    model = recipe.get("model") or {}
    return model.get("layer") or _split(str(model.get("name", "")))[1]


def is_free(key: str) -> bool:
    """Whether a recipe's key, such as "data.workers", or the section that it is in, has no say in the training."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two recipes, as plain values, say otherwise of the training, but for the feature layer.

    Returns:
        Both values by key ("optim.lr"). A key that only one of them has says nothing of the other; see `same_keys`.
    """
    ours, theirs = _settings(one), _settings(other)
    return {key: (ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]}


def same_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes, which may be written by hand, speak of the same keys, so that no difference is unknown."""
    return _settings(one).keys() == _settings(other).keys()


def listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in words: "optim.lr (0.1 and 0.5), seed (0 and 1)"."""
    return ", ".join(f"{key} ({one} and {other})" for key, (one, other) in found.items())


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide a training without a layer; what users name themselves (`model.args`) stays one value."""
    flat: dict[str, Any] = {}
    for section, value in recipe.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{section}.{key}".removesuffix("."): entry for key, entry in inner.items()}
    if "attack" in recipe:
        flat = {**IMPLICIT, **flat}
    if "model.name" in flat:
        flat["model.name"] = _split(str(flat["model.name"]))[0]
    return {key: value for key, value in flat.items() if not is_free(key) and key not in _LAYER}


def _split(name: str) -> tuple[str, str | None]:
    """A model's name without the feature layer that its architecture may end in, and that layer."""
    architecture, dot, tag = name.partition(".")
    base, _, layer = architecture.rpartition("_")
    return (f"{base}{dot}{tag}", layer) if layer in list_layers() else (name, None)


def mcnemar(one: Report, other: Report, name: str) -> tuple[int, int, bool]:
    """How many images `other` gains and loses against `one`, and whether that is more than chance (5 %) explains.

    McNemar's test: under no difference, gains and losses are equally likely.
    """
    first, second = (report.flags_of(name) for report in (one, other))
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return gained, lost, abs(gained - lost) > 1.96 * math.sqrt(max(1, gained + lost))
