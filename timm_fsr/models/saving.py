"""Saving and loading models in timm's format, in float32 or half precision, with the record of their origin."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.layers.create_norm import _NORM_MAP
from timm.models import get_arch_pretrained_cfgs
from timm.models._hub import download_from_hf, hf_split, save_config_for_hf
from torch import Tensor, nn

from timm_fsr.hooks.attach import check_sites, rebuilding_args, watch_classifier
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.hooks.site import layer_groups
from timm_fsr.layers import LAYERS, list_layers
from timm_fsr.models.description import class_names, forget_other_classes
from timm_fsr.models.pixel import base_model
from timm_fsr.models.pretrained import CARD, RECIPE, REPORT, list_pretrained
from timm_fsr.models.remote_code import ENTRIES, MODELLING, modelling_code
from timm_fsr.models.weight_files import load_weight_file
from timm_fsr.models.weights import (
    CONFIG,
    RECORD,
    WEIGHTS,
    check_finite_weights,
    damaged,
    make_record,
    read_config,
    told_by_version,
    verify_folder,
    verify_hub,
)
from timm_fsr.reports.report import Report
from timm_fsr.utils.defaults import EXPORTS
from timm_fsr.utils.documents import read_yaml
from timm_fsr.utils.errors import is_out_of_memory, unknown
from timm_fsr.utils.files import staged
from timm_fsr.utils.hub_errors import explained
from timm_fsr.version import __version__

HUB, FOLDER = "hf-hub:", "local-dir:"
_REPOSITORY = r"[\w.-]+/[\w.-]+(@[^/\s]+)?"

# Options of `timm.create_model` that say where weights come from; a saved model brings its own.
_NOT_SAVED = ("pretrained_backbone", "checkpoint_path", "cache_dir")

_ORIGIN = "_timm_fsr_origin"
"""Attribute of a loaded model: "name", "hub_id" and "license" of the weights that it was loaded from, if known."""

HALVES = (torch.float16, torch.bfloat16)


DESCRIPTION = "description"
"""The key of `recipe.yaml` that holds a training described in words."""


class WrittenRecipe(Protocol):
    """What a `timm_fsr.Recipe` is to those who only store it."""

    def to_yaml(self) -> str:
        """The whole recipe as YAML."""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    report: Report | None = None,
    recipe: WrittenRecipe | Mapping[str, Any] | str | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save a model as `config.json` and `model.safetensors`, with every feature-layer argument written out.

    Beside them stands `modeling_timm_fsr.py`, by which transformers loads the same folder.

    Args:
        model: a timm model made by `timm.create_model`, with feature layers or without, or a PixelModel of one.
        folder: made if missing; files of these names in it are replaced, each atomically, when all are written.
        report: written beside them as `report.json`; without one, an older one there is removed. So is an older model
            card: it is about other weights.
        recipe: how it was trained, written as `recipe.yaml`: a `timm_fsr.Recipe`, the same as plain values, or, for a
            training by other code, keys and values of your own or a text. None takes the one that the report of a
            training run has; without any, the training is not documented.
        license: of the weights, by the Hub's short name, such as "apache-2.0"; None takes that of the weights that the
            model was loaded from, if any. The licence in an architecture's configuration is not that of these weights.
        dtype: torch.float16 or torch.bfloat16 stores matrices and kernels in it, after `timm_fsr.round_weights`; they
            are float32 again when loaded.

    Returns:
        The folder.

    Raises:
        ValueError: `timm.create_model` could not rebuild the model from its configuration, as with adapters of PEFT,
            `dtype` would change it, or the recipe is none.
        UnsoundError: a conversion has replaced the module that a feature layer sits on.
        OSError: the disk is full or the folder is not writable; what was there before is untouched.
    """
    written = _written_recipe(recipe, report)
    model = base_model(model)
    _check_rebuildable(model)
    check_sites(model)
    arguments = {k: v for k, v in rebuilding_args(model).items() if k not in _NOT_SAVED}
    original = model._model_args if hasattr(model, "_model_args") else None
    folder = Path(folder)
    try:
        model._model_args = arguments  # type: ignore[assignment]
        with staged(folder) as scratch:
            tensors = _plain_tensors(model)
            save_file(tensors if dtype is None else halved(tensors, dtype), scratch / WEIGHTS)
            stored = None if dtype is None else str(dtype).removeprefix("torch.")
            record = {**make_record(scratch / WEIGHTS, stored, _imports(model)), **_provenance(model, license)}
            config: dict[str, Any] = {RECORD: record, **ENTRIES}
            if class_names(model) is not None:  # timm drops the names where the source of the weights had other classes
                config["pretrained_cfg"] = {"num_classes": model.num_classes}
            save_config_for_hf(model, str(scratch / CONFIG), model_config=config)
            _settle_license(scratch / CONFIG)
            shutil.copymode(scratch / CONFIG, scratch / WEIGHTS)  # safetensors lets nobody else read what it writes
            (scratch / MODELLING).write_bytes(modelling_code())
            if report is not None:
                (scratch / REPORT).write_text(report.to_json())
            if written:
                (scratch / RECIPE).write_text(written, encoding="utf-8")
        remove_stale(folder, kept=[name for name, content in ((REPORT, report), (RECIPE, written)) if content])
    finally:
        if original is not None:
            model._model_args = original
    return folder


