"""The model card and its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg

from timm_fsr.hub.bundle import Bundle, publishable
from timm_fsr.hub.markdown import environment, is_active, one_line, without_code
from timm_fsr.hub.privacy import texts
from timm_fsr.models.pretrained import CARD, list_pretrained
from timm_fsr.models.weights import RECORD
from timm_fsr.reports.comparison import differences, layer_of, listed, mcnemar, same_keys
from timm_fsr.reports.report import STRONG_ATTACKS, WORST_CASE, Report
from timm_fsr.utils.defaults import EXPORTS

_AGAIN = f"make it again by timm-fsr card (FOLDER/{CARD} is pushed unchanged)"

# What a baseline has to have in common with the model, by condition of their reports, and how a card calls that.
_COMMON = {
    "training_data": "data",
    "training": "epochs, attack",
    "training_seed": "seed",
    "checkpoint_rule": "checkpoint rule",
    "data_fingerprint": "images",
}

_ATTACK_NAMES = {"autoattack": "AutoAttack", "plus": "AutoAttack plus", "rand": "AutoAttack rand"}
_LICENSE = re.compile(r"[a-z0-9]+([.+-]+[a-z0-9]+)*\+*")


@dataclass(frozen=True, eq=False)
class CardOptions:
    """What a card says besides what the model's folder knows.

    Attributes:
        license: of the weights, by the Hub's short name; None takes the one that they were saved with or started from.
        base_model: what the training started from, "user/name"; None takes what was loaded, else the recipe's.
        baseline: the report of the same training without the feature layer, on the same images, to compare with.
    """

    license: str | None = None
    base_model: str | None = None
    baseline: Report | None = None


def render_card(bundle: Bundle, repo_id: str, options: CardOptions | None = None, *, tag: str | None = None) -> str:
    """The card of a model: metadata for the Hub, and Markdown.

    Args:
        bundle: see `read_bundle`.
        repo_id: "user/name", where the model is or will be.
        options: of the card.
        tag: the name by which timm knows the model without the Hub's, if it does.

    Raises:
        ValueError: no licence is known, a name or licence that cannot be one, or a baseline that differs from the
            model in more than the layer.
    """
    check_repo_id(repo_id)
    options = options or CardOptions()
    record = bundle.config.get(RECORD, {})
    license = record.get("license") if options.license is None else options.license
    if license is None:
        raise ValueError(
            "the model's configuration names no licence; give one, such as license='apache-2.0' (on the command line "
            "--license=apache-2.0): weights that were trained from scratch have none from their architecture"
        )
    check_license(license)
    origin = record.get("origin")
    started, found = (origin.get("name"), origin.get("hub_id")) if origin else starting_point(bundle.training)
    if options.base_model is not None:
        check_repo_id(options.base_model)
        started = found = options.base_model
    comparison = None if options.baseline is None else _comparison(bundle, publishable(options.baseline))
    body = _body(bundle, repo_id=repo_id, tag=tag, license=license, started=started, baseline=comparison)
    return f"---\n{metadata(bundle, repo_id, license, found).to_yaml()}\n---\n\n{body}\n"


def check_card(text: str, bundle: Bundle, repo_id: str) -> None:
    """Refuse a card that the Hub would not understand, of another model, or with figures that are not the report's.

    Words may be added to a generated card; its lines that have figures have to stay as they are.

    Raises:
        ValueError: see above.
    """
    try:
        data: Any = ModelCard(text).data
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of the card are not valid ({error}); {_AGAIN}") from error
    if data.get("library_name") != "timm" or not data.get("license"):
        raise ValueError(f"the card's metadata lack library_name: timm or a license; {_AGAIN}")
    check_license(data.license)
    if not re.search(rf"hf-hub:{re.escape(repo_id)}(?![\w.-])", text):
        raise ValueError(f"the card nowhere names hf-hub:{repo_id}, so it belongs to another repository; {_AGAIN}")
    expected, found = results(bundle), data.get("eval_results") or []
    if found != expected:
        differing = [str(result.metric_name) for result in expected if result not in found] or [
            "more results than those"
        ]
        raise ValueError(
            f"the results in the card's metadata are not the report's ({', '.join(differing)}); the card belongs to "
            f"another evaluation: {_AGAIN}"
        )
    digest = str(bundle.config.get(RECORD, {}).get("sha256", ""))[:16]
    if digest not in text:
        raise ValueError(f"the card does not name the SHA-256 of these weights ({digest}...); {_AGAIN}")
    _check_exports(text, bundle)
    lines = _body(bundle, repo_id=repo_id, tag=None, license=data.license, started=None, baseline=None).splitlines()
    missing = [line for line in lines if " %" in line and line not in text.splitlines()]
    if missing:
        raise ValueError(f"the card lacks this line, or has other figures in it: {missing[0]!r}; {_AGAIN}")
    _check_outside_text(text, lines, bundle)


def _check_exports(text: str, bundle: Bundle) -> None:
    """Refuse a card that does not tell of the model's exported files as they are."""
    for format, name in EXPORTS.items():
        if name not in bundle.exports and f"`{name}`" in text:
            raise ValueError(
                f"the card tells how to use {name}, which is not there; write it by timm-fsr export FOLDER --formats "
                f"{format}, or {_AGAIN}"
            )
        if name in bundle.exports and bundle.exports[name].sha256 not in text:
            raise ValueError(
                f"the card does not tell of {name}, or of another file of this name; write the file into the folder by "
                f"timm-fsr export FOLDER --formats {format} if it is not there, and {_AGAIN}"
            )


