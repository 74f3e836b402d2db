"""What a card says to the Hub: names, licence, data and results in the form that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_pretrained_cfg

from timm_fsr.models import list_pretrained
from timm_fsr.parts import Parts
from timm_fsr.report import WORST_CASE

_ATTACK_NAMES = {"autoattack": "AutoAttack", "plus": "AutoAttack plus", "rand": "AutoAttack rand"}
_LICENSE = re.compile(r"[a-z0-9]+([.+-]+[a-z0-9]+)*\+*")


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
    if not (owner and slash and name):
        raise ValueError(f"{repo_id!r} is no name of a repository (it names no user or organisation); write user/name")


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


def training_data(parts: Parts) -> DataFacts:
    """Of what the recipe trains on."""
    return _facts(parts.recipe.get("data", {}).get("source"))


def tested_data(parts: Parts) -> tuple[DataFacts, str | None]:
    """Of what the report was made on, and which split of it; None if it does not say."""
    named = re.match(r"(.*?)\[([^\]]*)\]", str(parts.report.conditions.get("data") or ""))
    return (_facts(named[1]), named[2]) if named else (_facts(parts.report.conditions.get("data")), None)


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


def metadata(parts: Parts, repo_id: str, license: str, base_model: str | None) -> ModelCardData:
    """The head of a card."""
    data = training_data(parts)
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
        eval_results=results(parts),
    )


def results(parts: Parts) -> list[EvalResult]:
    """Accuracies in percent: clean, under AutoAttack where it ran, and the worst case."""
    report, (data, split) = parts.report, tested_data(parts)
    names = ["clean", *(name for name in _ATTACK_NAMES if name in report.correct), WORST_CASE]
    found = []
    for name in names:
        value = report.worst_case if name == WORST_CASE else report.accuracy[name]
        attack = _ATTACK_NAMES.get(name, "worst case of all attacks")
        details: dict[str, Any] = {"n_examples": report.count, "seed": report.seed}
        if name != "clean":
            details |= {"norm": report.norm, "eps": float(report.eps)}
            details["attack"] = ", ".join(report.stages.get(name) or report.attacks)
        found.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=data.hub or "unpublished",
                dataset_name=data.title,
                dataset_split=split,
                metric_type="accuracy",
                metric_name="Accuracy" if name == "clean" else f"Robust accuracy ({attack}, {report.threat})",
                metric_value=round(100 * value, 2),
                metric_args=details,
            )
        )
    return found


def _facts(source: Any) -> DataFacts:
    return DATA.get(str(source)) or DataFacts(str(source or "unnamed images"), "", "see the data set's own page")
