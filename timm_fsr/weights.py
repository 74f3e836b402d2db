"""Weights of a whole model, from wherever its configuration says, checked against the record saved with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models._builder import (
    _resolve_pretrained_source,
    load_state_dict,
    load_state_dict_from_hf,
    load_state_dict_from_path,
    load_state_dict_from_url,
)
from timm.models._hub import hf_split
from torch import Tensor

from timm_fsr.files import file_digest
from timm_fsr.version import __version__

StateDict = dict[str, Tensor]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RECORD = "timm_fsr"
"""The key of `config.json` under which this package notes what timm has no place for; timm ignores it."""

FORMAT = 2
"""Of `config.json`; 1 had no checksum, and no number either."""


def make_record(weights: Path) -> dict[str, Any]:
    """What is noted about saved weights: their checksum and size, and the versions that a reader may need."""
    return {
        "format": FORMAT,
        "sha256": file_digest(weights),
        "bytes": weights.stat().st_size,
        "version": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }


def check_record(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The record of a configuration; {} if another package wrote it.

    Raises:
        ValueError: it needs a newer version of this package, or is damaged.
    """
    record = config.get(RECORD, {})
    if not isinstance(record, Mapping) or not isinstance(record.get("format", 1), int):
        raise ValueError(f"the configuration of {source} is damaged: {RECORD!r} holds {record!r}; save the model again")
    if record.get("format", 1) > FORMAT:
        raise ValueError(
            f"{source} was saved by timm_fsr {record.get('version')} in format {record['format']}, but timm_fsr "
            f"{__version__} reads formats up to {FORMAT}; update timm_fsr"
        )
    return record


def check_digest(weights: Path, digest: str | None, source: str) -> None:
    """Refuse weights that are others than those that were saved; without a noted digest nothing can be said.

    Raises:
        ValueError: the checksum differs.
    """
    if digest is None:
        return
    found = file_digest(weights)
    if found != digest:
        raise ValueError(
            f"the weights of {source} are damaged or were exchanged: the SHA-256 of {weights.name} is {found[:16]}..., "
            f"noted is {digest[:16]}...; delete it and download or save the model again"
        )


def verify_folder(folder: Path) -> None:
    """Compare a saved model's weights with what its configuration says of them; says nothing of what is not there.

    Raises:
        ValueError: the checksum differs, or the configuration is of a newer format or damaged.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    if config.is_file() and weights.is_file():
        record = check_record(_read(config), f"local-dir:{folder}")
        check_digest(weights, record.get("sha256"), f"local-dir:{folder}")


def verify_hub(name: str, cache_dir: str | None = None, digest: str | None = None) -> None:
    """The same for a repository of the Hub, "user/name" or "user/name@revision"; its files are kept in the cache.

    Args:
        name: of the repository.
        cache_dir: where downloads are kept.
        digest: of the weights, if it is known from elsewhere than the repository's own configuration.

    Raises:
        ValueError: see `verify_folder`.
        OSError: the Hub could not be reached, or has no such repository.
    """
    repository, revision = hf_split(name)
    files = {}
    for file in (CONFIG, WEIGHTS):
        try:
            files[file] = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
        except EntryNotFoundError:
            return  # weights of another name are not of this package
    record = check_record(_read(files[CONFIG]), f"hf-hub:{name}")
    check_digest(files[WEIGHTS], digest or record.get("sha256"), f"hf-hub:{name}")


def load_weights(config: Mapping[str, Any], cache_dir: str | None, digest: str | None = None) -> StateDict | None:
    """The state dict that a timm `pretrained_cfg` names, checked; never unpickles code.

    Args:
        config: the `pretrained_cfg` as a dictionary.
        cache_dir: where downloads are kept.
        digest: SHA-256 of the file, if the package knows it.

    Returns:
        The state dict, or None where the configuration names no weights.

    Raises:
        ValueError: see `verify_folder`.
        OSError: the file is missing, or the Hub cannot be reached.
    """
    source: tuple[str, Any] = _resolve_pretrained_source(dict(config))
    kind, where = source
    if not kind:
        return None
    if kind == "state_dict":
        return dict(where)
    if kind == "file":
        check_digest(Path(where), digest, str(where))
        return load_state_dict(where, weights_only=True)
    if kind == "url":
        return load_state_dict_from_url(where, map_location="cpu", weights_only=True, model_dir=cache_dir)
    if kind == "local-dir":
        verify_folder(Path(where))
        return load_state_dict_from_path(where, weights_only=True)
    if isinstance(where, (tuple, list)):  # hub id and file name
        return load_state_dict_from_hf(where[0], where[1], weights_only=True, cache_dir=cache_dir)
    verify_hub(where, cache_dir, digest)
    return load_state_dict_from_hf(where, weights_only=True, cache_dir=cache_dir)


def _read(config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config} is damaged ({error}); download or save the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{config} is damaged: it holds no configuration; download or save the model again")
    return found
