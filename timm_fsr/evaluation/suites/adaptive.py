"""Adaptive attacks: made for models with feature layers, whose own gradients may mislead (Tramer et al., 2020).

Each follows another gradient than the model's, or the model's averaged over noise, and keeps the iterate that the model
itself likes least. Their per-image worst case is what a robust accuracy has to survive (arXiv 2002.08347).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.autoattack import Component, implementation
from timm_fsr.attacks.base import LossFunction, anchored, input_gradient
from timm_fsr.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from timm_fsr.evaluation.model_checks import ModelCheck
from timm_fsr.evaluation.registry import Cost, Stage, StageFunction, Suite, Target, register_suite
from timm_fsr.hooks.placement import find_places
from timm_fsr.hooks.site import layer_groups
from timm_fsr.hooks.surrogates import feature_layers, list_surrogates, noisy, plain, surrogate
from timm_fsr.hooks.tape import record
from timm_fsr.models.pixel import base_model
from timm_fsr.models.weights import model_digest
from timm_fsr.utils.random import own_randomness

STEPS = 100
JOINT_WEIGHTS = (0.1, 1.0, 10.0)
"""Weights of the auxiliary losses relative to the main loss."""

_DRAWS = 10  # passes over which the attack averages the noise
_FLIP_WEIGHT = 10.0
_TARGETS = 9
_RESTARTS = 1  # of the targeted runs
_QUERIES = 5000  # of Square
_COST = Cost(STEPS + 1, STEPS + 1)  # of one Auto-PGD, with the model's judgement of every point

SteerFunction = Callable[[nn.Module, Tensor, Tensor], LossFunction]


def adaptive_stages(
    model: nn.Module,
    *,
    norm: str,
    eps: float,
    seed: int,
    model_check: ModelCheck,
    sources: Mapping[str, nn.Module] | None = None,
) -> tuple[Stage, ...]:
    """Every adaptive attack that applies to `model`, strongest gradients first and Square last.

    Args:
        model: a pixel-space model, with feature layers or without.
        norm: "linf" or "l2".
        eps: radius, in pixels of [0, 1].
        seed: of Square.
        model_check: of the model; it says whether there is noise to average over and how many classes there are.
        sources: pixel-space models by name, such as the same network without the layer, whose adversarial images are
            tried on `model`.

    Raises:
        ValueError: another norm, or a negative eps.
        ModuleNotFoundError: Square's implementation is not installed.
    """
    attack = APGD(norm=norm, eps=eps, steps=STEPS)
    classes = model_check.num_classes
    loss = dlr if classes >= 3 else margin  # scale-free where it is defined
    direct: dict[str, SteerFunction] = {
        "apgd-ce": lambda m, _, y: lambda x: cross_entropy(m(x), y),
        f"apgd-{loss.__name__}": lambda m, _, y: lambda x: loss(m(x), y),
    }
    stages = [
        _stage(name, f"{attack!r} on the loss {name.removeprefix('apgd-')}", partial(_steered, attack, steer))
        for name, steer in direct.items()
    ]
    stages.append(_targeted_stage(attack, classes))
    follow = direct[f"apgd-{loss.__name__}"]
    for name in list_surrogates(model):
        stages.append(
            _stage(name, f"{attack!r} by the gradient of the surrogate {name!r}", _through(name, attack, follow))
        )
    stages += _layer_stages(model, attack, loss, model_check)
    if model_check.random or feature_layers(model):
        detail = f"{attack!r} by the mean gradient of {_DRAWS} noisy passes"
        cost = Cost(_DRAWS * _COST.gradients, _COST.forwards)
        stages.append(Stage("eot", detail, _noisy(attack, follow), cost=cost))
    if paths := _paths(model):
        steer = partial(_to_features, paths)
        stages.append(
            _stage("latent", f"{attack!r} towards the features of another class", partial(_steered, attack, steer))
        )
    for name, source in (sources or {}).items():
        stages.append(transfer_stage(name, source, attack, loss))
    square = Component("square", norm, eps, seed)
    run = lambda m, x, y, _: square(m, x, y, classes)  # noqa: E731
    stages.append(Stage("square", repr(square), run, reuse=True, cost=Cost(0, _QUERIES)))
    return tuple(stages)


def transfer_stage(
    name: str, source: nn.Module, attack: APGD, loss: Callable[[Tensor, Tensor], Tensor] = margin
) -> Stage:
    """An attack by the gradients of another model, judged on the attacked one.

    Args:
        name: of the source, for the report.
        source: a pixel-space model; put into eval mode.
        attack: what follows the gradients.
        loss: of the source's logits (N, classes) and labels (N,).
    """
    source = source.eval()
    steer: SteerFunction = lambda _, __, y: lambda x: loss(source(x), y)  # noqa: E731
    detail = (
        f"{attack!r} by the gradient of {name} (digest {model_digest(source)[:8]})"  # other weights: other outcomes
    )
    return _stage(f"transfer from {name}", detail, partial(_steered, attack, steer))


def _check_adaptive(norm: str, eps: float) -> None:
    APGD(norm=norm, eps=eps)
    implementation()


@register_suite("adaptive", check=_check_adaptive)
def _adaptive(target: Target) -> Sequence[Suite]:
    """Every attack made for feature layers that applies to the model, and Square."""
    stages = adaptive_stages(
        target.model,
        norm=target.norm,
        eps=target.eps,
        seed=target.seed,
        model_check=target.model_check,
        sources=target.sources,
    )
    return [Suite("adaptive", stages)]


@register_suite("transfer", check=lambda norm, eps: APGD(norm=norm, eps=eps), needs_sources=True)
def _transfer(target: Target) -> Sequence[Suite]:
    """Images attacked on other models, which have to be named."""
    attack = APGD(norm=target.norm, eps=target.eps)
    stages = [transfer_stage(name, source, attack) for name, source in target.sources.items()]
    return [Suite(stage.name, (stage,), every_image=True) for stage in stages]


def _stage(name: str, detail: str, run: StageFunction) -> Stage:
    """A stage of one Auto-PGD, whose every point the model itself judges."""
    return Stage(name, detail, run, cost=_COST)


def _steered(
    attack: APGD,
    steer: SteerFunction,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> Tensor:
    """Follow the gradient of `steer`'s loss; the model itself, without surrogate or noise, judges each iterate."""

    def judge(candidate: Tensor) -> Tensor:
        with plain(model):
            return margin(model(candidate), labels)

    return attack(anchored(steer(model, images, labels)), images, generator=generator, judge=judge, start=start)


