"""What an attack is: the contract, the loss it is handed, and the mode a model is attacked in."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from timm_fsr.attacks.losses import cross_entropy
from timm_fsr.utils.errors import check_images
from timm_fsr.utils.overrides import overridden
from timm_fsr.utils.registry import RegistrationError, Registry


class Judged(NamedTuple):
    """What a loss function may return in the place of the loss, so that no attack trades a success for a higher loss.

    Attributes:
        loss: (N,), to be maximised.
        fooled: (N,) bool: is the image misclassified? By the logits of the same pass, so it costs nothing.
    """

    loss: Tensor
    fooled: Tensor


LossFunction = Callable[[Tensor], Tensor | Judged]
ImageLoss = Callable[[Tensor, Tensor], Tensor]
"""A loss (N,) of logits (N, classes) and labels (N,)."""

NORMS = ("linf", "l2")


def check_eps(norm: str, eps: float) -> None:
    """Refuse what is no radius in pixels of [0, 1].

    Raises:
        ValueError: a negative or infinite radius, or one in pixels of [0, 255].
    """
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} must be 0 or more: it is a radius in pixels of [0, 1], such as 8/255")
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps={eps:g} is more than pixels in [0, 1] can change by; eps is in these units: write {eps:g}/255"
        )


class Kept:
    """Of each image the best of several attacked ones: a misclassified one before others, then that of highest loss.

    Where a gradient or a loss was NaN, what is kept is NaN too: a better one must not hide that no attack can climb.

    Args:
        attacked: (N, C, H, W), the first ones.
        found: what the loss function has returned for them.
        ties: a later one of equal loss wins.
    """

    def __init__(self, attacked: Tensor, found: Judged, *, ties: bool = False) -> None:
        self.attacked, self.found, self.ties = attacked, found, ties
        self.broken = found.loss.isnan()

    def update(self, attacked: Tensor, found: Judged) -> None:
        """Keep the better of each image."""
        loss, fooled = self.found
        higher = found.loss >= loss if self.ties else found.loss > loss
        better = torch.where(found.fooled == fooled, higher, found.fooled)
        self.attacked = torch.where(better.view(-1, 1, 1, 1), attacked, self.attacked)
        self.found = Judged(torch.where(better, found.loss, loss), fooled | found.fooled)
        self.broken |= found.loss.isnan()

    def result(self) -> Tensor:
        """(N, C, H, W), what is kept of each image."""
        return self.attacked.masked_fill(self.broken.view(-1, 1, 1, 1), torch.nan)


class Attack(Protocol):
    """Anything that turns images (N, C, H, W) in [0, 1] into adversarial ones, given a loss to maximise.

    A registered attack is a frozen dataclass, which is its own configuration and its label in reports. It has a class
    attribute `name`; recipes and evaluations give it the fields `norm`, `eps`, `steps`, `step_size`, `restarts`,
    `random_start` and `start_noise` as far as it has them, and recipes the others by `attack.args`.
    """

    @property
    def eps(self) -> float:
        """Radius of the ball, in pixels of [0, 1]."""

    def __call__(self, loss_fn: LossFunction, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images of the same shape, in [0, 1] and within eps of `images`."""

    def with_eps(self, eps: float) -> Attack:
        """The same attack in another ball."""


