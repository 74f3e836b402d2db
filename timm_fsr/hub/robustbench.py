"""RobustBench export: what its leaderboard wants to know of a model, and a name by which it loads a checkpoint.

RobustBench (Croce et al. 2021, arXiv 2010.09670) keeps one file for each model in its `model_info` folder, and its
`load_model` takes a registered timm model `<name>_<dataset>_<threat>` before it looks at its own list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import is_model, model_entrypoint
from timm.models._registry import register_model
from torch import nn

from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.pixel import PixelModel, base_model
from timm_fsr.models.saving import load, resolve
from timm_fsr.reports.report import Report, format_eps
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.files import write_text

DATASETS = ("cifar10", "cifar100", "imagenet")
THREATS = ("Linf", "L2", "corruptions")
"""RobustBench's names; it files its 3D corruptions under "corruptions"."""

_RADII = {
    ("cifar10", "linf"): 8 / 255,
    ("cifar10", "l2"): 0.5,
    ("cifar100", "linf"): 8 / 255,
    ("imagenet", "linf"): 4 / 255,
}

__all__ = ["DATASETS", "THREATS", "model_info", "register_alias", "save_model_info"]  # timm's registry adds aliases


def model_info(
    report: Report,
    *,
    link: str,
    name: str,
    authors: str,
    dataset: str,
    venue: str,
    architecture: str,
    additional_data: bool = False,
    reported: float | None = None,
    number_forward_passes: int = 1,
    footnote: str | None = None,
    unreliable: bool | None = None,
) -> dict[str, Any]:
    """What RobustBench's file on a model says, with its keys in its order and its formats.

    The leaderboard is about Linf 8/255 or L2 0.5 on CIFAR and Linf 4/255 on ImageNet. It is also about the whole test
    set (10,000 images, for ImageNet its own 5,000); nothing here checks that the report is.

    Args:
        report: of an evaluation with "autoattack", in the Linf or L2 ball.
        link: address of the paper.
        name: its title.
        authors: separated by ", ".
        dataset: one of `DATASETS`.
        venue: such as "ICLR 2026" or "arXiv, Mar 2026".
        architecture: as RobustBench writes it: "ResNet-18", "WideResNet-34-10".
        additional_data: were other images than the data set's own used, generated ones included?
        reported: robust accuracy that the paper reports, in [0, 1]; None writes "".
        number_forward_passes: of the network for one prediction.
        footnote: shown below the table; left out if None.
        unreliable: is the AutoAttack figure known to be too high? Left out if None.

    Returns:
        Plain JSON values; accuracies are percentages in text, "56.52".

    Raises:
        ValueError: the report holds no standard AutoAttack outcome in the leaderboard's ball, or an argument is out of
            range.
    """
    _check_standard(report)
    _check_known("dataset", dataset, DATASETS)
    radius = _RADII.get((dataset, report.norm), report.eps)
    if abs(report.eps - radius) > 1e-6:
        raise ValueError(
            f"the report is about {report.threat}, but RobustBench ranks {dataset} in {report.norm} by eps "
            f"{format_eps(radius, report.norm)}; evaluate with that"
        )
    if reported is not None and not 0 <= reported <= 1:
        raise ValueError(f"reported={reported} is no share of images; give it in [0, 1], such as 0.5652 for 56.52 %")
    if number_forward_passes < 1:
        raise ValueError(f"number_forward_passes={number_forward_passes} predicts nothing; use 1 or more")
    info: dict[str, Any] = {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": format_eps(report.eps, report.norm),
        "clean_acc": _percent(report.accuracy["clean"]),
        "reported": "" if reported is None else _percent(reported),
        "autoattack_acc": _percent(report.accuracy["autoattack"]),
    }
    optional = {"footnote": footnote, "unreliable": unreliable}
    return info | {key: value for key, value in optional.items() if value is not None}


def save_model_info(info: Mapping[str, Any], path: str | Path) -> Path:
    """Write what `model_info` gave as RobustBench does, whole or not at all.

    Args:
        info: from `model_info`.
        path: in RobustBench's tree `model_info/<dataset>/<threat>/<FirstAuthor><Year><FirstWordOfTheTitle>.json`;
            folders are made if missing, a file there is replaced.

    Returns:
        The path.

    Raises:
        OSError: the disk is full or the folder is not writable; what was there before is untouched.
    """
    path = Path(path)
    write_text(path, json.dumps(dict(info), indent=2) + "\n")
    return path


