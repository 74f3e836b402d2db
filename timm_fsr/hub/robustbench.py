"""RobustBench export: what its leaderboard wants to know of a model, and a name by which it loads a checkpoint.

RobustBench (Croce et al. 2021, arXiv 2010.09670) keeps one file for each model in its `model_info` folder, and its
`load_model` takes a registered timm model `<name>_<dataset>_<threat>` before it looks at its own list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import is_model, model_entrypoint
from timm.models._registry import register_model
from torch import nn

from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.pixel import PixelModel, base_model
from timm_fsr.models.pretrained import REPORT, list_pretrained
from timm_fsr.models.saving import FOLDER, load, resolve
from timm_fsr.models.weights import read_config
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


@dataclass(frozen=True)
class _Ranked:
    """What RobustBench judges on.

    Attributes:
        title: of the data set.
        count: of the images.
        classes: their number.
        size: (channels, height, width) of the images; ImageNet's models choose height and width.
        splits: by what names the images are known.
        called: a pattern of names of the data set, without signs and capitals; a part of a path has to begin with it.
        hub: its id on the Hub.
        names: of its classes, where they are few.
    """

    title: str
    count: int
    classes: int
    size: tuple[int, int | None, int | None]
    splits: tuple[str, ...]
    called: str
    hub: str
    names: tuple[str, ...] = ()


_AIRPLANE_TO_TRUCK = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RANKED = {
    # Neither CIFAR-100 and CIFAR-10.1 nor the corrupted CIFAR-10-C and the relabelled CIFAR-10-H.
    "cifar10": _Ranked(
        "CIFAR-10", 10_000, 10, (3, 32, 32), ("test",), r"cifar10(?!\d|[ch]$)", "uoft-cs/cifar10", _AIRPLANE_TO_TRUCK
    ),
    "cifar100": _Ranked("CIFAR-100", 10_000, 100, (3, 32, 32), ("test",), r"cifar100(?!\d|[ch]$)", "uoft-cs/cifar100"),
    "imagenet": _Ranked(
        "ImageNet",
        5_000,
        1_000,
        (3, None, None),
        ("validation", "val", "test"),
        r"(imagenet|imagenet1k|ilsvrc|ilsvrc2012)(val|validation|test|folder)?$",
        "ILSVRC/imagenet-1k",
    ),
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

    The leaderboard is about Linf 8/255 or L2 0.5 on CIFAR-10, Linf 8/255 on CIFAR-100 and Linf 4/255 on ImageNet, on
    the whole test set (10,000 images, for ImageNet 5,000 of its validation images). The report has to be about that: by
    the name of its data and its classes, the split, the number and the size of its images, norm and eps. That the
    5,000 images of ImageNet are RobustBench's own choice is not checked.

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
        ValueError: the report holds no standard AutoAttack outcome in the leaderboard's ball, is about other images, or
            an argument is out of range.
    """
    _check_standard(report)
    _check_known("dataset", dataset, DATASETS)
    _check_images(report, dataset)
    radius = _RADII.get((dataset, report.norm))
    if radius is None:
        raise ValueError(
            f"the report is about {report.threat}, but RobustBench has no {report.norm} ranking of {dataset}"
        )
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
        ValueError: an unknown data set or threat, a name that timm cannot hold or has already, no such model, or one
            that is known to be for other images, classes or perturbations.
        FileNotFoundError: no such folder, or no model in it.
    """
    _check_known("dataset", dataset, DATASETS)
    _check_known("threat", threat, THREATS)
    alias = f"{name}_{dataset}_{threat}".lower().replace("-", "_")
    if not re.fullmatch(r"[a-z0-9_]+", alias):  # timm would cut it at a dot, and look elsewhere at a colon
        raise ValueError(f"name={name!r} does not make a name of a timm model; use letters, digits, '-' and '_' only")
    found = _lasting(resolve(str(source)))
    _check_alias(*_known_of(found), dataset, threat)
    if not is_model(alias):
        entrypoint = _entrypoint(alias, found, dataset, threat)
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
    if report.collapsed:
        raise ValueError(f"{report.collapsed}; a ranking of it would mean nothing: train it again")
    nonstandard = report.conditions.get("autoattack_nonstandard")
    if nonstandard:
        raise ValueError(
            f"the report's AutoAttack is not the standard one ({nonstandard}), so RobustBench cannot rank it; evaluate "
            "with the standard version on one of its data sets"
        )
    if report.norm not in ("linf", "l2"):
        raise ValueError(f"the report is about norm={report.norm!r}, but RobustBench ranks 'linf' and 'l2' only")


def _check_images(report: Report, dataset: str) -> None:
    """Refuse a report on other images than those that RobustBench judges on.

    Raises:
        ValueError: see above; the message says what was found.
    """
    ranked, name = _RANKED[dataset], str(report.conditions.get("data") or "")
    wanted = f"RobustBench ranks {dataset} by {ranked.count:,} images of {ranked.title}"
    remedy = f"evaluate on all of them, such as with --data {ranked.hub} --split {ranked.splits[0]}"
    if reason := _other_data(report, dataset):
        raise ValueError(f"{reason}, but {wanted}; {remedy}")
    named = re.fullmatch(r"(.+)\[([^\[\]]+)\](?: limited to \d+)?", name)
    if named is None or not (_is_called(named[1], ranked) or _has_names(report.conditions.get("classes"), ranked)):
        raise ValueError(
            f"the report calls its images {name or 'nothing'!r}, which does not say that they are {ranked.title}, but "
            f"{wanted}; {remedy}, or name their folder {dataset}"
        )
    if named[2] not in ranked.splits:
        raise ValueError(
            f"the report is about the split {named[2]!r}, but {wanted}, its {ranked.splits[0]} split; {remedy}"
        )
    if report.count != ranked.count:
        raise ValueError(f"the report is about {report.count:,} images, but {wanted}; {remedy}")
    found = report.conditions.get("image_size")
    if found is None:
        raise ValueError(
            "the report does not say how large its images are, as an older timm_fsr wrote it; evaluate again: what is "
            "known in its folder is not repeated"
        )
    _check_size(found, ranked, f"the report is about images of {_by(found)}")


def _check_size(found: Sequence[int], ranked: _Ranked, what: str) -> None:
    """Refuse images that have another number of channels, or another size where that is fixed."""
    if len(found) != 3 or any(want not in (None, have) for want, have in zip(ranked.size, found, strict=True)):
        size = "3 channels" if None in ranked.size else _by(ranked.size)
        raise ValueError(
            f"{what}, but RobustBench's of {ranked.title} have {size}; evaluate on those, or take another dataset"
        )


def _other_data(report: Report, dataset: str) -> str:
    """What shows that a report is about another data set; "" if nothing does."""
    ranked, name = _RANKED[dataset], str(report.conditions.get("data") or "")
    source, classes = name.partition("[")[0], list(report.conditions.get("classes") or ())
    for other, facts in _RANKED.items():
        if other != dataset and _is_called(source, facts):
            return f"the report is about {name}, which is {facts.title}"
    return _other_classes(classes, ranked, f"the report on {name or 'unnamed images'}")


def _other_classes(classes: Sequence[object], ranked: _Ranked, what: str) -> str:
    """What shows that classes are not the data set's; "" if nothing does, as where they are numbers."""
    if classes and len(classes) != ranked.classes:
        return f"{what} has {len(classes)} classes, not {ranked.classes}"
    spoken = [str(name) for name in classes if not str(name).isdigit()]
    if spoken and ranked.names and not _has_names(classes, ranked):
        return f"{what} has the classes {', '.join(spoken[:3])}, ..."
    return ""


