"""Attack suites by name, from "fgsm" to "autoattack" and "adaptive"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import ATTACKS, NORMS, Attack, ImageLoss, attack_fields, check_eps, judged_loss
from timm_fsr.attacks.losses import cross_entropy
from timm_fsr.evaluation.foreign_attacks import (
    AttackFunction,
    attack_name,
    check_attack_function,
    described,
    run_attack,
)
from timm_fsr.evaluation.model_checks import ModelCheck
from timm_fsr.evaluation.names import ALIASES, spelled
from timm_fsr.reports.report import WORST_CASE
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.registry import RegistrationError, Registry

StageFunction = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]

_NUMBERED = re.compile(r"(.*?[^0-9])([1-9]\d*)(?:x([1-9]\d*))?")


@dataclass(frozen=True)
class Cost:
    """What an attack asks of a model for each image, at most: an image that is broken early costs less.

    Attributes:
        gradients: passes forward and back to the image.
        forwards: passes without a gradient.
    """

    gradients: float
    forwards: float = 0

    @classmethod
    def of(cls, attack: Attack) -> Cost:
        """That of a single attack, by its steps and restarts."""
        steps, restarts = getattr(attack, "steps", 1), getattr(attack, "restarts", 1)
        return cls(steps * restarts, restarts if restarts > 1 else 0)

    @property
    def passes(self) -> float:
        """The same in forward passes, a pass back counted as one."""
        return 2 * self.gradients + self.forwards


@dataclass(frozen=True)
class Stage:
    """One attack on a model.

    Attributes:
        name: short, unique within its suite.
        detail: what it does and with which parameters, for the report.
        run: maps (pixel-space model in eval mode with frozen parameters, images (N, C, H, W) in [0, 1], labels (N,),
            generator on the images' device) to adversarial images of the same shape, in [0, 1] and in the ball.
        reuse: take over what the same attack, by name and detail, has done to an image in a suite before this one,
            instead of repeating it.
        cost: what it asks of the model for each image, at most; None: unknown.
    """

    name: str
    detail: str
    run: StageFunction
    reuse: bool = False
    cost: Cost | None = None


@dataclass(frozen=True)
class Suite:
    """What a report calls an attack: one stage, or several of which each attacks what those before it left.

    Attributes:
        name: as the user gives it, such as "pgd20" or "autoattack".
        stages: in their order.
        every_image: attack also images that are wrong already, as papers count single attacks; else only those that
            are classified correctly so far.
        note: a caveat for the reader, or "".
    """

    name: str
    stages: tuple[Stage, ...]
    every_image: bool = False
    note: str = ""

    @property
    def detail(self) -> str:
        """Every stage written out."""
        if len(self.stages) == 1:
            return self.stages[0].detail
        return "; ".join(f"{stage.name}: {stage.detail}" for stage in self.stages)

    @classmethod
    def from_callable(
        cls, name: str, attack: AttackFunction, *, detail: str = "", every_image: bool = False, note: str = ""
    ) -> Suite:
        """A suite of one attack that any other library makes, such as foolbox, ART, torchattacks or SecML-Torch.

        Args:
            name: for the report: letters, digits, ".", "+", "-" and "_", and no name of an attack of this package.
            attack: maps (model, images, labels) to attacked images, as a tensor or a NumPy array. The model takes
                pixels in [0, 1] and is in eval mode with frozen parameters. What lies outside of [0, 1] by rounding is
                clipped. Every image is then measured, and one that leaves [0, 1] or the ball is refused.
            detail: what it does and with which parameters, for the report. A folder that knows outcomes of it knows it
                by its name and this; without it, by its code and the values that it uses.
            every_image: attack also images that are wrong already.
            note: a caveat for the reader, or "".

        Raises:
            ValueError: a name or an attack that cannot be one.
        """
        _check_free(name)
        check_attack_function(name, attack)

        def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return run_attack(name, attack, model, images, labels, generator)

        stage = Stage(name, detail or described(attack), run)
        return cls(name, (stage,), every_image=every_image, note=note)


@dataclass(frozen=True)
class Target:
    """The model and the threat model that suites are built for.

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


@dataclass(frozen=True)
class SuiteEntry:
    """A registered suite.

    Attributes:
        build: makes the suites that a name stands for, given the target and, for a numbered name such as "cw30", its
            number of steps.
        check: refuses a norm, an eps (given in this order) or a missing package before anything is loaded.
        numbered: the name is followed by a number of steps.
        needs_sources: it transfers attacks from other models, of which there has to be one.
        norms: of the balls that it knows.
        about: one line for help texts.
    """

    build: Callable[..., Sequence[Suite]]
    check: Callable[..., object]
    numbered: bool = False
    needs_sources: bool = False
    norms: tuple[str, ...] = NORMS
    about: str = ""


SUITES: Registry[SuiteEntry] = Registry(
    "attack", package="timm_fsr.evaluation.suites", group="timm_fsr.suites", dashes=True
)
"""Suites: attacks of several stages, on another loss, or that need to know the model."""

OFFICIAL = ALIASES["official"]
ENSEMBLE = "official-ensemble"


def register_suite(
    name: str,
    *,
    check: Callable[..., object],
    numbered: bool = False,
    needs_sources: bool = False,
    norms: tuple[str, ...] = NORMS,
) -> Callable[[Callable[..., Sequence[Suite]]], Callable[..., Sequence[Suite]]]:
    """Decorator that makes a function known as the builder of the suite `name`; its docstring's first line is its help.

    Args:
        name: as in `evaluate(attacks=[name])`.
        check: refuses a norm, an eps (given in this order) or a missing package before anything is loaded.
        numbered: the name is followed by a number of steps, which `build` gets after the target.
        needs_sources: it transfers attacks from other models, of which there has to be one.
        norms: the balls that it supports.

    Raises:
        ValueError: the name is taken by another function.
    """

    def decorate(build: Callable[..., Sequence[Suite]]) -> Callable[..., Sequence[Suite]]:
        about = (build.__doc__ or "").strip().partition("\n")[0]
        SUITES.add(name, SuiteEntry(build, check, numbered, needs_sources, norms, about), definition=build)
        return build

    return decorate


def expand_names(names: Sequence[str]) -> list[str]:
    """The suites that `names` stand for, each once: "standard" is "autoattack", "official" is four attacks.

    Raises:
        ValueError: a string where a list belongs.
    """
    if isinstance(names, str):
        raise ValueError(f"attacks={names!r} is one name where a list belongs; use [{names!r}]")
    return list(dict.fromkeys(known for name in names for known in ALIASES.get(name, (name,))))


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
        entry, steps = _find(name)
        if entry is None:
            build_attack(name, norm, eps)
            continue
        if norm not in entry.norms:
            _refuse_norm(name, norm)
        entry.check(norm, eps, *steps)
        if entry.needs_sources and not sources:
            raise ValueError(f"the attack {name!r} needs other models to transfer from; name some")


def build_suites(names: Sequence[str], target: Target) -> list[Suite]:
    """The suites called `names`, which `check_names` has seen, against `target`; "transfer" gives one for each source.

    Raises:
        ValueError: an attack does not fit the model's number of classes.
    """
    suites: list[Suite] = []
    for name in expand_names(names):
        entry, steps = _find(name)
        if entry is None:
            suites.append(single(name, build_attack(name, target.norm, target.eps)))
        else:
            suites += entry.build(target, *steps)
    return suites


def as_suites(attacks: Sequence[str | Suite | AttackFunction]) -> list[str | Suite]:
    """The attacks of an evaluation: names, and suites in the place of functions.

    Raises:
        ValueError: a string where a list belongs, a function that cannot be an attack, or two attacks of one name.
    """
    if isinstance(attacks, str):
        raise ValueError(f"attacks={attacks!r} is one name where a list belongs; use [{attacks!r}]")
    found = [
        attack if isinstance(attack, (str, Suite)) else Suite.from_callable(attack_name(attack), attack)
        for attack in attacks
    ]
    details: dict[str, str | None] = dict.fromkeys(expand_names([name for name in found if isinstance(name, str)]))
    for suite in found:
        if isinstance(suite, Suite) and details.setdefault(suite.name, suite.detail) != suite.detail:
            raise ValueError(
                f"two different attacks are called {suite.name!r}, and a report has one figure for a name; rename one"
            )
    return found


def single(name: str, attack: Attack, loss: ImageLoss = cross_entropy) -> Suite:
    """A suite of one attack that maximises `loss`, and attacks every image as papers count it."""
    detail = repr(attack) if loss is cross_entropy else f"{attack!r} on the loss {loss.__name__}"

    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return attack(judged_loss(model, loss, labels), images, generator=generator)

    return Suite(name, (Stage(name, detail, run, cost=Cost.of(attack)),), every_image=True)


def build_attack(name: str, norm: str, eps: float) -> Attack:
    """The registered attack called `name`: "fgsm", "pgd20" (its steps), "pgd20x5" (and restarts).

    Raises:
        ValueError: an unknown name (the message names the nearest), or a norm that the attack does not have.
    """
    base, steps, restarts = _split(name)
    given = {"steps": steps, "restarts": restarts}
    cls = ATTACKS[base] if base in ATTACKS and not getattr(ATTACKS[base], "only_trains", False) else None
    known = attack_fields(cls) if cls else {}
    wrong = [key for key, value in given.items() if value is not None and key not in known]
    if cls is None or wrong or (steps is None and "steps" in known):
        raise ValueError(unknown("attack", name, list_attacks()))
    if norm not in (NORMS if "norm" in known else NORMS[:1]):
        _refuse_norm(name, norm)
    values = {"norm": norm, "eps": eps, **{key: value for key, value in given.items() if value is not None}}
    return cls(**{key: value for key, value in values.items() if key in known})


def list_attacks() -> list[str]:
    """Names that evaluations take, those of installed plug-ins among them; numbers in them are examples."""
    judging = [name for name in ATTACKS.names() if not getattr(ATTACKS[name], "only_trains", False)]
    attacks = {name: "steps" in attack_fields(ATTACKS[name]) for name in judging}
    return spelled(attacks, {name: SUITES[name].numbered for name in SUITES.names()})


def _refuse_norm(name: str, norm: str) -> NoReturn:
    if norm == "l1":
        raise ValueError(f"{name!r} has no L1 ball; use AutoAttack ('standard') with norm='l1', or linf or l2")
    if norm in NORMS:
        raise ValueError(f"{name!r} supports the linf ball only, not norm={norm!r}; leave it out, or evaluate in linf")
    raise ValueError(f"norm={norm!r} is unknown; use 'linf', 'l2', or 'l1' for AutoAttack alone")


def _find(name: str) -> tuple[SuiteEntry | None, tuple[int, ...]]:
    """The registered suite called `name` with its number of steps, if it has one; None if it is a single attack."""
    if name in SUITES:
        entry = SUITES[name]
        return (None, ()) if entry.numbered else (entry, ())
    base, steps, restarts = _split(name)
    if steps is not None and restarts is None and base in SUITES and SUITES[base].numbered:
        return SUITES[base], (steps,)
    return None, ()


def _check_free(name: str) -> None:
    """Refuse a name for an attack of the user's that a report cannot show, or that stands for one of this package.

    Raises:
        ValueError: see above.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(
            f"{name!r} cannot name an attack; use letters, digits, '.', '+', '-' and '_', such as 'fb-pgd20'"
        )
    base, _, _ = _split(name)
    ours = any(base in family and family.origin(base) is None for family in (ATTACKS, SUITES))
    if ours or name in ALIASES or name in (ENSEMBLE, WORST_CASE, "clean"):
        raise ValueError(f"{name!r} means something else in a report; choose another name, such as 'my-{name}'")


def _refuse_clash(name: str) -> None:
    """Refuse a name that `evaluate` could take for something else.

    Raises:
        ValueError: it names an attack and a suite, a suite stands for it, or it reads as an attack's number of steps.
    """
    attacks, suites = ATTACKS.own_names(), SUITES.own_names()
    base, steps, _ = _split(name) if name not in attacks else (name, None, None)
    numbered = steps is not None and (base in attacks or (base in suites and SUITES[base].numbered))
    if name in ALIASES or numbered or (name in attacks and name in suites):
        raise RegistrationError(f"{name!r} already means something in evaluate(attacks=...); choose another name")


def _split(name: str) -> tuple[str, int | None, int | None]:
    """The attack's name, steps and restarts: ("pgd", 20, 5) of "pgd20x5"; a registered name is taken as it is."""
    found = None if name in ATTACKS else _NUMBERED.fullmatch(name)
    if found is None:
        return name, None, None
    return found[1], int(found[2]), int(found[3]) if found[3] else None


ATTACKS.own_names()  # all of them first: the observer looks names up, and must meet no module that is half imported
ATTACKS.observe(_refuse_clash, past=True)
SUITES.observe(_refuse_clash)