class OnModels:
    """What lets an attack be called on a model, as other libraries do; `register_attack` gives it to each attack."""

    @staticmethod
    def model_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """What `attack` maximises, (N,), of logits (N, classes) and labels (N,)."""
        return cross_entropy(logits, labels)

    def attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Attack `images` by the loss of `model`, which is in eval mode meanwhile and is left as it was.

        Args:
            model: from images in [0, 1] to logits (N, classes), such as `timm_fsr.PixelModel(model)`.
            images: (N, C, H, W) in [0, 1]; moved to the model's device.
            labels: (N,) true classes.
            generator: of what is random in the attack, on the model's device; torch's default one when left out.

        Returns:
            Adversarial images of the same shape, on the model's device.

        Raises:
            ValueError: a timm model that expects normalised images, images out of [0, 1], or labels that do not fit.
        """
        _check_takes_pixels(model)
        check_images(images, labels)
        device = next((parameter.device for parameter in model.parameters()), images.device)
        images, labels = images.to(device), labels.to(device)
        run: Any = self
        with attack_mode(model):
            found: Tensor = run(judged_loss(model, type(self).model_loss, labels), images, generator=generator)
        return found


def _check_takes_pixels(model: nn.Module) -> None:
    """Refuse a bare timm model that wants normalised images: a radius in pixels would mean something else there."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return
    mean, std = config.get("mean") or (0.0,), config.get("std") or (1.0,)
    if any(value != 0 for value in mean) or any(value != 1 for value in std):
        raise ValueError(
            f"{type(model).__name__} expects images normalised by mean {tuple(mean)} and std {tuple(std)}, but attacks "
            "work on pixels in [0, 1]; give timm_fsr.PixelModel(model), which normalises them inside"
        )


AttackClass = TypeVar("AttackClass", bound=type[Attack])

ATTACKS: Registry[type[Attack]] = Registry("attack", package="timm_fsr.attacks", group="timm_fsr.attacks")
"""Every single attack by its name; evaluations know suites of several besides."""


def register_attack(attack: AttackClass) -> AttackClass:
    """Class decorator that makes an attack known by its `name`, to train with and to evaluate with.

    An attack with `steps` is evaluated under its name and their number ("walk20"), with `restarts` also "walk20x5". One
    that leaves the ball has a class attribute `only_trains = True` and is not evaluated with.

    Raises:
        ValueError: the name is missing, no identifier, ends like a number of steps, or is taken; or the class is no
            dataclass with `eps`, `with_eps` and a default for every field.
    """
    problem = _attack_problem(attack)
    if problem:
        raise RegistrationError(f"the attack {attack.__qualname__} {problem}")
    if not hasattr(attack, "attack"):
        for name in ("attack", "model_loss"):
            setattr(attack, name, OnModels.__dict__[name])
    ATTACKS.add(getattr(attack, "name", ""), attack)
    attack.__call__ = _with_two_arguments(attack.__call__)  # type: ignore[method-assign]
    return attack