def register_alias(source: str | Path, *, name: str, dataset: str, threat: str) -> str:
    """Register a checkpoint in timm so that `robustbench.load_model(name, dataset=..., threat_model=...)` finds it.

    The model takes pixels in [0, 1], as RobustBench gives them: the checkpoint's mean and std are applied inside. Of
    `timm.create_model`'s arguments it takes `pretrained`, `checkpoint_path`, `cache_dir` and those of the
    checkpoint's own network; `num_classes` has to be the checkpoint's.

    Args:
        source: what `timm_fsr.models.saving.load` takes: a folder that `save_pretrained` wrote, "local-dir:",
            "hf-hub:", a timm model name. A folder must stay where it is.
        name: of the model in RobustBench, such as "Kim2023Feature_R18".
        dataset: one of `DATASETS`.
        threat: one of `THREATS`.

    Returns:
        The name of the timm model: `<name>_<dataset>_<threat>` in lower case, "-" written "_".

    Raises:
        ValueError: an unknown data set or threat, a name that timm cannot hold or has already, or no such model.
        FileNotFoundError: no such folder, or no model in it.
    """
    _check_known("dataset", dataset, DATASETS)
    _check_known("threat", threat, THREATS)
    alias = f"{name}_{dataset}_{threat}".lower().replace("-", "_")
    if not re.fullmatch(r"[a-z0-9_]+", alias):  # timm would cut it at a dot, and look elsewhere at a colon
        raise ValueError(f"name={name!r} does not make a name of a timm model; use letters, digits, '-' and '_' only")
    found = _lasting(resolve(str(source)))
    if not is_model(alias):
        entrypoint = _entrypoint(alias, found)
        entrypoint.__name__ = entrypoint.__qualname__ = alias
        globals()[alias] = register_model(entrypoint)
    elif getattr(model_entrypoint(alias), "source", None) != found:
        raise ValueError(f"timm has a model {alias!r} already, which is another one than {source}; use another name")
    return alias


class _Alias(PixelModel):
    """A pixel-space model with what timm's scripts read from a model, that also loads weights of the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_classes: Any = getattr(model, "num_classes", None)
        config = pretrained_cfg_of(model)
        self.pretrained_cfg = {**config, "mean": (0.0,) * self.mean.numel(), "std": (1.0,) * self.std.numel()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this model or of the one inside, as a `checkpoint_path` holds it."""
        if all(key.startswith("model.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        return self.model.load_state_dict(state_dict, strict, assign)


def _check_standard(report: Report) -> None:
    if "autoattack" not in report.correct:
        raise ValueError(
            f"the report holds {', '.join(report.correct)} but not 'autoattack', which RobustBench ranks by; evaluate "
            "with attacks=['autoattack']"
        )
    nonstandard = report.conditions.get("autoattack_nonstandard")
    if nonstandard:
        raise ValueError(
            f"the report's AutoAttack is not the standard one ({nonstandard}), so RobustBench cannot rank it; evaluate "
            "with the standard version on one of its data sets"
        )
    if report.norm not in ("linf", "l2"):
        raise ValueError(f"the report is about norm={report.norm!r}, but RobustBench ranks 'linf' and 'l2' only")


def _check_known(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{unknown(what, given, list(known))}; RobustBench has no other")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _lasting(resolved: str) -> str:
    """A folder by its absolute path: the working directory may be another one when the model is built."""
    if resolved.startswith("local-dir:"):
        return f"local-dir:{Path(resolved.removeprefix('local-dir:')).absolute()}"
    return resolved


def _entrypoint(alias: str, source: str) -> Callable[..., nn.Module]:
    """What `timm.create_model(alias)` calls."""

    def build(
        pretrained: bool = False,
        *,
        num_classes: int | None = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        if pretrained_cfg or pretrained_cfg_overlay:
            raise ValueError(
                f"{alias} has the configuration of its checkpoint, {source}, and takes no other; leave out the tag, "
                "pretrained_cfg and pretrained_cfg_overlay, or load the checkpoint by its own name"
            )
        model = load(source, pretrained=pretrained, **kwargs)
        classes = getattr(base_model(model), "num_classes", None)
        if num_classes not in (None, classes):
            raise ValueError(
                f"{alias} was asked for {num_classes} classes, but its checkpoint {source} has {classes}; register it "
                "for the data set that it was trained on"
            )
        return model if PixelModel(model).is_identity else _Alias(model)

    build.source = source  # type: ignore[attr-defined]
    return build
