"""Weights of a whole model, from wherever its configuration says, checked against the record saved with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.models._builder import (
    _resolve_pretrained_source,
    load_state_dict,
    load_state_dict_from_hf,
    load_state_dict_from_path,
    load_state_dict_from_url,
)
from timm.models._hub import hf_split
from torch import Tensor, nn

from timm_fsr.layers import FeatureLayer
from timm_fsr.models.remote_code import OUR_CLASS
from timm_fsr.utils.documents import read_json
from timm_fsr.utils.files import file_digest
from timm_fsr.version import __version__

StateDict = dict[str, Tensor]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RECORD = "timm_fsr"
"""The key of `config.json` under which this package notes what timm has no place for; timm ignores it."""

_FOLDER = "local-dir:"

FORMAT = 2
"""Of `config.json`; 1 had no checksum, and no number either."""


def make_record(weights: Path, dtype: str | None = None, imports: Sequence[str] = ()) -> dict[str, Any]:
    """What is noted about saved weights: their checksum and size, and what a reader may need.

    Args:
        weights: the file.
        dtype: in which matrices and kernels are stored, if not in the model's own: "float16", "bfloat16".
        imports: files or modules that register what the model is made of, where timm_fsr does not have it.
    """
    return {
        "format": FORMAT,
        "sha256": file_digest(weights),
        **({"dtype": dtype} if dtype else {}),
        **({"imports": list(imports)} if imports else {}),
        "bytes": weights.stat().st_size,
        "version": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }


def read_config(folder: str | Path, source: str | None = None) -> dict[str, Any]:
    """The `config.json` of a saved model, with its record checked.

    Args:
        folder: of the saved model.
        source: what the user calls the model, for messages about a damaged file; None takes the path of the file.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is damaged, or needs a newer version of this package.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        best = path.parent / "best"
        remedy = f"{best}, which training chose" if (best / CONFIG).is_file() else "a folder that save_pretrained wrote"
        raise FileNotFoundError(f"{path.parent} has no {CONFIG}, so it is no saved model; give {remedy}")
    source = source or str(path)
    try:
        config = read_json(path.read_bytes())
    except ValueError as error:
        raise damaged(source, error) from error
    if not isinstance(config, dict):
        raise damaged(source, "it holds no keys and values")
    check_record(config, source)
    _check_values(config, source)
    return _without_stale_record(config)


def _without_stale_record(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what it notes of weights that transformers has replaced since.

    transformers' own classes copy our record to the weights that they write, and name themselves. Ours renew it.
    """
    if RECORD in config and config.get("architectures", [OUR_CLASS]) != [OUR_CLASS]:
        config[RECORD] = {
            key: value for key, value in config[RECORD].items() if key not in ("sha256", "bytes", "dtype")
        }
    return config


def _check_values(config: Mapping[str, Any], source: str) -> None:
    """Refuse values of `config.json` that no model has, before timm fails on them in its own words."""
    own = config.get("pretrained_cfg")
    for key, kind in (("model_args", Mapping), ("pretrained_cfg", Mapping)):
        if key in config and not isinstance(config[key], kind):
            raise damaged(source, f"{key!r} is {config[key]!r}")
    for where, values in (("", config), ("pretrained_cfg.", own or {})):
        for key, fits in _VALUES.items():
            if values.get(key) is not None and not fits(values[key]):
                raise damaged(source, f"'{where}{key}' is {values[key]!r}")


def _are(kind: type | tuple[type, ...], values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)


_VALUES: dict[str, Callable[[Any], bool]] = {
    "num_classes": lambda value: isinstance(value, int) and value >= 0,
    "label_names": lambda value: isinstance(value, (list, tuple, dict)),
    "input_size": lambda value: _are(int, value) and len(value) == 3 and min(value) > 0,
    "mean": lambda value: _are((int, float), value) and len(value) > 0,
    "std": lambda value: _are((int, float), value) and len(value) > 0,
}
"""By key, whether a value is one that timm can use, both at the top of `config.json` and in its `pretrained_cfg`."""


def damaged(source: str, reason: object) -> ValueError:
    """The error for a configuration that cannot be used."""
    return ValueError(f"{source} is damaged ({reason}); download or save the model again")


def check_record(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The record of a configuration; {} if another package wrote it.

    Raises:
        ValueError: it needs a newer version of this package, or is damaged.
    """
    record = config.get(RECORD, {})
    if not isinstance(record, Mapping):
        raise damaged(source, f"{RECORD!r} is {record!r}")
    sound = {
        "format": isinstance(record.get("format", 1), int),
        "sha256": _is_digest(record),
        "origin": isinstance(record.get("origin", {}), Mapping),
        "imports": _are(str, record.get("imports", [])),
    }
    for key, fits in sound.items():
        if not fits:
            raise damaged(source, f"'{RECORD}.{key}' is {record[key]!r}")
    if record.get("format", 1) > FORMAT:
        raise ValueError(
            f"{source} was saved by timm_fsr {record.get('version')} in format {record['format']}, but timm_fsr "
            f"{__version__} reads formats up to {FORMAT}; update timm_fsr"
        )
    return record


def _is_digest(record: Mapping[str, Any]) -> bool:
    """Is the checksum in a record one, or missing as in format 1?"""
    digest = record.get("sha256")
    return digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None)


