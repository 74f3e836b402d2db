"""Checkpoints in timm's format: a folder that `timm.create_model("local-dir:...", pretrained=True)` rebuilds."""

from __future__ import annotations

import json
import pickle
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_fsr.files import staged
from timm_fsr.layers.base import unknown
from timm_fsr.pixels import PixelModel
from timm_fsr.report import Report
from timm_fsr.sites import layer_groups
from timm_fsr.version import __version__

# Options of `timm.create_model` that say where weights come from; a saved model brings its own.
_NOT_SAVED = ("pretrained_backbone", "checkpoint_path", "cache_dir")


def save_pretrained(model: nn.Module, folder: str | Path, *, report: Report | None = None) -> Path:
    """Save a model as `config.json` and `model.safetensors`, with every feature-layer argument written out.

    Args:
        model: a timm model made by `timm.create_model`, with feature layers or without, or a PixelModel of one.
        folder: made if missing; files of these names in it are replaced, each atomically, when all are written.
        report: written beside them as `report.json`; without one, an older one there is removed.

    Returns:
        The folder.

    Raises:
        ValueError: `timm.create_model` could not rebuild the model from its configuration.
        OSError: the disk is full or the folder is not writable; what was there before is untouched.
    """
    model = base_model(model)
    _check_rebuildable(model)
    arguments = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in _NOT_SAVED}
    original = model._model_args if hasattr(model, "_model_args") else None
    folder = Path(folder)
    try:
        model._model_args = arguments  # type: ignore[assignment]
        with staged(folder) as scratch:
            save_file(_plain_tensors(model), scratch / "model.safetensors")
            save_config_for_hf(model, str(scratch / "config.json"), model_config={"timm_fsr": _provenance()})
            if report is not None:
                (scratch / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        if report is None:
            (folder / "report.json").unlink(missing_ok=True)  # it is about other weights
    finally:
        if original is not None:
            model._model_args = original
    return folder


def load(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with errors that name the remedy.

    Args:
        name: a timm model name, a path of a folder written by `save_pretrained`, or either of timm's
            "local-dir:" and "hf-hub:" names. Paths and sourced names load their weights.
        **kwargs: passed to `timm.create_model`.

    Raises:
        ValueError: no such model, arguments that it does not take, or a damaged checkpoint.
        FileNotFoundError: no such folder, or no model in it.
    """
    name = resolve(name)
    return _create(name, **({"pretrained": True, **kwargs} if ":" in name else kwargs))


def resolve(name: str) -> str:
    """The name by which timm knows the model that `load` would build; reads no weights and asks no network.

    Raises:
        ValueError, FileNotFoundError: see `load`.
    """
    if timm.is_model(name.split(".")[0]):
        return name
    path = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or path.is_dir():
        _check_config(path / "config.json")
        return f"local-dir:{path}"
    if path.is_file():
        raise ValueError(
            f"{name} is a file; give a folder that save_pretrained wrote, or build the network that these weights "
            f"belong to with checkpoint_path={name!r}"
        )
    if ":" in name:
        return name
    if "/" in name:
        raise FileNotFoundError(f"there is no folder {name}; give one that save_pretrained wrote, or a timm model name")
    raise ValueError(unknown("model", name, timm.list_models()) + "; see timm.list_models()")


def base_model(model: nn.Module) -> nn.Module:
    """The timm model inside wrappers (DDP, compiled, PixelModel)."""
    for attribute in ("module", "_orig_mod"):
        inner = model._modules.get(attribute)
        if inner is not None:
            return base_model(inner)
    return base_model(model.model) if isinstance(model, PixelModel) else model


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no config.json, so it is no saved model; give a folder that save_pretrained wrote"
        )
    try:
        architecture = json.loads(path.read_bytes())["architecture"]
        known = timm.is_model(architecture)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); download or save the model again") from error
    if not known:
        raise ValueError(unknown(f"architecture in {path}", architecture, timm.list_models()))


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built with these arguments: {_one_line(error)}") from error
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {name} are missing, damaged, for another network or no plain tensors: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 400, placeholder=" ...")


def _check_rebuildable(model: nn.Module) -> None:
    if len(layer_groups(model)) > 1:
        raise ValueError("a checkpoint can hold one kind of feature layer; detach and attach only one")
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} cannot be rebuilt from a checkpoint: {architecture!r} is no registered timm "
            "model; create the model by timm.create_model, with one kind of feature layer"
        )


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors wants it: no memory shared, no channels-last strides."""
    state = model.state_dict()
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _provenance() -> dict[str, str]:
    """Versions a reader may need; timm keeps and ignores them."""
    return {"version": __version__, "timm": timm.__version__, "torch": torch.__version__}