def _targeted_stage(attack: APGD, classes: int) -> Stage:
    """One run towards each of the strongest wrong classes, then more of them from the best point found so far."""
    count = min(_TARGETS, classes - 1)

    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        best, value = images.clone(), torch.full_like(images[:, 0, 0, 0], -torch.inf)
        left = torch.arange(len(images), device=images.device)
        for restart in range(1 + _RESTARTS):
            targets = _strongest_wrong_classes(model, best, labels)  # those at the best point, from the second round on
            for rank in range(count):
                if len(left) == 0:
                    return best
                steer = partial(_towards, targets=targets[left, rank], classes=classes)
                start = best[left] if restart else None
                found = _steered(attack, steer, model, images[left], labels[left], generator, start)
                with torch.no_grad():
                    logits = model(found)
                reached = margin(logits, labels[left])
                better = ~(reached <= value[left])  # NaN too: a point without a usable gradient has to be seen
                best[left[better]], value[left[better]] = found[better], reached[better]
                left = left[(logits.argmax(dim=1) == labels[left]) & ~reached.isnan()]
        return best

    detail = f"{attack!r} towards each of {count} wrong class(es), then {_RESTARTS} time(s) from the best point so far"
    rounds = 1 + _RESTARTS
    cost = Cost(rounds * count * _COST.gradients, rounds * (count * (_COST.forwards + 1) + 1))
    return Stage("apgd-targeted", detail, run, cost=cost)