def _provenance(model: nn.Module, license: str | None) -> dict[str, Any]:
    """Under what licence the weights are and what they were trained from, as far as that is known."""
    origin = dict(getattr(model, _ORIGIN, {}))
    inherited = origin.pop("license", None)
    license = license or inherited
    return {**({"license": license} if license else {}), **({"origin": origin} if origin else {})}


def _settle_license(path: Path) -> None:
    """Let a written `config.json` name the licence of its weights or none: timm takes the architecture's over."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["pretrained_cfg"].pop("license", None)
    if license := config[RECORD].get("license"):
        config["pretrained_cfg"]["license"] = license
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _written_recipe(recipe: object, report: Report | None) -> str:
    """The content of `recipe.yaml`; "" if nothing is known of the training.

    Raises:
        ValueError: it is no recipe, or holds what YAML has no word for.
    """
    values = recipe_values(recipe) or recipe_values(report.conditions.get("recipe") if report else None)
    try:
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""
    except yaml.YAMLError as error:
        raise ValueError(
            f"the recipe holds a value that is not plain ({_one_line(error)}); give numbers, texts, lists and "
            "dictionaries of these"
        ) from error


def recipe_values(recipe: object) -> dict[str, Any]:
    """A recipe in any of the forms that `save_pretrained` takes, as plain keys and values; {} for None.

    Raises:
        ValueError: it is in none of them.
    """
    if recipe is None:
        return {}
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if isinstance(recipe, str):
        if "\n" not in recipe and recipe.endswith((".yaml", ".yml")):
            raise ValueError(
                f"recipe={recipe!r} is the name of a file; give what it holds, by timm_fsr.Recipe.load({recipe!r})"
            )
        return {DESCRIPTION: recipe.strip()} if recipe.strip() else {}
    if hasattr(recipe, "to_yaml"):
        values = dict(yaml.safe_load(recipe.to_yaml()))
        return {key: value for key, value in values.items() if key not in ("output", "overwrite", "resume")}
    raise ValueError(f"recipe is {type(recipe).__name__}; give a timm_fsr.Recipe, keys and values, a text, or None")


def from_pretrained(
    name: str | Path,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A trained model, by whatever name it has; its weights are checked against the checksum saved with them.

    Args:
        name: a pretrained tag ("resnet_tiny_cifar_fsr.at_fashion_mnist"; `timm-fsr models` lists them), a repository
            of the Hub ("user/name", "user/name@revision", "hf-hub:user/name"), a folder that `save_pretrained`
            wrote, or a timm model with weights of its own ("resnet50.a1_in1k").
        num_classes: another number of classes than the checkpoint's: its heads start afresh, for fine-tuning.
        in_chans: another number of image channels: the first layer's weights are adapted as timm does.
        cache_dir: where downloads are kept.
        **kwargs: further arguments of `timm.create_model`, such as `drop_rate=0.1`.

    Returns:
        The model in training mode, as `timm.create_model` returns it.

    Raises:
        ValueError: an unknown architecture or layer, a newer format, damaged or exchanged weights, bad arguments.
        FileNotFoundError: no such folder or repository, or it is neither in the cache nor to be had.
        PermissionError: the Hub wants a token, or another one.
        ConnectionError: the Hub cannot be reached, or is busy.
    """
    name = str(name)
    given = {"num_classes": num_classes, "in_chans": in_chans, "cache_dir": cache_dir}
    arguments = {**{key: value for key, value in given.items() if value is not None}, **kwargs}
    if "/" in name and ":" not in name and not Path(name).is_dir() and re.fullmatch(_REPOSITORY, name):
        try:
            return load(f"{HUB}{name}", pretrained=True, **arguments)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no folder {name} here, and as a repository: {error}") from error
    return load(name, pretrained=True, **arguments)