def check_finite_weights(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights or saved statistics hold NaN or infinite numbers: it has no answers to judge.

    Args:
        model: the model.
        what: the weights, as the subject of a sentence.

    Raises:
        ValueError: the message names the first of the tensors.
    """
    tensors = {name: found for name, found in model.state_dict().items() if isinstance(found, Tensor)}
    broken = [
        name
        for name, found in tensors.items()
        if found.is_floating_point() and not found.is_meta and not bool(torch.isfinite(found).all())
    ]
    if broken:
        raise ValueError(
            f"{what} hold NaN or infinite numbers (in {broken[0]}; {len(broken)} of {len(tensors)} tensors), so the "
            "model has no answers; take an earlier checkpoint or train it again"
        )


@contextmanager
def told_by_version(config: Mapping[str, Any], cache_dir: str | None = None) -> Iterator[None]:
    """Errors within it say so if the model comes from newer versions of timm_fsr or timm than these.

    Args:
        config: a timm `pretrained_cfg`; its `source`, `file` and `hf_hub_id` say where the model's configuration is.
        cache_dir: where downloads are kept.

    Raises:
        ValueError: in place of what was raised, if that may be why.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        hint = _newer(_source_record(config, cache_dir))
        if not hint or hint in str(error):
            raise
        raise ValueError(f"{error}; {hint}") from error


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


def verify_folder(folder: Path) -> Path | None:
    """A saved model's weights, compared with what its configuration says of them.

    Returns:
        The file, or None if no checksum is noted: another package wrote it, or an early version of this one.

    Raises:
        ValueError: the checksum differs, there are no weights to compare it with, or the configuration is of a newer
            format or damaged.
    """
    source = f"{_FOLDER}{folder}"
    digest = _noted_digest(read_config(folder), source) if (folder / CONFIG).is_file() else None
    if digest is None:
        return None
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _unchecked(source)
    check_digest(weights, digest, source)
    return weights


def verify_hub(
    name: str, cache_dir: str | None = None, digest: str | None = None, file: str | None = None
) -> Path | None:
    """The same for a repository of the Hub, "user/name" or "user/name@revision"; its files are kept in the cache.

    The configuration and the weights are those of one commit, whatever is pushed meanwhile.

    Args:
        name: of the repository.
        cache_dir: where downloads are kept.
        digest: of the weights, if it is known from elsewhere than the repository's own configuration.
        file: that the weights are to be loaded from, if it is named; None is the usual one.

    Raises:
        ValueError: see `verify_folder`.
        OSError: the Hub could not be reached, or has no such repository.
    """
    (repository, revision), source = hf_split(name), f"hf-hub:{name}"
    config = _download(repository, CONFIG, revision, cache_dir) if digest is None else None
    if config is not None:
        digest, revision = _noted_digest(read_config(config.parent, source), source, file), config.parent.name
    if digest is None:
        return None
    weights = _download(repository, WEIGHTS, revision, cache_dir) if file in (None, WEIGHTS) else None
    if weights is None:
        raise _unchecked(source, file)
    check_digest(weights, digest, source)
    return weights


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
        checked = verify_folder(Path(where))
        return load_file(checked) if checked else load_state_dict_from_path(where, weights_only=True)
    name, file = (where, None) if isinstance(where, str) else where
    checked = verify_hub(name, cache_dir, digest, file)
    if checked:
        return load_file(checked)
    named = {"filename": file} if file else {}
    return load_state_dict_from_hf(name, weights_only=True, cache_dir=cache_dir, **named)


def _noted_digest(config: Mapping[str, Any], source: str, file: str | None = None) -> str | None:
    """The checksum in a configuration; ValueError if its weights are to come from a file that is not the noted one."""
    digest = config.get(RECORD, {}).get("sha256")
    own = config.get("pretrained_cfg")
    named = file or (own.get("hf_hub_filename") if isinstance(own, Mapping) else None)
    if digest and named not in (None, WEIGHTS):
        raise _unchecked(source, named)
    return digest


def _unchecked(source: str, file: str | None = None) -> ValueError:
    what = f"its weights are to come from {file}" if file else f"it has no {WEIGHTS}"
    return ValueError(
        f"the weights of {source} cannot be checked: {what}, but the noted checksum is that of {WEIGHTS}; nothing else "
        "is loaded in its place: download it again, or ask its author to save and publish the model again"
    )


def _download(repository: str, file: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """A file of a repository; None if there is none of this name, which is another thing than not getting it."""
    try:
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _source_record(config: Mapping[str, Any], cache_dir: str | None) -> Mapping[str, Any]:
    """The record beside the weights that a `pretrained_cfg` names; {} if there is none or it cannot be read."""
    try:
        if config.get("source") == "local-dir":
            path: Path | None = Path(config["file"]) / CONFIG
        elif config.get("source") == "hf-hub":
            path = _download(*_split(config["hf_hub_id"], CONFIG), cache_dir)
        else:
            return {}
        return read_config(path.parent).get(RECORD, {}) if path else {}
    except (ValueError, OSError):  # there is another error to tell
        return {}


def _split(name: str, file: str) -> tuple[str, str, str | None]:
    repository, revision = hf_split(name)
    return repository, file, revision


def _newer(record: Mapping[str, Any]) -> str:
    """What to update, if a model was saved by newer versions than those at hand; else nothing."""
    here = {"timm_fsr": __version__, "timm": timm.__version__}
    there = {"timm_fsr": str(record.get("version", "")), "timm": str(record.get("timm", ""))}
    newer = [name for name, version in there.items() if _order(version) > _order(here[name])]
    versions = " and ".join(f"{name} {there[name]} (this is {here[name]})" for name in newer)
    return f"it was saved by {versions}: update {' and '.join(newer)}" if newer else ""


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def model_digest(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the structure and all the weights and buffers of a model."""
    digest = hashlib.sha256(repr(model).encode())
    for module in model.modules():  # what a module's repr does not say: the arguments of feature layers and of timm
        digest.update(repr(getattr(module, "_model_args", "")).encode())
        digest.update(repr(module.resolved_args() if isinstance(module, FeatureLayer) else "").encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]  # buffers that are not saved count too: mean, std
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor; by way of bytes, as numpy does not know bfloat16."""
    plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # also of expanded ones
    return plain.flatten().view(torch.uint8).numpy().tobytes()