@torch.no_grad()
def _strongest_wrong_classes(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N, classes), the wrong classes first by falling logit, the true one last."""
    return model(images).scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)


def _towards(model: nn.Module, _: Tensor, labels: Tensor, *, targets: Tensor, classes: int) -> LossFunction:
    if classes >= 4:
        return lambda x: targeted_dlr(model(x), labels, targets)

    def difference(x: Tensor) -> Tensor:
        logits = model(x)
        return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]

    return difference


def _through(name: str, attack: APGD, steer: SteerFunction) -> StageFunction:
    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        with surrogate(model, name):  # around the backward pass too: gradient checkpointing runs the layers again there
            return _steered(attack, steer, model, images, labels, generator)

    return run


def _layer_stages(
    model: nn.Module, attack: APGD, loss: Callable[[Tensor, Tensor], Tensor], model_check: ModelCheck
) -> list[Stage]:
    """Attacks on what the layers say: their auxiliary losses, and their masks."""
    stages = []
    for weight in JOINT_WEIGHTS if model_check.auxiliary else ():
        detail = f"{attack!r} on the main loss and {weight:g} times the auxiliary losses"
        run = partial(_steered, attack, partial(_joint, loss, weight))
        stages.append(_stage(f"joint {weight:g}", detail, run))
    if any("straight_through" in layer.surrogates for layer in feature_layers(model)):
        detail = f"{attack!r} on the main loss and {_FLIP_WEIGHT:g} times the mask's flips, straight-through"
        flipping = _through("straight_through", attack, partial(_flip_masks, loss))
        stages.append(_stage("mask forcing", detail, flipping))
    return stages


def _joint(
    loss: Callable[[Tensor, Tensor], Tensor], weight: float, model: nn.Module, _: Tensor, labels: Tensor
) -> LossFunction:
    def steer(x: Tensor) -> Tensor:
        with record(model, labels) as tape:
            logits = model(x)
        auxiliary = list(tape.losses(logits, labels).values())
        total = loss(logits, labels).sum()
        return total + weight * len(x) * torch.stack(auxiliary).sum()  # the terms are means over the images

    return steer


def _flip_masks(
    loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, images: Tensor, labels: Tensor
) -> LossFunction:
    with torch.no_grad():
        before = _masks(model, images)[1]

    def steer(x: Tensor) -> Tensor:
        logits, masks = _masks(model, x)
        flips = sum(
            # Signed, not |mask - old|: that has no gradient where nothing has moved, or the wrong one.
            torch.where(old > 0.5, -mask, mask).flatten(1).mean(dim=1)
            for mask, old in zip(masks, before, strict=True)
        )
        return loss(logits, labels) + _FLIP_WEIGHT * flips

    return steer


def _masks(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    with record(model) as tape:
        logits = model(images)
    return logits, [tape[name].mask for name in tape if hasattr(tape[name], "mask")]


def _noisy(attack: APGD, steer: SteerFunction) -> StageFunction:
    def run(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        with noisy(model), own_randomness(images.device):  # the layers draw from the default generator
            torch.manual_seed(seed)
            return _steered(attack, lambda *given: mean_gradient(steer(*given)), model, images, labels, generator)

    return run


def mean_gradient(loss_fn: LossFunction, draws: int = _DRAWS) -> LossFunction:
    """A linear function with the mean gradient of several passes of `loss_fn`, one in memory at a time.

    Its value (N,) means nothing; only its gradient does (expectation over transformation, arXiv 1707.07397).
    """

    def linear(x: Tensor) -> Tensor:
        gradient = torch.stack([input_gradient(anchored(loss_fn), x) for _ in range(draws)]).mean(dim=0)
        return (x * gradient).flatten(1).sum(dim=1)

    return linear


def _to_features(paths: list[str], model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
    """Features like those of another image (Sabour et al., 2016, arXiv 1511.05122).

    Towards the nearest of another class in the batch, or away from the own ones where there is no other class.
    """
    with torch.no_grad():
        own = _features(model, paths, images)
    distance = torch.cdist(own, own).masked_fill(labels[:, None] == labels[None, :], torch.inf)
    nearest, guide = distance.min(dim=1)
    alone = nearest.isinf()
    goal = torch.where(alone[:, None], own, own[guide])
    scale = own.norm(dim=1).square().clamp_min(1e-12)

    def steer(x: Tensor) -> Tensor:
        moved = (_features(model, paths, x) - goal).square().sum(dim=1) / scale
        return torch.where(alone, moved, -moved)

    return steer


def _features(model: nn.Module, paths: list[str], images: Tensor) -> Tensor:
    """What the modules at `paths` of the timm model inside give out, (N, features) side by side."""
    with _captured(base_model(model), paths) as found:
        model(images)
    return torch.cat([found[path].flatten(1) for path in paths], dim=1)


@contextmanager
def _captured(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules at `paths`, after their sites, by path."""
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for path in paths:
            keep = partial(_keep, found, path)
            handles.append(model.get_submodule(path).register_forward_hook(keep))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[str, Tensor], path: str, _: nn.Module, __: object, output: Tensor) -> None:
    found[path] = output


def _paths(model: nn.Module) -> list[str]:
    """Where the sites sit, or where a site would sit in a model that has none; [] if that cannot be told."""
    paths = [site.path for group in layer_groups(model) for site in group.sites]
    if paths:
        return list(dict.fromkeys(paths))
    try:
        return [place.path for place in find_places(base_model(model), None, (-1,))[0]]
    except (ValueError, AttributeError, TypeError):  # no timm model
        return []