def _check_outside_text(text: str, generated: Sequence[str], bundle: Bundle) -> None:
    """Refuse a card in which a name or note from outside acts as Markdown, as in cards of other makers.

    Args:
        text: the card.
        generated: the lines that a card made now has, which are safe.
        bundle: all text that comes from outside.
    """
    own = "\n".join(without_code(line) for line in ModelCard(text).text.splitlines() if line not in set(generated))
    outside = (bundle.config, bundle.report.conditions, bundle.report.notes, bundle.report.stages, bundle.recipe)
    for given in texts((*outside, bundle.report.evidence.get("findings"))):
        raw = next((raw for raw in (given.strip(), one_line(given)) if is_active(raw) and _stands_in(raw, own)), None)
        if raw is not None:
            raise ValueError(
                f"the card shows {one_line(raw)[:80]!r}, a name or note from the model's files, so that it acts as "
                f"Markdown; {_AGAIN}"
            )


def _stands_in(raw: str, text: str) -> bool:
    """Whether a text has these very characters in it, not escaped."""
    return re.search(rf"(?<!\\){re.escape(raw)}", text) is not None


def _body(bundle: Bundle, **given: Any) -> str:
    """The text of a card; `given` is what is known of the model from elsewhere than its bundle."""
    templates = environment("timm_fsr.hub")
    templates.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    title = given["repo_id"].partition("/")[2]
    return templates.get_template("card.md").render(**_model_facts(bundle), title=title, **given).strip()


def _model_facts(bundle: Bundle) -> dict[str, Any]:
    """What the template shows of the model itself."""
    report, config, (tested, split) = bundle.report, bundle.config, tested_data(bundle)
    pretrained_cfg = config["pretrained_cfg"]
    channels, height, width = pretrained_cfg["input_size"]
    plain = not any(pretrained_cfg["mean"]) and all(value == 1 for value in pretrained_cfg["std"])
    return {
        "report": report,
        "config": config,
        "recipe": bundle.training,
        "notes": _notes(bundle),
        "data": training_data(bundle),
        "extra": extra_data(bundle),
        "tested": report.conditions.get("data") or tested.title,
        "split": split,
        "layer": bundle.layer,
        "for_transformers": bundle.for_transformers,
        "record": config.get(RECORD, {}),
        "pt2": bundle.exports.get(EXPORTS["pt2"]),
        "onnx": bundle.exports.get(EXPORTS["onnx"]),
        "shape": f"(N, {channels}, {height}, {width})",
        "statistics": None if plain else (pretrained_cfg["mean"], pretrained_cfg["std"]),
        "classes": config.get("label_names") or pretrained_cfg.get("label_names"),
        "rows": [_row(report, name) for name in (*report.correct, WORST_CASE)],
        "adaptive": _stages(report, "adaptive"),
        "strong": [name for name in STRONG_ATTACKS if name in report.correct],
        "findings": report.evidence.get("findings", []),
        "beyond": next(((eps, share) for eps, share in _radii(report) if eps > report.eps), None),
        "corruption": _mean_corruption(report),
    }


def _notes(bundle: Bundle) -> dict[str, str]:
    """What is said of a training by other code: keys and values of its author, as they can stand in a table."""
    if bundle.training:
        return {}
    return {str(key): str(value) for key, value in bundle.recipe.items()}


def _row(report: Report, name: str) -> dict[str, Any]:
    low, high = report.interval(name)
    return {"name": name.replace("_", " "), "accuracy": report.accuracy_of(name), "low": low, "high": high}


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


def _comparison(bundle: Bundle, baseline: Report) -> dict[str, Any]:
    """The baseline's figures beside the model's, and whether chance explains the difference in the worst case."""
    report = bundle.report
    for whose, one in (("baseline", baseline), ("model", report)):
        if one.collapsed:
            raise ValueError(
                f"the {whose}'s report says that {one.collapsed}; a comparison would mean nothing: leave it out"
            )
    same, whole = _common(report, baseline), _check_recipes(bundle.training, baseline.conditions.get("recipe"))
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


_FASHION_MNIST = DataFacts("Fashion-MNIST", "zalando-datasets/fashion_mnist", "MIT licence")

