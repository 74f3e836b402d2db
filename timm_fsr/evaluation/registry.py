"""Attack suites by name, from "fgsm" to "autoattack" and "adaptive"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.autoattack import COMPONENTS, VERSIONS, Component, implementation, nonstandard, usable
from timm_fsr.attacks.autoattack import NORMS as AUTOATTACK_NORMS
from timm_fsr.attacks.base import Attack, check_eps, judged_loss
from timm_fsr.attacks.losses import carlini_wagner, cross_entropy
from timm_fsr.attacks.pgd import FGSM, PGD
from timm_fsr.evaluation.adaptive import adaptive_stages, transfer_stage
from timm_fsr.evaluation.model_checks import ModelCheck
from timm_fsr.evaluation.stages import Stage, Suite
from timm_fsr.reports.comparison import STRONG_ATTACKS
from timm_fsr.utils.errors import unknown

ALIASES = {"standard": "autoattack"}
OFFICIAL = ("official-fgsm", "official-pgd20", "official-pgd100", "official-cw30")
ENSEMBLE = "official-ensemble"

_EXAMPLES = [
    "fgsm",
    "pgd20",
    "pgd100x5",
    "apgd100",
    "cw30",
    "official",
    "transfer",
    *COMPONENTS,
    "standard",
    *STRONG_ATTACKS,
]
_NUMBERED = re.compile(r"(official-)?(pgd|cw|apgd)([1-9]\d*)(?:x([1-9]\d*))?")

ImageLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What suites are built for.

    Attributes:
        model: in pixel space.
        norm: "linf", "l2", or "l1" for AutoAttack alone.
        eps: radius, in pixels of [0, 1].
        seed: of AutoAttack's random numbers.
        model_check: what a look at the model found.
        sources: pixel-space models by name, for attacks that are transferred.
    """

    model: nn.Module
    norm: str
    eps: float
    seed: int
    model_check: ModelCheck
    sources: Mapping[str, nn.Module] = field(default_factory=dict)


def expand_names(names: Sequence[str]) -> list[str]:
    """The suites that `names` stand for, each once: "standard" is "autoattack", "official" is four attacks.

    Raises:
        ValueError: a string where a list belongs.
    """
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is one name where a list belongs; use [{names!r}]")
    expanded: list[str] = []
    for name in names:
        expanded += OFFICIAL if name == "official" else [ALIASES.get(name, name)]
    return list(dict.fromkeys(expanded))


def check_names(names: Sequence[str], norm: str, eps: float, *, sources: bool = True) -> None:
    """Refuse what cannot be attacked with, before anything is loaded.

    Args:
        names: as given by the user.
        norm: of the threat model.
        eps: its radius.
        sources: whether there are models to transfer attacks from.

    Raises:
        ValueError: an unknown name (the message names the nearest), or a norm or eps that it does not have.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    check_eps(norm, eps)
    for name in expand_names(names):
        if name in AUTOATTACK_SUITES:
            for component in AUTOATTACK_SUITES[name][1]:
                Component(component, norm, eps, 0)
        elif name in ("adaptive", "transfer"):
            APGD(norm=norm, eps=eps)
            if name == "adaptive":
                implementation()
            elif not sources:
                raise ValueError("the attack 'transfer' needs other models to transfer from; name some")
        else:
            _plain(name, norm, eps)


def build_suites(names: Sequence[str], target: Target) -> list[Suite]:
    """The suites called `names`, which `check_names` has seen, against `target`; "transfer" gives one for each source.

    Raises:
        ValueError: an attack does not fit the model's number of classes.
    """
    suites: list[Suite] = []
    for name in expand_names(names):
        if name in AUTOATTACK_SUITES:
            suites.append(_autoattack(name, target))
        elif name == "adaptive":
            suites.append(Suite(name, _adaptive(target)))
        elif name == "transfer":
            attack = APGD(norm=target.norm, eps=target.eps)
            stages = [transfer_stage(key, source, attack) for key, source in target.sources.items()]
            suites += [Suite(stage.name, (stage,), every_image=True) for stage in stages]
        else:
            attack_, loss, detail = _plain(name, target.norm, target.eps)
            suites.append(Suite(name, (Stage(name, detail, _run(attack_, loss)),), every_image=True))
    return suites


AUTOATTACK_SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "autoattack": ("standard", VERSIONS["standard"]),
    **{version: (version, VERSIONS[version]) for version in ("plus", "rand")},
    **{component: ("standard", (component,)) for component in COMPONENTS},
}
"""AutoAttack's version and components by suite name."""


def _plain(name: str, norm: str, eps: float) -> tuple[Attack, ImageLoss, str]:
    """A single attack, its loss, and both written out."""
    if norm == "l1" and norm in AUTOATTACK_NORMS:
        raise ValueError(f"{name!r} has no L1 ball; use AutoAttack ('standard') with norm='l1', or linf or l2")
    if name in ("fgsm", "official-fgsm"):
        return _described(FGSM(norm=norm, eps=eps), cross_entropy)
    found = _NUMBERED.fullmatch(name)
    if found is None or (found[1] and name not in OFFICIAL) or (found[4] and found[2] == "cw"):
        raise ValueError(unknown("attack", name, _EXAMPLES))
    kind, steps, restarts = found[2], int(found[3]), int(found[4] or 1)
    if kind == "apgd":
        return _described(APGD(norm=norm, eps=eps, steps=steps, restarts=restarts), cross_entropy)
    if found[1] or kind == "cw":  # as the official FSR code tests
        attack = PGD(norm=norm, eps=eps, steps=steps, step_size=0.1 * eps or None, random_start=False)
        return _described(attack, carlini_wagner if kind == "cw" else cross_entropy)
    return _described(PGD(norm=norm, eps=eps, steps=steps, restarts=restarts), cross_entropy)


def _described(attack: Attack, loss: ImageLoss) -> tuple[Attack, ImageLoss, str]:
    return attack, loss, repr(attack) if loss is cross_entropy else f"{attack!r} on the loss {loss.__name__}"


def _run(attack: Attack, loss: ImageLoss) -> Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]:
    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return attack(judged_loss(model, loss, labels), images, generator=generator)

    return run


def _autoattack(name: str, target: Target) -> Suite:
    version, components = AUTOATTACK_SUITES[name]
    classes = target.model_check.num_classes
    if not any(usable(component, classes) for component in components):
        raise ValueError(f"the attack {name!r} needs more than the model's {classes} classes; use another")
    stages = [_component(Component(c, target.norm, target.eps, target.seed, version), classes) for c in components]
    kept = tuple(stage for stage in stages if usable(stage.name, classes))
    note = nonstandard(components, classes)
    return Suite(name, kept, note=f"{name}: {note}" if note else "")


def _component(component: Component, classes: int) -> Stage:
    return Stage(component.name, repr(component), lambda m, x, y, _: component(m, x, y, classes))


def _adaptive(target: Target) -> tuple[Stage, ...]:
    return adaptive_stages(
        target.model,
        norm=target.norm,
        eps=target.eps,
        seed=target.seed,
        model_check=target.model_check,
        sources=target.sources,
    )
