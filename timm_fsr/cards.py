"""Model cards: how robust a published model is and how it was made, generated from its report and recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from timm.models import get_pretrained_cfg

from timm_fsr.models import list_pretrained
from timm_fsr.page import STRONG, mcnemar
from timm_fsr.pretrained import RECIPE, REPORT
from timm_fsr.report import WORST_CASE, Report
from timm_fsr.weights import CONFIG, RECORD, WEIGHTS

CARD = "README.md"

_PATH = re.compile(r"(?<![\w:/.~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\\[\],]+[/\\])+([^\s/\\\[\],]+)")
_ATTACK_NAMES = {"autoattack": "AutoAttack", "plus": "AutoAttack plus", "rand": "AutoAttack rand"}


class DataFacts(NamedTuple):
    """What a card says about a data set.

    Attributes:
        title: its name.
        hub: its id on the Hub.
        terms: under what its images may be used.
    """

    title: str
    hub: str
    terms: str


DATA = {
    "fashion_mnist": DataFacts(
        "Fashion-MNIST, the balanced subset inside timm_fsr", "zalando-datasets/fashion_mnist", "MIT licence"
    ),
    "uoft-cs/cifar10": DataFacts("CIFAR-10", "uoft-cs/cifar10", "its authors state no licence"),
    "uoft-cs/cifar100": DataFacts("CIFAR-100", "uoft-cs/cifar100", "its authors state no licence"),
    "ufldl-stanford/svhn": DataFacts("SVHN", "ufldl-stanford/svhn", "non-commercial use only"),
    "zh-plus/tiny-imagenet": DataFacts(
        "Tiny ImageNet", "zh-plus/tiny-imagenet", "ImageNet's terms: non-commercial research and education only"
    ),
    "ILSVRC/imagenet-1k": DataFacts(
        "ImageNet-1k", "ILSVRC/imagenet-1k", "ImageNet's terms: non-commercial research and education only"
    ),
}
"""By the `data.source` of a recipe."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What is known of a saved model.

    Attributes:
        config: content of `config.json`.
        report: of its evaluation.
        recipe: of its training, as plain values.
    """

    config: Mapping[str, Any]
    report: Report
    recipe: Mapping[str, Any]

    @property
    def layer(self) -> str | None:
        """The feature layer it has, by name."""
        groups = [key.removesuffix("_noise") for key in self.config.get("model_args", {}) if key.endswith("_noise")]
        recipe_layer = self.recipe.get("model", {}).get("layer")
        return groups[0] if groups else recipe_layer


def read_parts(folder: str | Path) -> Parts:
    """The configuration, report and recipe of a saved model, without paths of the machine that it was trained on.

    Raises:
        FileNotFoundError: one of them is missing; the message names all that are.
        ValueError: one of them is damaged.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, REPORT, RECIPE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; a published model has its weights, the report of its evaluation and "
            "the recipe of its training: save_pretrained(model, folder, report=..., recipe=...) writes them all"
        )
    config = _mapping(folder / CONFIG, json.loads)
    recipe = _mapping(folder / RECIPE, yaml.safe_load)
    known = _paths(recipe)
    report = Report.from_dict(without_paths(Report.load(folder / REPORT).to_dict(), known))
    recipe = without_paths(recipe, known)
    report.conditions.pop("recipe", None)  # it has a file of its own
    return Parts(config, report, {key: value for key, value in recipe.items() if key != "output"})


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
        ValueError: no licence is known, or the baseline is about another threat or other images.
    """
    license = license or parts.config.get("pretrained_cfg", {}).get("license")
    if not license:
        raise ValueError("the model's configuration names no licence; give one, such as license='apache-2.0'")
    if baseline is not None:
        _check_baseline(parts.report, baseline)
    base_model = base_model or _base_model(parts.recipe)
    environment = Environment(
        loader=PackageLoader("timm_fsr"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    body = environment.get_template("card.md").render(
        **_facts(parts), title=repo_id.partition("/")[2], repo_id=repo_id, tag=tag, base_model=base_model,
        baseline=_comparison(parts.report, baseline), license=license,
    )  # fmt: skip
    metadata = _metadata(parts, repo_id, license, base_model)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def check_card(text: str, parts: Parts) -> None:
    """Refuse a card that the Hub would not understand, or whose figures are not the report's.

    Raises:
        ValueError: see above.
    """
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of the card are not valid ({error}); make it anew by timm-fsr card") from error
    if data.get("library_name") != "timm" or not data.get("license"):
        raise ValueError("the card's metadata lack library_name: timm or a license; make it anew by timm-fsr card")
    expected = {result.metric_name: result.metric_value for result in _results(parts)}
    found = {result.metric_name: result.metric_value for result in data.get("eval_results") or []}
    if found != expected:
        raise ValueError(
            f"the card's results are {found}, the report's {expected}; the card is of another evaluation: make it anew "
            "by timm-fsr card"
        )


def without_paths(value: Any, known: Sequence[str] = ()) -> Any:
    """The same JSON values with each absolute path cut to its last part: where something lay is nobody's business.

    Args:
        value: JSON values.
        known: paths that may stand in it and have spaces, by which they could not be recognised inside a sentence.
    """
    if isinstance(value, str):
        for path in known:
            value = value.replace(path, Path(path).name)
        return _PATH.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: without_paths(entry, known) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry, known) for entry in value]
    return value


def _paths(recipe: Mapping[str, Any]) -> list[str]:
    """The paths that a recipe names."""
    data, model = recipe.get("data", {}), recipe.get("model", {})
    named = [data.get("source"), data.get("extra_source"), str(model.get("name")).removeprefix("local-dir:")]
    return [path for path in named if path and (Path(path).is_absolute() or path.startswith("~"))]


def _mapping(path: Path, read: Any) -> dict[str, Any]:
    try:
        found = read(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); save the model again") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is damaged: it holds no keys and values; save the model again")
    return found


def _check_baseline(report: Report, baseline: Report) -> None:
    same = {
        "threat model": (report.threat, baseline.threat),
        "number of images": (report.count, baseline.count),
        "data": (report.conditions.get("data_fingerprint"), baseline.conditions.get("data_fingerprint")),
        "attacks": (sorted(report.correct), sorted(baseline.correct)),
    }
    for what, (ours, theirs) in same.items():
        if ours != theirs:
            raise ValueError(
                f"the {what} of the baseline's report is {theirs}, of the model's {ours}; evaluate both alike"
            )


def _base_model(recipe: Mapping[str, Any]) -> str | None:
    """The repository that the training started from, as the recipe says."""
    model = recipe.get("model", {})
    name = str(model.get("name", ""))
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    ours = [entry.hub_id for entry in list_pretrained() if entry.name == name]
    if ours:
        return ours[0]
    config = get_pretrained_cfg(name, allow_unregistered=True) if model.get("pretrained") else None
    return config.hf_hub_id if config else None


def _metadata(parts: Parts, repo_id: str, license: str, base_model: str | None) -> ModelCardData:
    data = _data(parts)
    return ModelCardData(
        model_name=repo_id.partition("/")[2],
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        datasets=[data.hub] if data.hub else None,
        base_model=base_model,
        tags=[
            "timm",
            "timm_fsr",
            "image-classification",
            "adversarial-robustness",
            *([parts.layer] if parts.layer else []),
            *(["arxiv:2303.13846"] if parts.layer == "fsr" else []),
        ],
        eval_results=_results(parts),
    )


def _results(parts: Parts) -> list[EvalResult]:
    """Accuracies in percent: clean, under AutoAttack where it ran, and the worst case."""
    report, data = parts.report, _data(parts)
    names = ["clean", *(name for name in _ATTACK_NAMES if name in report.correct), WORST_CASE]
    results = []
    for name in names:
        value = report.worst_case if name == WORST_CASE else report.accuracy[name]
        attack = _ATTACK_NAMES.get(name, "worst case of all attacks")
        details: dict[str, Any] = {"n_examples": report.count, "seed": report.seed}
        if name != "clean":
            details |= {"norm": report.norm, "eps": float(report.eps)}
            details["attack"] = ", ".join(report.stages.get(name) or report.attacks)
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=data.hub or "unpublished",
                dataset_name=data.title,
                dataset_split="test",
                metric_type="accuracy",
                metric_name="Accuracy" if name == "clean" else f"Robust accuracy ({attack}, {report.threat})",
                metric_value=round(100 * value, 2),
                metric_args=details,
            )
        )
    return results


def _data(parts: Parts) -> DataFacts:
    source = str(parts.recipe.get("data", {}).get("source", ""))
    if source in DATA:
        return DATA[source]
    title = parts.report.conditions.get("data") or "unnamed images"
    return DataFacts(str(title).partition("[")[0], "", "see the data set's own page")


def _facts(parts: Parts) -> dict[str, Any]:
    """What the template shows of the model itself."""
    report, config = parts.report, parts.config
    pretrained_cfg = config["pretrained_cfg"]
    channels, height, width = pretrained_cfg["input_size"]
    plain = not any(pretrained_cfg["mean"]) and all(value == 1 for value in pretrained_cfg["std"])
    return {
        "parts": parts,
        "report": report,
        "config": config,
        "recipe": parts.recipe,
        "data": _data(parts),
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


def _comparison(report: Report, baseline: Report | None) -> dict[str, Any] | None:
    """The baseline's figures beside the model's, and whether chance explains the difference in the worst case."""
    if baseline is None:
        return None
    gained, lost, distinguishable = mcnemar(baseline, report, WORST_CASE)
    rows = [(_row(report, name), _row(baseline, name)) for name in (*report.correct, WORST_CASE)]
    return {"rows": rows, "gained": gained, "lost": lost, "distinguishable": distinguishable}