def load(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with errors that name the remedy.

    Args:
        name: a timm model name, a path of a folder written by `save_pretrained`, or either of timm's
            "local-dir:" and "hf-hub:" names. Paths, sourced names and this package's tags load their weights.
        **kwargs: passed to `timm.create_model`.

    Raises:
        ValueError: no such model, arguments that it does not take, or a damaged checkpoint.
        OSError: no such folder or repository, or the Hub cannot be reached; see `from_pretrained`.
    """
    name = resolve(name)
    if name.startswith(HUB):
        repository = name.removeprefix(HUB)
        with explained(repository):
            commit, config = _checked(repository, kwargs.get("cache_dir"))
            source, arguments = {"source": "hf-hub", "hf_hub_id": commit}, {"pretrained": True, **kwargs}
            model = _create(f"{HUB}{commit}", source, arguments)
        base = repository.partition("@")[0]
        return _with_origin(model, arguments, {"name": base, "hub_id": base, "license": _license_of(config)})
    source, arguments = {}, {"pretrained": True, **kwargs} if is_trained(name) else kwargs
    if name.startswith(FOLDER):
        source = {"source": "local-dir", "file": name.removeprefix(FOLDER)}
        verify_folder(Path(source["file"]))
    with explained(name):
        model = _create(name, source, arguments)
    return _with_origin(model, arguments, _origin(name, model))


def _origin(name: str, model: nn.Module) -> dict[str, str | None]:
    """Where the weights come from that `load` has given a model; the same model in a folder keeps its own origin."""
    if name.startswith(FOLDER):
        config = read_config(Path(name.removeprefix(FOLDER)))
        return {**config.get(RECORD, {}).get("origin", {}), "license": _license_of(config)}
    tag = next((entry for entry in list_pretrained() if entry.name == name), None)
    if tag is not None:  # with weights in the package nothing says that they are on the Hub too
        return {"name": name, "hub_id": None if tag.weights else tag.hub_id, "license": _license_of(tag.config)}
    timms = pretrained_cfg_of(model)
    return {"name": timms.get("hf_hub_id"), "hub_id": timms.get("hf_hub_id"), "license": timms.get("license")}


def _license_of(config: Mapping[str, Any]) -> str | None:
    """The licence of the weights beside a `config.json`: other code than ours writes it among timm's own keys."""
    return config[RECORD].get("license") if RECORD in config else config.get("pretrained_cfg", {}).get("license")


def _with_origin(model: nn.Module, arguments: Mapping[str, Any], origin: Mapping[str, str | None]) -> nn.Module:
    """The model, with a note of its origin if it has really been given weights of it."""
    loaded = arguments.get("pretrained") or arguments.get("pretrained_backbone")
    if loaded and not arguments.get("checkpoint_path"):
        setattr(model, _ORIGIN, {key: value for key, value in origin.items() if value})
    return model


def is_trained(name: str) -> bool:
    """Does a name that `resolve` gave stand for a trained model, not for an architecture alone?"""
    return ":" in name or any(entry.name == name for entry in list_pretrained())


def saved_config(name: str) -> Mapping[str, Any]:
    """The content of `config.json` of a trained model, by any name that `load` takes; empty for an architecture.

    Raises:
        ValueError: it is damaged.
        OSError: there is none, or it cannot be had now.
    """
    name = resolve(name)
    if name.startswith(FOLDER):
        return read_config(Path(name.removeprefix(FOLDER)))
    if name.startswith(HUB):
        repository = name.removeprefix(HUB)
        with explained(repository):
            return read_config(Path(download_from_hf(repository, CONFIG)).parent, name)
    return next((entry.config for entry in list_pretrained() if entry.name == name), {})


def saved_here(name: str) -> bool:
    """Whether `save_pretrained` wrote the model of this name, and not timm itself."""
    return RECORD in saved_config(name)


def resolve(name: str) -> str:
    """The name by which timm knows the model that `load` would build; reads no weights and asks no network.

    Raises:
        ValueError, FileNotFoundError: see `load`.
    """
    if timm.is_model(name.split(".")[0]):
        _check_tag(name)
        return name
    path = Path(name.removeprefix(FOLDER))
    if name.startswith(FOLDER) or path.is_dir():
        check_architecture(read_config(path), str(path / CONFIG))
        return f"{FOLDER}{path}"
    if path.is_file():
        raise ValueError(
            f"{name} is a file; give a folder that save_pretrained wrote, or build the network that these weights "
            f"belong to with checkpoint_path={name!r}"
        )
    if ":" in name:
        return name.replace("hf_hub:", HUB, 1)
    if "/" in name:
        raise FileNotFoundError(
            f"there is no folder {name}; give one that save_pretrained wrote, a timm model name, or hf-hub:user/name "
            "for a model of the Hub"
        )
    raise ValueError(f"{unknown('model', name, timm.list_models())}; no folder is called so; see timm.list_models()")


def _check_tag(name: str) -> None:
    """Refuse a tag that the architecture does not have."""
    architecture, _, tag = name.partition(".")
    known = [key for key in get_arch_pretrained_cfgs(architecture) if "." in key]
    if not tag or name in known:
        return
    if not known:
        raise ValueError(f"{architecture} has no pretrained tags, so there is no {name}; leave out .{tag}")
    hint = unknown("pretrained tag", name, known)
    listed = "" if len(known) <= 12 else f"; timm.list_pretrained('{architecture}*') lists them"
    raise ValueError(f"{hint}{listed}")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the `model.safetensors` that `save_pretrained` would write of it, in its own precision."""
    return hashlib.sha256(save(_plain_tensors(base_model(model)))).hexdigest()


def _checked(name: str, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """The repository with its present commit, so that what is loaded is what has been checked, and its configuration.

    Refuses what timm would refuse in its own words, or not at all; the files checked stay in the cache.
    """
    path = Path(download_from_hf(name, CONFIG, cache_dir=cache_dir))
    source = f"{HUB}{name}"
    config = read_config(path.parent, source)
    check_architecture(config, source)
    commit = f"{hf_split(name)[0]}@{path.parent.name}"
    verify_hub(commit, cache_dir)
    return commit, config


def check_architecture(config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration of no architecture, or of an unknown one.

    Args:
        config: content of `config.json`.
        source: what the user calls the model.

    Raises:
        ValueError: the message says what may be missing.
    """
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise damaged(source, f"its architecture is {architecture!r}")
    if not timm.is_model(architecture):
        raise ValueError(f"{unknown(f'architecture in {source}', architecture, timm.list_models())}; {_remedy(config)}")


def _remedy(config: Mapping[str, Any]) -> str:
    """What may be missing where an architecture is unknown."""
    base, _, layer = str(config["architecture"]).rpartition("_")
    needed = config.get(RECORD, {}).get("imports")
    if needed == ["__main__"]:
        return "the model was saved with a layer that a notebook or script defines; run that code first"
    if needed:
        flags = " ".join(f"--import {source}" for source in needed)
        return (
            f"the model was saved with a layer that {' and '.join(map(str, needed))} registers: import that first (on "
            f"the command line add {flags})"
        )
    if timm.is_model(base):
        return (
            f"timm_fsr {__version__} knows no feature layer {layer!r} (it has {', '.join(list_layers())}): import the "
            "package that registers it, or update timm_fsr"
        )
    versions = config.get(RECORD, {})
    saved = f"; it was saved with timm {versions['timm']}" if "timm" in versions else ""
    return f"import the package that registers it, or update timm{saved}"


def _create(name: str, source: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    """Timm's model; `source` is where its configuration is, as in a `pretrained_cfg`."""
    arguments = dict(arguments)
    file = arguments.pop("checkpoint_path", None)
    with told_by_version(source, arguments.get("cache_dir")):
        try:
            model = timm.create_model(name, **arguments)
        except (TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"{name} cannot be built with these arguments: {_one_line(error)}") from error
        except KeyError as error:
            raise ValueError(_unknown_value(name, error, arguments)) from error
        except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            if "No pretrained weights exist" in str(error):
                raise ValueError(
                    f"{name} is an architecture, for which timm knows no trained weights; give a trained model (a "
                    "folder, a pretrained tag or a repository), or a file of weights by checkpoint_path=... (on the "
                    "command line --checkpoint)"
                ) from error
            raise ValueError(_unusable(name, error)) from error
    if file:
        load_weight_file(model, file)
    if file or arguments.get("pretrained") or arguments.get("pretrained_backbone"):
        check_finite_weights(model, f"the weights of {file or name}")
    forget_other_classes(model)
    watch_classifier(model)
    return model


def _unknown_value(name: str, error: KeyError, arguments: Mapping[str, Any]) -> str:
    """What is wrong where timm looks for a name in vain: most often that of an argument."""
    given = {**(saved_config(name).get("model_args") or {}), **arguments}
    wanted = error.args[0] if error.args else None
    argument = next((key for key, value in given.items() if value == wanted), None)
    if argument is None:
        return _unusable(name, error)
    known = {"act_layer": _ACT_LAYER_DEFAULT, "norm_layer": _NORM_MAP}.get(argument)
    if known is None:
        return f"{name} cannot be built with {argument}={wanted!r}: timm knows no such name"
    return f"{name} cannot be built: {unknown(argument, str(wanted), sorted(known))}"


def _unusable(name: str, error: Exception) -> str:
    return f"the weights of {name} are missing, damaged, for another network or no plain tensors: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 400, placeholder=" ...")


def _check_rebuildable(model: nn.Module) -> None:
    adapted = [name or "the model" for name, module in model.named_modules() if _is_of_peft(module)]
    if adapted:
        raise ValueError(
            f"{adapted[0]} holds adapters of PEFT, which timm cannot rebuild; merge them, model = "
            "peft_model.merge_and_unload(), and save that, or save the adapters alone by peft_model.save_pretrained"
        )
    if not hasattr(model, "num_classes") and hasattr(model, "feature_info"):
        raise ValueError(
            f"{type(model).__name__} is a feature extractor (features_only=True), from which timm has taken the "
            "classifier, so that no model can be rebuilt from it; save the whole model and load that "
            "with features_only=True, or keep the extractor's weights by torch.save(extractor.state_dict(), FILE)"
        )
    if len(layer_groups(model)) > 1:
        raise ValueError("a checkpoint can hold one kind of feature layer; detach and attach only one")
    architecture = pretrained_cfg_of(model).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} cannot be rebuilt from a checkpoint: {architecture!r} is no registered timm "
            "model; create the model by timm.create_model, with one kind of feature layer"
        )


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)


