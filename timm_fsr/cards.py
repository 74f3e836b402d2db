"""Model cards: how robust a published model is and how it was made, generated from its report and recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from timm_fsr.budget import differences, layer_of, listed, same_keys
from timm_fsr.metadata import (
    check_license,
    check_repo_id,
    metadata,
    results,
    starting_point,
    tested_data,
    training_data,
)
from timm_fsr.page import STRONG, mcnemar
from timm_fsr.parts import Parts, publishable
from timm_fsr.pretrained import CARD
from timm_fsr.report import WORST_CASE, Report
from timm_fsr.weights import RECORD

_ANEW = f"make it anew by timm-fsr card (FOLDER/{CARD} is pushed unchanged)"

# What a baseline has to have in common with the model, by condition of their reports, and how a card calls that.
_COMMON = {
    "training_data": "data",
    "training": "epochs, attack",
    "training_seed": "seed",
    "checkpoint_rule": "checkpoint rule",
    "data_fingerprint": "images",
}


def render_card(
    parts: Parts,
    repo_id: str,
    *,
    tag: str | None = None,
    baseline: Report | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """The card of a model: metadata for the Hub, and Markdown.

    Args:
        parts: see `read_parts`.
        repo_id: "user/name", where the model is or will be.
        tag: the name by which timm knows the model without the Hub's, if it does.
        baseline: the report of the same training without the feature layer, on the same images, to compare with.
        license: of the weights, by the Hub's short name; None takes the one in the model's configuration.
        base_model: what the training started from, "user/name"; None finds it in the recipe.

    Raises:
        ValueError: no licence is known, a name or licence that cannot be one, or a baseline that differs from the
            model in more than the layer.
    """
    check_repo_id(repo_id)
    license = parts.config["pretrained_cfg"].get("license") if license is None else license
    if license is None:
        raise ValueError("the model's configuration names no licence; give one, such as license='apache-2.0'")
    check_license(license)
    started, found = starting_point(parts.recipe)
    if base_model is not None:
        check_repo_id(base_model)
        started = found = base_model
    comparison = None if baseline is None else _comparison(parts, publishable(baseline))
    body = _body(parts, repo_id=repo_id, tag=tag, license=license, started=started, baseline=comparison)
    return f"---\n{metadata(parts, repo_id, license, found).to_yaml()}\n---\n\n{body}\n"


def check_card(text: str, parts: Parts, repo_id: str) -> None:
    """Refuse a card that the Hub would not understand, that is of another model, or whose figures are not the report's.

    Words may be added to a generated card; its lines that have figures have to stay as they are.

    Raises:
        ValueError: see above.
    """
    try:
        data: Any = ModelCard(text).data
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of the card are not valid ({error}); {_ANEW}") from error
    if data.get("library_name") != "timm" or not data.get("license"):
        raise ValueError(f"the card's metadata lack library_name: timm or a license; {_ANEW}")
    check_license(data.license)
    if not re.search(rf"hf-hub:{re.escape(repo_id)}(?![\w.-])", text):
        raise ValueError(f"the card nowhere names hf-hub:{repo_id}, so it is of another repository; {_ANEW}")
    expected, found = results(parts), data.get("eval_results") or []
    if found != expected:
        differing = [str(result.metric_name) for result in expected if result not in found] or [
            "more results than those"
        ]
        raise ValueError(
            f"the results in the card's metadata are not the report's ({', '.join(differing)}); the card is of another "
            f"evaluation: {_ANEW}"
        )
    digest = str(parts.config.get(RECORD, {}).get("sha256", ""))[:16]
    if digest not in text:
        raise ValueError(f"the card does not name the SHA-256 of these weights ({digest}...); {_ANEW}")
    lines = _body(parts, repo_id=repo_id, tag=None, license=data.license, started=None, baseline=None).splitlines()
    missing = [line for line in lines if " %" in line and line not in text.splitlines()]
    if missing:
        raise ValueError(f"the card lacks this line, or has other figures in it: {missing[0]!r}; {_ANEW}")


def _body(parts: Parts, **given: Any) -> str:
    """The text of a card; `given` is what is known of the model from elsewhere than its parts."""
    environment = Environment(
        loader=PackageLoader("timm_fsr"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    title = given["repo_id"].partition("/")[2]
    return environment.get_template("card.md").render(**_facts(parts), title=title, **given).strip()


def _facts(parts: Parts) -> dict[str, Any]:
    """What the template shows of the model itself."""
    report, config, (tested, split) = parts.report, parts.config, tested_data(parts)
    pretrained_cfg = config["pretrained_cfg"]
    channels, height, width = pretrained_cfg["input_size"]
    plain = not any(pretrained_cfg["mean"]) and all(value == 1 for value in pretrained_cfg["std"])
    return {
        "parts": parts,
        "report": report,
        "config": config,
        "recipe": parts.recipe,
        "data": training_data(parts),
        "tested": report.conditions.get("data") or tested.title,
        "split": f"{split} " if split else "",
        "layer": parts.layer,
        "record": config.get(RECORD, {}),
        "shape": f"(N, {channels}, {height}, {width})",
        "statistics": None if plain else (pretrained_cfg["mean"], pretrained_cfg["std"]),
        "classes": config.get("label_names") or pretrained_cfg.get("label_names"),
        "rows": [_row(report, name) for name in (*report.correct, WORST_CASE)],
        "adaptive": _stages(report, "adaptive"),
        "strong": [name for name in STRONG if name in report.correct],
        "findings": report.evidence.get("findings", []),
        "beyond": next(((eps, share) for eps, share in _radii(report) if eps > report.eps), None),
        "corruption": _mean_corruption(report),
    }


def _row(report: Report, name: str) -> dict[str, Any]:
    low, high = report.interval(name)
    accuracy = report.worst_case if name == WORST_CASE else report.accuracy[name]
    return {"name": name.replace("_", " "), "accuracy": accuracy, "low": low, "high": high}


def _stages(report: Report, name: str) -> list[tuple[str, int]]:
    """How many images each stage of a suite broke that those before it had left."""
    before, rows = report.correct["clean"], []
    for stage, flags in report.stages.get(name, {}).items():
        rows.append((stage, int((before & ~flags).sum())))
        before = flags
    return rows


def _radii(report: Report) -> list[tuple[float, float]]:
    """Radii and accuracy within them, from the evidence."""
    found = report.evidence.get("eps", {"eps": (), "accuracy": ()})
    return list(zip(found["eps"], found["accuracy"], strict=True))


def _mean_corruption(report: Report) -> float | None:
    shares = [share for levels in report.corruptions.values() for share in levels.values()]
    return sum(shares) / len(shares) if shares else None


def _comparison(parts: Parts, baseline: Report) -> dict[str, Any]:
    """The baseline's figures beside the model's, and whether chance explains the difference in the worst case."""
    report = parts.report
    same, whole = _common(report, baseline), _check_recipes(parts.recipe, baseline.conditions.get("recipe"))
    gained, lost, distinguishable = mcnemar(baseline, report, WORST_CASE)
    rows = [(_row(report, name), _row(baseline, name)) for name in (*report.correct, WORST_CASE)]
    return {
        "rows": rows,
        "gained": gained,
        "lost": lost,
        "distinguishable": distinguishable,
        "same": same,
        "whole": whole,
    }


def _check_recipes(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> bool:
    """Whether the recipes of a model and of its baseline are known to be the same, but for the layer.

    Raises:
        ValueError: they are known to differ in more, or the baseline has a layer too.
    """
    if theirs is None:
        return False
    if layer := layer_of(theirs):
        raise ValueError(
            f"the baseline was trained with the layer {layer!r}; give the report of the training without a layer"
        )
    if found := differences(ours, theirs):
        raise ValueError(
            f"the recipe of the baseline differs from the model's in more than the layer: {listed(found)}; train both "
            "alike"
        )
    return same_keys(ours, theirs)


def _common(report: Report, baseline: Report) -> str:
    """What two reports say they have in common, as a list in words.

    Raises:
        ValueError: they differ in what has to be the same, or are about the same weights.
    """
    ours, theirs = report.conditions, baseline.conditions
    if ours.get("weights_sha256") and ours["weights_sha256"] == theirs.get("weights_sha256"):
        raise ValueError(
            "the baseline's report is about the model's own weights; give the report of the training without the layer"
        )
    same = {
        "threat model": (report.threat, baseline.threat),
        "number of images": (report.count, baseline.count),
        "attacks": (sorted(report.correct), sorted(baseline.correct)),
        "seed of the evaluation": (report.seed, baseline.seed),
        **{key.replace("_", " "): (ours.get(key), theirs.get(key)) for key in _COMMON},
    }
    for what, (mine, other) in same.items():
        if mine != other:
            raise ValueError(
                f"the {what} of the baseline's report is {other}, of the model's {mine}; train and evaluate both alike"
            )
    known = [word for key, word in _COMMON.items() if ours.get(key) is not None]
    return " and ".join(filter(None, [", ".join(known[:-1]), *known[-1:]]))
