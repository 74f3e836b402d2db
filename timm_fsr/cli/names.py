"""Names of layers, objectives and attacks for help texts: at once where nobody has imported torch, else exactly."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable

from timm_fsr.evaluation.names import spelled
from timm_fsr.utils.announced import announced


def layer_names() -> list[str]:
    """Feature layers, those of installed plug-ins and of imported code among them."""

    def registered() -> list[str]:
        from timm_fsr.layers import LAYERS

        return LAYERS.names()

    return _names("layers", registered, lambda: list(announced("timm_fsr.layers", "register_layer")))


def objective_names() -> list[str]:
    """Training objectives, likewise."""

    def registered() -> list[str]:
        from timm_fsr.training.objectives import OBJECTIVES

        return OBJECTIVES.names()

    return _names(
        "objectives", registered, lambda: list(announced("timm_fsr.training.objectives", "register_objective"))
    )


def training_attack_names() -> list[str]:
    """Attacks to train with, likewise."""

    def registered() -> list[str]:
        from timm_fsr.attacks.base import ATTACKS

        return ATTACKS.names()

    return _names("attacks", registered, lambda: list(announced("timm_fsr.attacks", "register_attack")))


def attack_names() -> list[str]:
    """Attacks to evaluate with, likewise; numbers in them are examples."""

    def registered() -> list[str]:
        from timm_fsr.evaluation.registry import list_attacks

        return list_attacks()

    def read() -> list[str]:
        single = announced("timm_fsr.attacks", "register_attack")
        suites = announced("timm_fsr.evaluation.suites", "register_suite")
        return spelled(
            {name: "steps" in known for name, known in single.items() if "only_trains" not in known},
            {name: "numbered" in known for name, known in suites.items()},
        )

    return _names("suites", registered, read, "attacks")


def _names(group: str, registered: Callable[[], list[str]], read: Callable[[], list[str]], *more: str) -> list[str]:
    """By the registries if they cost nothing now, or if a plug-in says by its entry points that it adds to them."""
    plugins = any(importlib.metadata.entry_points(group=f"timm_fsr.{name}") for name in (group, *more))
    return registered() if plugins or "torch" in sys.modules else read()