def _imports(model: nn.Module) -> list[str]:
    """What must be imported before the model's layer is known; files by name only."""
    origins = [LAYERS.origin(site.layer.name) for group in layer_groups(model) for site in group.sites]
    return list(dict.fromkeys(Path(origin).name for origin in origins if origin))


def remove_stale(folder: Path, kept: Sequence[str] = ()) -> None:
    """Remove report, recipe, card and exported files of a folder whose weights were replaced: they are about others.

    Args:
        folder: of the saved model.
        kept: those that were written with the new weights.
    """
    for name in {REPORT, RECIPE, *EXPORTS.values()} - set(kept):
        (folder / name).unlink(missing_ok=True)
    if _is_card(folder / CARD):
        (folder / CARD).unlink()


def _is_card(path: Path) -> bool:
    """Is it the card of a model, and not somebody's text about the folder?"""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    return head is not None and "library_name: timm\n" in head[1]


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors wants it: no memory shared, no channels-last strides."""
    state = model.state_dict()
    tensors = {key.replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round matrices and kernels, in place, to numbers that `dtype` has.

    They stay in their own precision, and so does all arithmetic; `save_pretrained(..., dtype=dtype)` then stores them
    exactly. Biases, norms and their statistics are few and stay as they are. float16 has 11 significant bits and is
    the better choice for weights of ordinary size, bfloat16 has 8 and the range of float32. It is another model than
    before: evaluate this one.

    Args:
        model: any model in float32.
        dtype: torch.float16 or torch.bfloat16.

    Returns:
        The model.

    Raises:
        ValueError: another dtype, or weights that are too large for it; nothing was changed.
    """
    _check(dtype)
    large = {name: tensor for name, tensor in model.state_dict().items() if _is_halved(tensor)}
    for name, tensor in large.items():
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(f"{name} has numbers that {dtype} cannot hold; use torch.bfloat16 or keep float32")
    for tensor in large.values():  # the model's own memory
        tensor.copy_(tensor.to(dtype))
    return model