def _is_called(source: str, ranked: _Ranked) -> bool:
    """Whether a part of a path or a Hub id is a name of the data set."""
    parts = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in re.split(r"[/\\]", source)]
    return any(re.match(ranked.called, part) for part in parts)


def _has_names(classes: Sequence[object] | None, ranked: _Ranked) -> bool:
    """Whether these are the data set's own class names; "plane" and "car" are known short forms."""
    short = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile"}
    found = {short.get(str(name).lower(), str(name).lower()) for name in classes or ()}
    return bool(ranked.names) and found == set(ranked.names)


def _by(size: Sequence[int | None]) -> str:
    return " x ".join(map(str, size))


def _check_alias(config: Mapping[str, Any], report: Report | None, dataset: str, threat: str) -> None:
    """Refuse a checkpoint that is known to be for other images, classes or perturbations than the alias says.

    Args:
        config: what is known of the model, with the keys of timm's `pretrained_cfg`.
        report: that it brings, if any.
        dataset: of the alias.
        threat: of the alias.

    Raises:
        ValueError: see above; the message says what was found.
    """
    ranked = _RANKED[dataset]
    remedy = "register it for the data set and threat that it was trained for"
    classes = config.get("num_classes")
    if classes is not None and classes != ranked.classes:
        raise ValueError(f"the checkpoint has {classes} classes, {ranked.title} has {ranked.classes}; {remedy}")
    if size := config.get("input_size"):
        _check_size(size, ranked, f"the checkpoint takes images of {_by(size)}")
    reason = _other_classes(config.get("label_names") or (), ranked, "the checkpoint")
    if report is not None:
        reason = reason or _other_data(report, dataset)
        if not reason and threat != "corruptions" and report.norm != threat.lower():
            reason = f"the checkpoint's own report is about {report.threat}, not {threat}"
    if reason:
        raise ValueError(f"{reason}, so it is no {threat} model of {ranked.title}; {remedy}")


def _known_of(resolved: str) -> tuple[dict[str, Any], Report | None]:
    """What is known of a checkpoint without its weights and without a network: timm's keys, and its report."""
    tag = next((entry for entry in list_pretrained() if entry.name == resolved), None)
    if tag is None and not resolved.startswith(FOLDER):
        return {}, None
    folder = Path(resolved.removeprefix(FOLDER)) if tag is None else tag.folder
    config = read_config(folder)
    known = {
        **config["pretrained_cfg"],
        **{key: config[key] for key in ("num_classes", "label_names") if key in config},
    }
    return known, Report.load(folder) if (folder / REPORT).is_file() else None


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


def _entrypoint(alias: str, source: str, dataset: str, threat: str) -> Callable[..., nn.Module]:
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
        config = {**pretrained_cfg_of(base_model(model)), "num_classes": classes}
        _check_alias(config, None, dataset, threat)  # of a repository, nothing was known before
        return model if PixelModel(model).is_identity else _Alias(model)

    build.source = source  # type: ignore[attr-defined]
    return build
