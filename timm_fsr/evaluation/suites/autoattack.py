"""AutoAttack's versions, and each of its components alone."""

from __future__ import annotations

from collections.abc import Sequence

from timm_fsr.attacks.autoattack import AUTOATTACK_NORMS, COMPONENTS, VERSIONS, Component, nonstandard, usable
from timm_fsr.evaluation.registry import Stage, Suite, Target, register_suite

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
    return Stage(component.name, repr(component), lambda m, x, y, _: component(m, x, y, classes))


for _name, (_version, _components) in AUTOATTACK_SUITES.items():
    _register(_name, _version, _components)
