"""What `timm-fsr evaluate` starts from: the flags, then what the model's own report says, then the defaults."""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_fsr.cli.parsers.evaluate import EPS, NORM, SPLIT
from timm_fsr.data.dataset import ImageData, load_data
from timm_fsr.data.sources import EMBEDDED, open_rows
from timm_fsr.reports.report import Report, format_eps

_NAMED = re.compile(r"(.+)\[([^\[\]]+)\](?: limited to (\d+))?")  # as `load_data` calls what it has loaded
_READING = ("config", "image_column", "label_column")  # keys of a recipe's data that are flags here too


def fill_threat(options: argparse.Namespace, own: Report | None) -> list[str]:
    """Set the norm and eps that were not given.

    Args:
        options: of the command; `norm` and `eps` are None where the user has not given them, and are set here.
        own: the report that the model brings, if any.

    Returns:
        What a user has to know about it, as sentences.

    Raises:
        ValueError: another norm than the model's own was given without an eps.
    """
    norm, eps = options.norm, options.eps
    if own is None:
        options.norm, options.eps = norm or NORM, EPS if eps is None else eps
        defaults = [
            *([f"norm {NORM}"] if norm is None else []),
            *([f"eps {format_eps(EPS, options.norm)}"] if eps is None else []),
        ]
        return [f"the model says nothing of its threat model; default {', '.join(defaults)}"] if defaults else []
    if norm not in (None, own.norm) and eps is None:
        raise ValueError(
            f"the model's own threat model is {own.threat}, whose eps means nothing for --norm={norm}; add --eps"
        )
    options.norm, options.eps = norm or own.norm, own.eps if eps is None else eps
    if (options.norm, format_eps(options.eps, options.norm)) == (own.norm, format_eps(own.eps, own.norm)):
        options.eps = own.eps  # 0.1 and 25.5/255 are the same radius
        return [f"threat model: {own.threat}, the model's own"] if None in (norm, eps) else []
    asked = f"{options.norm.capitalize()} {format_eps(options.eps, options.norm)}"
    return [f"threat model: {asked} as asked for; the model's own is {own.threat}"]


def fill_data(options: argparse.Namespace, own: Report | None, recipe: Mapping[str, Any] | None = None) -> list[str]:
    """Set the data and split that were not given, and how the data is read.

    Args:
        options: of the command; `data`, `split`, `limit`, `config`, `image_column` and `label_column` are None where
            the user has not given them, and are set here as far as they are known.
        own: the report that the model brings, if any.
        recipe: of the model's training, if it brings one.

    Returns:
        What a user has to know about it, as sentences.

    Raises:
        ValueError: the data of the model's report is not here, and nothing here is known to be like it.
    """
    if options.data is not None:
        options.split = options.split or SPLIT
        return []
    named = _NAMED.fullmatch(str(own.conditions.get("data") or "")) if own else None
    if own is None or named is None:
        options.data, options.split = EMBEDDED, options.split or SPLIT
        return [f"the model says nothing of its test images; default {EMBEDDED}[{options.split}]"]
    source, split, limit = named[1], options.split or named[2], named[3]
    for key, value in _reading(recipe or {}, source).items():
        setattr(options, key, getattr(options, key) or value)
    options.data, options.split = source, split
    missing = _missing(options)
    if missing:
        return [_fall_back(options, own, named[0], missing)]
    if limit and split == named[2] and options.limit is None:
        options.limit = int(limit)
    return [f"data: {named[0] if split == named[2] else f'{source}[{split}]'}, from the model's report"]


def check_data(options: argparse.Namespace, data: ImageData, own: Report | None) -> list[str]:
    """Say so where images that are called as those of the model's report are others."""
    known = own.conditions.get("data_fingerprint") if own else None
    same_name = own is not None and own.conditions.get("data") == data.name
    if not known or not same_name or options.size or options.channels or known == data.fingerprint:
        return []
    return [f"{data.name} is not what it was for the model's report: the images, their order or their labels differ"]


def _reading(recipe: Mapping[str, Any], source: str) -> dict[str, Any]:
    """How the recipe reads that source, as far as it is known."""
    data = recipe.get("data")
    if not isinstance(data, Mapping) or data.get("source") != source:
        return {}
    return {key: data[key] for key in _READING if data.get(key)}


def _missing(options: argparse.Namespace) -> str:
    """Why the data cannot be read here; "" if it is here."""
    source = str(options.data)
    path = Path(source).expanduser()
    if source == EMBEDDED or path.exists() or glob.glob(source):
        return ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return "there is no such file or folder"
    columns = {key: getattr(options, key) for key in _READING}
    try:
        open_rows(source, options.split, **columns)  # of the Hub, or of its cache
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _fall_back(options: argparse.Namespace, own: Report, name: str, missing: str) -> str:
    """Take the embedded images if they are the report's or have its classes, and say so.

    Raises:
        ValueError: they have nothing to do with the model.
    """
    split = options.split if options.split in ("train", "test") else SPLIT
    embedded = load_data(EMBEDDED, split, progress=False)
    if own.conditions.get("data_fingerprint") == embedded.fingerprint:
        same = "which has the very same images"
    elif list(own.conditions.get("classes") or ()) == list(embedded.classes):
        same = "which has the same classes, but not the same images; give --data for those"
    else:
        raise ValueError(
            f"the model's report is about {name}, which is not here ({missing}); give --data, and --split if it is not "
            f"{SPLIT!r}"
        )
    options.data, options.split = EMBEDDED, split
    for key in _READING:
        setattr(options, key, None)
    return f"data: {name} of the model's report is not here; in its place {embedded.name}, {same}"
