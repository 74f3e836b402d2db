"""Reports: what an evaluation found, with the conditions it was found under."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_fsr.files import write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Per-image outcomes of an evaluation, and everything that decided them.

    Attributes:
        correct: for "clean" and each attack by name, (N,) bool: was the image classified correctly?
        attacks: each attack by name, written out with its parameters.
        norm: of the threat model.
        eps: its radius, in pixels of [0, 1].
        seed: of the random starts.
        conditions: model, data, its fingerprint, versions, hardware, batch size, precision.
    """

    correct: dict[str, Tensor]
    attacks: dict[str, str]
    norm: str
    eps: float
    seed: int
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """For "clean" and each attack, the share of images classified correctly, in [0, 1]."""
        return {name: _share(outcome) for name, outcome in self.correct.items()}

    @property
    def worst_case(self) -> float:
        """The share of images classified correctly clean and under every attack, in [0, 1]."""
        return _share(torch.stack(list(self.correct.values())).all(dim=0))

    def interval(self, name: str) -> tuple[float, float]:
        """95 % Wilson score interval of `accuracy[name]` (`"worst_case"` as well), from the number of images."""
        share = self.worst_case if name == "worst_case" else self.accuracy[name]
        return wilson_interval(share, self.count)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.correct["clean"])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; `from_dict` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "threat_model": {"norm": self.norm, "eps": self.eps},
            "seed": self.seed,
            "images": self.count,
            "accuracy": {**self.accuracy, "worst_case": self.worst_case},
            "attacks": self.attacks,
            "conditions": self.conditions,
            "correct": {name: "".join("01"[flag] for flag in flags.tolist()) for name, flags in self.correct.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Rebuild a report written by `to_dict`.

        Raises:
            ValueError: written by a newer version, or incomplete.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"the report has schema version {values.get('schema_version')!r}, this timm_fsr reads "
                f"{SCHEMA_VERSION}; update timm_fsr"
            )
        try:
            return cls(
                correct={n: torch.tensor([flag == "1" for flag in flags]) for n, flags in values["correct"].items()},
                attacks=dict(values["attacks"]),
                norm=values["threat_model"]["norm"],
                eps=values["threat_model"]["eps"],
                seed=values["seed"],
                conditions=dict(values["conditions"]),
            )
        except KeyError as error:
            raise ValueError(f"the report lacks the key {error}; evaluate the model again") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the report is damaged ({error}); evaluate the model again") from error

    def save(self, path: str | Path) -> None:
        """Write JSON to `path`, atomically."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no such report in it.
        """
        try:
            values = json.loads(Path(path).read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}); evaluate the model again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no report; evaluate the model again")
        return cls.from_dict(values)

    def summary(self) -> str:
        """One line: every accuracy in percent, and the threat model."""
        parts = [f"{name} {100 * value:.2f} %" for name, value in self.accuracy.items()]
        return f"{', '.join(parts)}, worst case {100 * self.worst_case:.2f} % ({self.threat}, {self.count} images)"

    @property
    def threat(self) -> str:
        """The threat model in the field's notation: "Linf 8/255"."""
        return f"{self.norm.capitalize()} {format_eps(self.eps)}"


def _share(outcome: Tensor) -> float:
    return int(outcome.sum()) / len(outcome)  # exact, as a mean in float32 is not


def format_eps(eps: float) -> str:
    """`eps` as a fraction of 255 where it is one ("8/255"), else as a decimal."""
    scaled = eps * 255
    return f"{round(scaled)}/255" if abs(scaled - round(scaled)) < 1e-6 and scaled >= 0.5 else f"{eps:g}"


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927) seen in `count` independent trials, within [0, 1]."""
    z = 1.959964
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
