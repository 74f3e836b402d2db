"""The files of a published model: read, checked, and free of paths of this machine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from timm_fsr.hub.privacy import is_place, telling_part, texts, without_traces
from timm_fsr.models.export import exported_facts
from timm_fsr.models.pretrained import RECIPE, REPORT
from timm_fsr.models.remote_code import check_remote_code
from timm_fsr.models.weights import CONFIG, WEIGHTS, read_config
from timm_fsr.reports.comparison import RECIPE_KEYS
from timm_fsr.reports.report import Report
from timm_fsr.utils.defaults import EXPORTS
from timm_fsr.utils.documents import read_yaml
from timm_fsr.utils.registry import is_file_name

_TRANSFER = "transfer from "  # how the stages of attacks begin that name another model


class ExportedFile(NamedTuple):
    """A file that `timm_fsr.export` wrote.

    Attributes:
        sha256: of the file.
        torch: the version that wrote it.
        shape: of the images that it takes, as in "(N, 3, 32, 32)".
    """

    sha256: str
    torch: str
    shape: str

    @classmethod
    def of(cls, name: str, content: bytes) -> ExportedFile:
        """The file `name`, "model.pt2" or "model.onnx", of this content.

        Raises:
            ValueError, ModuleNotFoundError: see `exported_facts`.
        """
        facts = exported_facts(name, content)
        version, size = str(facts["torch"]).partition("+")[0], ", ".join(map(str, facts["input_size"]))
        return cls(hashlib.sha256(content).hexdigest(), version, f"(N, {size})")


@dataclass(frozen=True, eq=False)
class Bundle:
    """What is known of a saved model.

    Attributes:
        config: content of `config.json`.
        report: of its evaluation.
        recipe: of its training, as plain values; {} if nothing is known of it.
        for_transformers: whether transformers can load it, which takes a file of ours in the folder.
        exports: the files that run without timm, by name.
    """

    config: Mapping[str, Any]
    report: Report
    recipe: Mapping[str, Any]
    for_transformers: bool = False
    exports: Mapping[str, ExportedFile] = field(default_factory=dict)

    @property
    def layer(self) -> str | None:
        """The feature layer it has, by name."""
        groups = [key.removesuffix("_noise") for key in self.config.get("model_args", {}) if key.endswith("_noise")]
        recipe_layer = self.training.get("model", {}).get("layer")
        return groups[0] if groups else recipe_layer

    @property
    def training(self) -> Mapping[str, Any]:
        """The recipe if it is one of `timm-fsr train`, which repeats the training; else {}."""
        return self.recipe if is_recipe(self.recipe) else {}


def is_recipe(values: Mapping[str, Any]) -> bool:
    """Whether keys and values are a recipe of `timm-fsr train`, not notes on a training by other code."""
    return bool(values) and values.keys() <= RECIPE_KEYS


def read_bundle(folder: str | Path) -> Bundle:
    """The configuration, report and recipe of a saved model, without paths of the machine that it was trained on.

    It may have no recipe: then nothing is known of its training.

    Raises:
        FileNotFoundError: one of them is missing; the message names all that are.
        ValueError: one of them is damaged, the folder names code for transformers that is not ours, or a file of
            another program has the name of an exported one.
        ModuleNotFoundError: there is a `model.onnx`, and no package to read it.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, REPORT) if not (folder / name).is_file()]
    if CONFIG in missing and (folder / "best" / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; give {folder / 'best'}, the model that training chose")
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; a published model has its weights and the report of its evaluation: "
            "save_pretrained(model, folder, report=..., recipe=...) writes them all"
        )
    config = read_config(folder)
    recipe = _read_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    _check_config(config, folder / CONFIG)
    for_transformers = check_remote_code(config, folder)
    if is_recipe(recipe):
        _check_recipe(recipe, folder / RECIPE)
    report = Report.load(folder / REPORT)
    report, recipe = publishable(report, recipe), without_traces(recipe, _paths(recipe, report))
    conditions = {key: value for key, value in report.conditions.items() if key != "recipe"}  # which has its own file
    report = dataclasses.replace(report, conditions=conditions)
    there = {name: (folder / name).read_bytes() for name in EXPORTS.values() if (folder / name).is_file()}
    exports = {name: ExportedFile.of(name, content) for name, content in there.items()}
    recipe = {key: value for key, value in recipe.items() if key != "output"}
    return Bundle(config, report, recipe, for_transformers, exports)


def publishable(report: Report, recipe: Mapping[str, Any] | None = None) -> Report:
    """A report without paths of the machine and without secrets; the recipe may name paths that stand in it."""
    return Report.from_dict(without_traces(report.to_dict(), _paths(recipe or {}, report)))


def _paths(recipe: Mapping[str, Any], report: Report) -> dict[str, str]:
    """The paths that a recipe and a report name, and what may be shown of each."""
    recipe = recipe if is_recipe(recipe) else {}
    data, conditions = recipe.get("data", {}), report.conditions
    sources = [data.get("source"), data.get("extra_source")]
    sources += [str(conditions.get(key, "")).partition("[")[0] for key in ("data", "training_data")]
    stages = (name for parts in report.stages.values() for name in parts)
    models = [name.removeprefix(_TRANSFER) for name in stages if name.startswith(_TRANSFER)]
    models += [str(conditions.get("model", "")), str(recipe.get("model", {}).get("name", ""))]
    models = [name.removeprefix("local-dir:") for name in models]
    named = [path for path in sources if path and is_place(path)]  # else a Hub id
    named += [path for path in models if "/" in path and ":" not in path]  # those of the Hub begin with hf-hub:
    named += [text for text in texts(recipe) if is_place(text)]
    files = [source for source in recipe.get("imports") or () if isinstance(source, str) and is_file_name(source)]
    return {**{path: telling_part(path) for path in named}, **{path: Path(path).name for path in files}}


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is damaged: it holds no keys and values; save the model again")
    return found


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    given = config.get("pretrained_cfg")
    pretrained_cfg = given if isinstance(given, dict) else {}
    lacks = [f"pretrained_cfg.{key}" for key in ("input_size", "mean", "std") if not pretrained_cfg.get(key)]
    if not isinstance(config.get("model_args", {}), dict):
        lacks.append("model_args as keys and values")
    if lacks:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacks)}; save the model again")


def _check_recipe(recipe: Mapping[str, Any], path: Path) -> None:
    remedy = "give the recipe that `timm-fsr train` wrote beside the model, or a text about a training by other code"
    for section in ("model", "data", "objective"):
        if not isinstance(recipe.get(section, {}), dict):
            raise ValueError(f"{path}: {section} is {recipe[section]!r}, not keys and values; {remedy}")
    for section, key in (("data", "source"), ("data", "extra_source"), ("model", "name"), ("objective", "name")):
        value = recipe.get(section, {}).get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: {section}.{key} is {value!r}, not a name; {remedy}")