DATA = {
    "fashion_mnist": DataFacts(
        "Fashion-MNIST, the balanced subset inside timm_fsr", "zalando-datasets/fashion_mnist", "MIT licence"
    ),
    "zalando-datasets/fashion_mnist": _FASHION_MNIST,
    "fashion-mnist": _FASHION_MNIST,  # the folder of Debian's package dataset-fashion-mnist, with the authors' files
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


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository, without asking the Hub.

    Raises:
        ValueError: see above.
    """
    try:
        validate_repo_id(repo_id)
        owner, slash, name = repo_id.partition("/")
    except HFValidationError as error:
        reason = str(error).split(":")[0].splitlines()[0]
        raise ValueError(f"{repo_id!r} is no name of a repository ({reason}); write user/name") from error
    if repo_id != one_line(repo_id):  # which the client lets pass at the end
        raise ValueError(f"{repo_id!r} is no name of a repository (it has a line break in it); write user/name")
    if not (owner and slash and name):
        raise ValueError(f"{repo_id!r} is no name of a repository (it names no user or organisation); write user/name")


def _is_repo_id(name: str | None) -> bool:
    try:
        check_repo_id(name or "")
    except ValueError:
        return False
    return True


def check_license(license: str) -> None:
    """Refuse what cannot be a licence's short name; which of those the Hub knows, it says itself when it is asked.

    Raises:
        ValueError: see above.
    """
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ValueError(
            f"{license!r} is no short name of a licence; write one of https://huggingface.co/docs/hub/repositories-licenses,"
            " such as apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def training_data(bundle: Bundle) -> DataFacts:
    """Of what training has loaded, else of what the recipe says."""
    loaded = re.match(r"(.*?)\[[^\]]*\]", str(bundle.report.conditions.get("training_data") or ""))
    return _facts(loaded[1] if loaded else bundle.training.get("data", {}).get("source"))


def extra_data(bundle: Bundle) -> DataFacts | None:
    """Of the further images that the recipe mixes into each batch, if any."""
    source = bundle.training.get("data", {}).get("extra_source")
    return None if source is None else _facts(source)


def tested_data(bundle: Bundle) -> tuple[DataFacts, str | None]:
    """Of what the report was made on, and which split of it; None if it does not say."""
    named = re.match(r"(.*?)\[([^\]]*)\]", str(bundle.report.conditions.get("data") or ""))
    return (_facts(named[1]), named[2]) if named else (_facts(bundle.report.conditions.get("data")), None)


def starting_point(recipe: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What the training started from, as the recipe says: its name, and its repository if it is on the Hub."""
    model = recipe.get("model", {})
    name = str(model.get("name", "")).replace("hf_hub:", "hf-hub:", 1)
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:").partition("@")[0]
        return repository, repository
    ours = [entry for entry in list_pretrained() if entry.name == name]
    if ours:  # with weights at hand nothing says that they are on the Hub too
        return name, None if ours[0].weights else ours[0].hub_id
    config = get_pretrained_cfg(name, allow_unregistered=True) if model.get("pretrained") else None
    return (config.hf_hub_id,) * 2 if config else (None, None)


def metadata(bundle: Bundle, repo_id: str, license: str, base_model: str | None) -> ModelCardData:
    """The head of a card."""
    sources = [training_data(bundle), extra_data(bundle)]
    datasets = list(dict.fromkeys(source.hub for source in sources if source and source.hub))
    return ModelCardData(
        model_name=repo_id.partition("/")[2],
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        datasets=datasets or None,
        base_model=base_model if _is_repo_id(base_model) else None,
        tags=[
            "timm",
            "timm_fsr",
            "image-classification",
            "adversarial-robustness",
            *([one_line(bundle.layer)] if bundle.layer else []),
            *(["arxiv:2303.13846"] if bundle.layer == "fsr" else []),
        ],
        eval_results=results(bundle),
    )


def results(bundle: Bundle) -> list[EvalResult]:
    """Accuracies in percent: clean, under AutoAttack where it ran, and the worst case."""
    report, (data, split) = bundle.report, tested_data(bundle)
    names = ["clean", *(name for name in _ATTACK_NAMES if name in report.correct), WORST_CASE]
    found = []
    for name in names:
        attack = _ATTACK_NAMES.get(name, "worst case of all attacks")
        details: dict[str, Any] = {"n_examples": report.count, "seed": report.seed}
        if name != "clean":
            details |= {"norm": report.norm, "eps": float(report.eps)}
            details["attack"] = one_line(", ".join(report.stages.get(name) or report.attacks))
        found.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=data.hub or "unpublished",
                dataset_name=one_line(data.title),
                dataset_split=one_line(split) if split else None,
                metric_type="accuracy",
                metric_name="Accuracy" if name == "clean" else f"Robust accuracy ({attack}, {report.threat})",
                metric_value=round(100 * report.accuracy_of(name), 2),
                metric_args=details,
            )
        )
    return found


def _facts(source: Any) -> DataFacts:
    return DATA.get(str(source)) or DataFacts(str(source or "unnamed images"), "", "see the data set's own page")
