"""Checkpoints in timm's format: a folder that `timm.create_model("local-dir:...", pretrained=True)` rebuilds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import timm_fsr
from timm_fsr.files import staged
from timm_fsr.layers.base import unknown
from timm_fsr.pixels import PixelModel
from timm_fsr.report import Report
from timm_fsr.sites import layer_groups

# Options of `timm.create_model` that say where weights come from; a saved model brings its own.
_NOT_SAVED = ("pretrained_backbone", "checkpoint_path", "cache_dir")


def save_pretrained(model: nn.Module, folder: str | Path, *, report: Report | None = None) -> Path:
    """Save a model as `config.json` and `model.safetensors`, with every feature-layer argument written out.

    Args:
        model: a timm model made by `timm.create_model`, with feature layers or without, or a PixelModel of one.
        folder: made if missing; files of these names in it are replaced, each atomically, when all are written.
        report: written beside them as `report.json`.

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
        ValueError: no such model.
        FileNotFoundError: no such folder, or no model in it.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json, so it is no saved model; give a folder that save_pretrained wrote"
            )
        return _create(f"local-dir:{folder}", **{"pretrained": True, **kwargs})
    if ":" in name:
        return _create(name, **{"pretrained": True, **kwargs})
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(unknown("model", name, timm.list_models()) + "; see timm.list_models()")
    return _create(name, **kwargs)


def base_model(model: nn.Module) -> nn.Module:
    """The timm model inside wrappers (DDP, compiled, PixelModel)."""
    for attribute in ("module", "_orig_mod"):
        inner = model._modules.get(attribute)
        if inner is not None:
            return base_model(inner)
    return base_model(model.model) if isinstance(model, PixelModel) else model


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"the configuration of {name} is damaged ({error}); download or save the model again"
        ) from error
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
            raise
        raise ValueError(
            f"the weights of {name} are damaged or no plain tensors ({error}); download or save the model again"
        ) from error


def _check_rebuildable(model: nn.Module) -> None:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} cannot be rebuilt from a checkpoint: {architecture!r} is no registered timm "
            "model; create the model by timm.create_model, with one kind of feature layer"
        )
    if len(layer_groups(model)) > 1:
        raise ValueError("a checkpoint can hold one kind of feature layer; detach and attach only one")


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors wants it: no memory shared, no channels-last strides."""
    state = model.state_dict()
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _provenance() -> dict[str, str]:
    """Versions a reader may need; timm keeps and ignores them."""
    return {"version": timm_fsr.__version__, "timm": timm.__version__, "torch": torch.__version__}
