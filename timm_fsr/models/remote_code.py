"""What a saved model holds for transformers: entries of `config.json`, and a file that names our classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELLING = "modeling_timm_fsr.py"
"""The file that transformers reads with `trust_remote_code=True`; it has to be in the folder of the weights."""

MODEL_TYPE = "timm_fsr"
"""By which transformers finds our classes where timm_fsr is imported already."""

OUR_CLASS = "TimmFsrForImageClassification"
"""The entry `architectures` of a `config.json` that transformers wrote with our class."""

AUTO_MAP = "auto_map"
ENTRIES: Mapping[str, Any] = {
    "model_type": MODEL_TYPE,
    AUTO_MAP: {
        "AutoConfig": "modeling_timm_fsr.TimmFsrConfig",
        "AutoImageProcessor": "modeling_timm_fsr.TimmFsrImageProcessor",
        "AutoModelForImageClassification": f"modeling_timm_fsr.{OUR_CLASS}",
    },
    "dtype": "float32",  # else transformers would compute in the precision that weights are stored in
}
"""Entries of `config.json` that only transformers reads."""


def modelling_code() -> bytes:
    """The content of `modeling_timm_fsr.py`, which is the same for all models."""
    return Path(__file__).with_name(MODELLING).read_bytes()


def check_remote_code(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a saved model names code for transformers, which has to be ours: nobody else's code is published.

    Args:
        config: content of its `config.json`.
        folder: that holds it.

    Raises:
        ValueError: it names other code, or the file in the folder is not the one of this package.
    """
    named = config.get(AUTO_MAP)
    if named is None:
        return False
    if named != ENTRIES[AUTO_MAP]:
        raise ValueError(
            f"{folder / 'config.json'} names code of its own ({AUTO_MAP} is {named!r}), which timm_fsr does not "
            "publish: downloaders would run it; save the model again by timm_fsr.save_pretrained"
        )
    path = folder / MODELLING
    if path.is_file() and path.read_bytes() != modelling_code():
        raise ValueError(
            f"{path} is not the file that this timm_fsr writes, so it is not published: downloaders would run it; "
            "delete it, and the right one is published in its place"
        )
    return True
