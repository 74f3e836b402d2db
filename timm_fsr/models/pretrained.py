"""Pretrained tags: the robust checkpoints that this package knows by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from timm_fsr.models.weights import CONFIG, RECORD, WEIGHTS, damaged, read_config
from timm_fsr.utils import defaults

HUB_VARIABLE = "TIMM_FSR_HUB"
DEFAULT_HUB = "timm-fsr"

CARD, REPORT, RECIPE = defaults.CARD, defaults.REPORT, defaults.RECIPE
_EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint behind a tag.

    Attributes:
        architecture: registered timm name of the network, layer included: "resnet_tiny_cifar_fsr".
        tag: what follows it after a dot: "at_fashion_mnist".
        folder: with its `config.json`, `report.json` and, if the package brings them, its weights.
        config: content of `config.json`.
        namespace: of its repository on the Hub: what TIMM_FSR_HUB named when the folder was read, else our own. What
            timm's registry was told must not change later.
    """

    architecture: str
    tag: str
    folder: Path
    config: Mapping[str, Any]
    namespace: str = DEFAULT_HUB

    @property
    def name(self) -> str:
        """What `timm.create_model` takes."""
        return f"{self.architecture}.{self.tag}"

    @property
    def hub_id(self) -> str:
        """Its repository."""
        return f"{self.namespace}/{self.name}"

    @property
    def weights(self) -> Path | None:
        """The file of weights in the package; None if they come from the Hub."""
        path = self.folder / WEIGHTS
        return path if path.is_file() else None

    @property
    def digest(self) -> str | None:
        """SHA-256 that the weights must have."""
        return self.config.get(RECORD, {}).get("sha256")

    @property
    def size(self) -> int | None:
        """Bytes of the weights."""
        return self.config.get(RECORD, {}).get("bytes")

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that the network was built with, every one of its layer's included."""
        return dict(self.config.get("model_args", {}))

    def pretrained_cfg(self) -> PretrainedCfg:
        """What timm's registry holds of it."""
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        values = {key: value for key, value in self.config["pretrained_cfg"].items() if key in known}
        own = {key: self.config[key] for key in ("num_classes", "label_names") if key in self.config}
        values |= {**own, "architecture": self.architecture, "tag": self.tag}
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        file = str(self.weights) if self.weights else None
        return PretrainedCfg(**{**values, **tuples, "custom_load": False, "file": file, "hf_hub_id": self.hub_id})


def read_pretrained(folder: str | Path) -> Pretrained:
    """The checkpoint of a folder that is called `<architecture>.<tag>`.

    Raises:
        FileNotFoundError: it has no `config.json`.
        ValueError: that is damaged or of a newer version, or the folder is called otherwise.
    """
    folder = Path(folder).absolute()
    architecture, _, tag = folder.name.partition(".")
    config = read_config(folder)
    try:
        found = config["architecture"]
        config["pretrained_cfg"]["input_size"], config["num_classes"]
    except (KeyError, TypeError) as error:
        raise damaged(str(folder / CONFIG), repr(error)) from error
    if not tag or found != architecture:
        raise ValueError(
            f"the folder {folder.name} holds a {found}; call it {found}.<tag>, as it will be known to timm"
        )
    return Pretrained(architecture, tag, folder, config, os.environ.get(HUB_VARIABLE) or DEFAULT_HUB)


def embedded_pretrained() -> Iterator[Pretrained]:
    """The checkpoints that the package describes, with weights or without."""
    for path in sorted(_EMBEDDED.glob(f"*/{CONFIG}")):
        yield read_pretrained(path.parent)


TAGS: dict[str, Pretrained] = {}  # by "<architecture>.<tag>"


def list_pretrained() -> list[Pretrained]:
    """The checkpoints that timm knows by a tag of this package, by name."""
    return [TAGS[name] for name in sorted(TAGS)]
