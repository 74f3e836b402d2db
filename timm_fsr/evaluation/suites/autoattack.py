"""AutoAttack's versions, and each of its components alone."""

from __future__ import annotations

from collections.abc import Sequence

from timm_fsr.attacks.autoattack import AUTOATTACK_NORMS, COMPONENTS, VERSIONS, Component, nonstandard, usable
from timm_fsr.evaluation.registry import Cost, Stage, Suite, Target, register_suite

AUTOATTACK_SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "autoattack": ("standard", VERSIONS["standard"]),
    **{version: (version, VERSIONS[version]) for version in ("plus", "rand")},
    **{component: ("standard", (component,)) for component in COMPONENTS},
}
"""AutoAttack's version and components by suite name."""

NAMES = ("autoattack", "plus", "rand", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""The names that are registered here, for help texts, which read this file without importing it."""

_ABOUT = {
    "autoattack": "AutoAttack's standard version, which leaderboards rank by.",
    "plus": "AutoAttack's longer version.",
    "rand": "AutoAttack's version for models that are random at test time.",
}


_STEPS, _TARGETS, _QUERIES = 100, 9, 5000
_SEARCH = 4  # passes of FAB after its steps


def _register(name: str, version: str, components: tuple[str, ...]) -> None:
    def check(norm: str, eps: float) -> None:
        for component in components:
            Component(component, norm, eps, 0, version)

    def build(target: Target) -> Sequence[Suite]:
        classes = target.model_check.num_classes
        if not any(usable(component, classes) for component in components):
            raise ValueError(f"the attack {name!r} needs more than the model's {classes} classes; use another")
        stages = [_stage(Component(c, target.norm, target.eps, target.seed, version), classes) for c in components]
        kept = tuple(stage for stage in stages if usable(stage.name, classes))
        note = nonstandard(components, classes)
        return [Suite(name, kept, note=f"{name}: {note}" if note else "")]

    build.__doc__, build.__qualname__ = _ABOUT.get(name, f"AutoAttack's component {name} alone."), name
    register_suite(name, check=check, norms=tuple(AUTOATTACK_NORMS))(build)


def _stage(component: Component, classes: int) -> Stage:
    cost = _cost(component, classes)
    return Stage(component.name, repr(component), lambda m, x, y, _: component(m, x, y, classes), cost=cost)


def _cost(component: Component, classes: int) -> Cost:
    """By the steps, targets and restarts of each version, as the reference sets them (`_set_version`)."""
    name, several = component.name, component.version == "plus" or component.norm == "l1"
    if name == "square":
        return Cost(0, _QUERIES)
    if name == "apgd-t":
        return Cost(min(5 if component.norm == "l1" else _TARGETS, classes - 1) * (_STEPS + 1), 2)
    if name == "fab-t":
        targets = min(_TARGETS, classes - 1)
        return Cost(targets * _STEPS, targets * (_STEPS + _SEARCH))
    if name == "fab":  # by the gradients of all classes' logits
        restarts = 5 if several else 1
        return Cost(restarts * _STEPS * classes, restarts * (_STEPS + _SEARCH))
    draws = 20 if component.version == "rand" else 1
    return Cost((5 if several else 1) * (_STEPS + 1) * draws, 1)


for _name, (_version, _components) in AUTOATTACK_SUITES.items():
    _register(_name, _version, _components)