def _with_two_arguments(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The `__call__` of an attack, which explains itself to who gives it a model, images and labels."""

    @functools.wraps(call)
    def explained(self: Attack, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) > 2:
            raise ValueError(
                f"an attack is called as attack(loss_fn, images), but {type(self).__name__} was given {len(args)} "
                "arguments; for a model that takes pixels write attack.attack(model, images, labels), or put model and "
                "labels into the loss: attack(lambda x: F.cross_entropy(model(x), labels, reduction='none'), images)"
            )
        return call(self, *args, **kwargs)

    return explained


def _attack_problem(attack: type) -> str:
    """What keeps a class from being an attack, and the remedy; "" if nothing does."""
    if not dataclasses.is_dataclass(attack):
        return "is no dataclass; put @dataclass(frozen=True, kw_only=True) under @register_attack"
    fields = {field.name: field for field in dataclasses.fields(attack) if field.init}
    if "eps" not in fields:
        return "has no field `eps`, so no threat model could bind it; add eps: float = 8 / 255 and stay within it"
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            return f"has no default for {field.name!r}; give every field one"
    if not callable(getattr(attack, "with_eps", None)) or "__call__" not in dir(attack):
        return "needs the methods __call__(loss_fn, images, *, generator=None) and with_eps(eps)"
    if re.search(r"[0-9]$", str(getattr(attack, "name", ""))):
        return f"is called {attack.name!r}, but a number at the end is that of its steps; give it another name"  # type: ignore[attr-defined]
    return ""


def attack_fields(attack: type[Attack]) -> dict[str, Any]:
    """The keyword arguments of an attack with their defaults (MISSING where there is none)."""
    fields = dataclasses.fields(attack)  # type: ignore[arg-type]  # a registered attack is a dataclass
    return {field.name: field.default for field in fields if field.init}


def is_one_step(attack: Attack) -> bool:
    """Whether an attack takes a single gradient step, so that training by it may overfit catastrophically."""
    return getattr(attack, "steps", 1) == 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode (running BN statistics, no noise, no dropout); training flags are restored one by one at the end.

    The model itself is changed, so that no other thread can train it meanwhile. Blocks of several threads get on, and
    may end in any order: the flags come back with the last.

    Raises:
        RuntimeError: another thread wants modules of the model in training mode, as `noisy` does.
    """
    with overridden(((module, "training", False) for module in model.modules()), by=model.eval):
        yield model


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode (running BN statistics, no noise, no dropout) and frozen parameters while an attack runs.

    Training flags and `requires_grad` are restored one by one at the end, also after an exception. For threads the same
    holds as for `eval_mode`.
    """
    with overridden((parameter, "requires_grad", False) for parameter in model.parameters()), eval_mode(model):
        yield model


def input_gradient(loss_fn: LossFunction, images: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to `images`, also inside `torch.no_grad`; nothing else is touched."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = loss_of(loss_fn(images))
        if loss.shape not in ((), images.shape[:1]):
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)} for {len(images)} images; "
                "return one loss per image (N,) or their sum"
            )
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the images; loss_fn must call the model on its argument")
        (gradient,) = torch.autograd.grad(loss.sum(), images)
    return gradient


def anchored(loss_fn: LossFunction) -> LossFunction:
    """The same loss, but with a gradient of zero where it does not depend on the images, instead of an error.

    A model that cuts its gradient off has to be attacked all the same.
    """

    def loss(images: Tensor) -> Tensor | Judged:
        found, nothing = loss_fn(images), 0 * images.sum()
        return Judged(found.loss + nothing, found.fooled) if isinstance(found, Judged) else found + nothing

    return loss


def judged_loss(model: Callable[[Tensor], Tensor], loss: ImageLoss, labels: Tensor) -> LossFunction:
    """What an attack on `model` maximises: `loss` of logits (N, classes) and labels (N,), judged and anchored."""

    def judged(images: Tensor) -> Judged:
        logits = model(images)
        return Judged(loss(logits, labels), logits.detach().argmax(dim=1) != labels)

    return anchored(judged)


def loss_of(found: Tensor | Judged) -> Tensor:
    """The loss alone of what a loss function has returned."""
    return found.loss if isinstance(found, Judged) else found


def random_in_ball(like: Tensor, norm: str, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random point of the ball of radius eps, for each image of the shape of `like` (N, C, H, W)."""
    if norm == "linf":
        return torch.empty_like(like).uniform_(-eps, eps, generator=generator)
    direction = torch.empty_like(like).normal_(generator=generator)
    uniform = torch.empty(len(like), 1, 1, 1, device=like.device, dtype=like.dtype).uniform_(generator=generator)
    radius = eps * uniform ** (1 / like[0].numel())
    return direction * (radius / l2_norms(direction).clamp_min(torch.finfo(like.dtype).tiny))


def in_proportion(step_size: float | None, eps: float, old_eps: float) -> float | None:
    """The step size that goes with `eps` as `step_size` went with `old_eps`; None is the attack's own."""
    if step_size is None or not old_eps:
        return step_size
    return step_size * eps / old_eps or None


def ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The unit step that raises the loss most: the sign in Linf, the normalised gradient in L2."""
    if norm == "linf":
        return torch.where(gradient.isnan(), gradient, gradient.sign())  # sign(NaN) is 0, which would hide a fault
    return gradient / l2_norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def l2_norms(tensor: Tensor) -> Tensor:
    """Length (N, 1, 1, 1) of each image's vector."""
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
