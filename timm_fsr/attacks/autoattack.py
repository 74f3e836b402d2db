"""AutoAttack (Croce and Hein, 2020, arXiv 2003.01690) by its reference implementation, one component at a time."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_fsr.utils.random import own_randomness

AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The attacks of each version, in their order."""

COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_PACKAGES = ("pyautoattack", "autoattack")  # the second is the original, which is not on PyPI; equal bit for bit
_NEEDED_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the difference-of-logits-ratio losses take the third, fourth logit


@dataclass(frozen=True)
class Component:
    """One attack of AutoAttack, with the parameters that it has in one of AutoAttack's versions.

    Run on a batch it gives, bit for bit, what the reference implementation with the same `seed` gives on that batch,
    but it leaves torch's random state as it was, and nothing of the reference's state outlives the call.

    Attributes:
        name: "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t" or "square".
        norm: "linf", "l2" or "l1".
        eps: radius, in pixels of [0, 1].
        seed: of its random numbers.
        version: "standard", "plus" or "rand", which decides on restarts and on averaging over noise (20 passes).

    Raises:
        ValueError: an unknown name, norm or version.
        ModuleNotFoundError: no implementation is installed.
    """

    name: str
    norm: str
    eps: float
    seed: int
    version: str = "standard"

    def __post_init__(self) -> None:
        for value, known in ((self.name, COMPONENTS), (self.norm, AUTOATTACK_NORMS), (self.version, VERSIONS)):
            if value not in known:
                raise ValueError(f"{value!r} is not part of AutoAttack; use one of {', '.join(known)}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps} must be 0 or more: it is a radius in pixels of [0, 1], such as 8/255")
        implementation()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Attack `images`.

        Args:
            model: from pixels to logits, in eval mode, its parameters frozen.
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) true classes.
            num_classes: of the model; targeted attacks try at most `num_classes - 1` targets.

        Returns:
            (N, C, H, W): an adversarial image where one was found, else the image itself or any point of the ball.

        Raises:
            ValueError: too few classes for this attack's loss (see `usable`), or a gradient that is not finite.
        """
        if not usable(self.name, num_classes):
            raise ValueError(
                f"{self.name} needs {_NEEDED_CLASSES[self.name]} classes but the model has {num_classes}; leave it out"
            )
        if self.eps == 0 or len(images) == 0:
            return images.detach().clone()
        with own_randomness(images.device), torch.no_grad(), _quiet():  # the attacks seed the default generators
            attack = self._build(_Anchored(model), images.device, num_classes)
            return self._perturb(attack, images.detach().clone(), labels.clone()).detach()

    def _perturb(self, attack: Any, images: Tensor, labels: Tensor) -> Tensor:
        try:
            return attack.perturb(images, labels)
        except (RuntimeError, ZeroDivisionError) as error:
            if self.name != "square" or self.norm == "linf" or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ValueError(
                f"Square's reference implementation fails in the {AUTOATTACK_NORMS[self.norm]} ball for images of some "
                f"sizes, such as these of {images.shape[2]}x{images.shape[3]} ({error}); use 28 or 32 pixels, or "
                "leave it out by naming the other attacks: apgd-ce apgd-t fab-t"
            ) from error

    def _build(self, model: nn.Module, device: torch.device, num_classes: int) -> Any:
        """The reference's attack object, as its `run_standard_evaluation` sets it up."""
        module = importlib.import_module(implementation())
        arguments: dict[str, Any] = {
            "norm": AUTOATTACK_NORMS[self.norm],
            "eps": self.eps,
            "seed": self.seed,
            "device": device,
        }
        if module.__name__ == "autoattack":
            arguments["verbose"] = False  # it prints
        whole = module.AutoAttack(model, version=self.version, **arguments)
        targets = num_classes - 1
        whole.apgd_targeted.n_target_classes = min(whole.apgd_targeted.n_target_classes, targets)
        whole.fab.n_target_classes = min(whole.fab.n_target_classes, targets)
        if self.name == "apgd-t":
            attack = whole.apgd_targeted
        elif self.name in ("apgd-ce", "apgd-dlr"):
            attack = whole.apgd
            attack.loss = self.name.removeprefix("apgd-")
        elif self.name == "square":
            attack = whole.square
        else:
            attack = whole.fab
            attack.targeted = self.name == "fab-t"
            attack.n_restarts = 1 if attack.targeted else attack.n_restarts
        attack.seed = self.seed
        return attack


class _Anchored(nn.Module):
    """The model, with a gradient of zero where it cuts its own off, which the reference would stop at.

    A gradient of NaN or infinity is refused: the reference could not follow it and would call the image robust.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return self.model(images)
        images = images.view_as(images)
        images.register_hook(_refuse_broken)
        logits = self.model(images)
        return logits if logits.requires_grad else logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)


def _refuse_broken(gradient: Tensor) -> None:
    if not torch.isfinite(gradient).all():
        raise ValueError(
            "an attack of AutoAttack met a gradient of NaN or infinity, which it cannot follow and would take for "
            "robustness; look in the model's forward pass for roots and norms of zero and for divisions, and add a "
            "small constant there"
        )


def usable(component: str, num_classes: int) -> bool:
    """Whether a component's loss is defined for this number of classes."""
    return num_classes >= _NEEDED_CLASSES.get(component, 2)


def nonstandard(components: tuple[str, ...], num_classes: int) -> str:
    """What has to differ from AutoAttack as published with so few classes, as a sentence; "" if nothing."""
    dropped = [name for name in components if not usable(name, num_classes)]
    capped = [name for name in components if name.endswith("-t") and name not in dropped and num_classes < 10]
    changes = [f"{name} is left out, its loss needs {_NEEDED_CLASSES[name]} classes" for name in dropped]
    changes += [f"{name} tries {num_classes - 1} target class(es) instead of 9" for name in capped]
    return f"non-standard AutoAttack, for {num_classes} classes: {'; '.join(changes)}" if changes else ""


def implementation() -> str:
    """The installed implementation: "pyautoattack" or, if that is missing, "autoattack".

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    found = next((name for name in _PACKAGES if importlib.util.find_spec(name) is not None), None)
    if found is None:
        raise ModuleNotFoundError(
            'AutoAttack is not installed; install it with `pip install "timm-fsr[eval]"` (other packages of that name '
            "run other attacks), or use attacks that need no other package: pgd20, apgd100, cw30"
        )
    return found


def implementation_version() -> str:
    """Name and version of the installed implementation, for reports."""
    name = implementation()
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return name


@contextmanager
def _quiet() -> Iterator[None]:
    """The reference warns of single zero gradients again and again; `ModelCheck` counts them instead."""
    logger = logging.getLogger("auto-attack")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