def halved(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors, matrices and kernels in `dtype`.

    Raises:
        ValueError: another dtype than float16 and bfloat16, or a number that it has not.
    """
    _check(dtype)
    found = {name: tensor.to(dtype) if _is_halved(tensor) else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.equal(found[name].to(tensor.dtype), tensor):
            raise ValueError(
                f"{name} would be changed by being stored in {dtype}, and what was measured of the model would be that "
                f"of another; call timm_fsr.round_weights(model, {dtype}) first and evaluate the result"
            )
    return found


def _is_halved(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.ndim > 1


def _check(dtype: torch.dtype) -> None:
    if dtype not in HALVES:
        raise ValueError(f"weights cannot be rounded to {dtype}; use one of {', '.join(map(str, HALVES))}")


def training_report(name: str, model: nn.Module) -> Report | None:
    """What training has said of a model, such as the split that chose the checkpoint; None if it has left nothing.

    Args:
        name: of the model, as `load` takes it: a folder, a pretrained tag or a repository of the Hub.
        model: what was loaded. A report of other weights says nothing about it and is left out.

    Raises:
        ValueError: the report is damaged.
    """
    path = _find(resolve(name), REPORT)
    if path is None or not path.is_file():
        return None
    try:
        report = Report.load(path)
    except ValueError as error:
        raise ValueError(f"{error} (after deleting that file, which is in the way)") from error
    recorded = report.conditions.get("weights_sha256")
    return report if recorded in (None, weights_digest(model)) else None


def training_recipe(name: str, report: Report) -> Mapping[str, Any] | None:
    """The recipe that a model brings, as plain values; None if it brings none that can be read.

    Args:
        name: of the model; see `training_report`.
        report: that the model brings. A published one leaves the recipe to a file of its own.
    """
    found = report.conditions.get("recipe")
    if not found:
        path = _find(resolve(name), RECIPE)
        try:
            found = read_yaml(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
        except ValueError:
            return None
    return found if isinstance(found, Mapping) else None


def _find(name: str, file: str) -> Path | None:
    """A file that a model brings besides its weights; None if that is known to be missing."""
    if name.startswith(FOLDER):
        return Path(name.removeprefix(FOLDER)) / file
    if name.startswith(HUB):
        return _of_hub(name.removeprefix(HUB), file)
    return next((entry.folder / file for entry in list_pretrained() if entry.name == name), None)


def _of_hub(repository: str, file: str) -> Path | None:
    """A file of a repository; None where it has none, or where it cannot be had now."""
    try:
        with explained(repository):
            return Path(download_from_hf(repository, file))
    except OSError:  # the weights were there: what they were chosen by must not keep them from being judged
        return None
