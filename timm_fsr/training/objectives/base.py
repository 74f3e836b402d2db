"""What a training objective is: how to attack a batch, and what to minimise on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_fsr.attacks.base import Attack, LossFunction, attack_mode
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.layers.base import FeatureLayer
from timm_fsr.training.objectives.passes import attack_loss
from timm_fsr.utils.errors import check_images
from timm_fsr.utils.registry import RegistrationError, Registry

Method = TypeVar("Method", bound="Objective")


class LossTerms(dict[str, Tensor]):
    """Weighted scalar loss terms by name; their sum is minimised.

    Attributes:
        logits: (N, classes) for "clean" and "adversarial" images, as far as they were passed; detached, for metrics.
    """

    logits: dict[str, Tensor]

    def total(self) -> Tensor:
        """The sum of the terms."""
        return torch.stack(list(self.values())).sum()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A training method: crafts adversarial images, and names what to minimise.

    A subclass is a frozen dataclass with a `name`. It defines `terms`, and `attack_loss` where that is not the
    cross-entropy. The auxiliary terms of feature layers ("fsr.separation", ...) are added on adversarial images, as the
    FSR paper does (equation 8, where the classification loss is that of any adversarial training).

    Attributes:
        name: registry name, as in a recipe's `objective.name`.
        label_smoothing: in [0, 1), of the main cross-entropy of the training loss only.
        layer: name of the feature layer that the method cannot do without, if any.
        fine_tunes: the method starts from a trained model.
        soft_labels: the method knows what to do with labels (N, classes), the share of each class in an image, as mixup
            makes them.
        teacher: a frozen model that the method learns from, if any; `begin` makes it.
    """

    name: ClassVar[str]
    layer: ClassVar[str | None] = None
    fine_tunes: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    label_smoothing: float = 0.0
    teacher: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1): it is a share of probability")

    def __call__(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> LossTerms:
        """Loss terms of `images` (N, C, H, W) in [0, 1] with `labels` (N,), or (N, classes): `craft`, then `terms`.

        Args:
            model: in pixel space and training mode; also wrapped by DistributedDataParallel.
            attack: maximises `attack_loss`, with the model in eval mode.
            images: clean images.
            labels: their classes, or with `soft_labels` the share of each class in each image.
            generator: of the attack's random start.

        Raises:
            ValueError: images outside [0, 1] or of another dtype, or labels that the model has no class for.
        """
        adversarial = self.craft(model, attack, images, labels, generator=generator)
        return self.terms(model, attack, images, adversarial, labels)

    def begin(self: Method, model: nn.Module) -> Method:
        """The objective for the training of `model`, in pixel space and as it is before its first step.

        The same objective unless the method keeps something of the model as it began.
        """
        return self

    @property
    def attacks(self) -> bool:
        """Whether the method trains on attacked images at all."""
        return True

    def craft(
        self,
        model: nn.Module,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images that maximise `attack_loss` with the model in eval mode; the images if nothing `attacks`.

        Under DistributedDataParallel the attack runs through the wrapped module: passing the wrapper would
        synchronise buffers in each step and could pair up wrong collectives.

        Raises:
            ValueError: see `__call__`.
        """
        inner = unwrapped(model)
        check_images(images, labels, getattr(getattr(inner, "model", inner), "num_classes", None) or None)
        _check_dtype(inner, images)
        if labels.ndim == 2:
            check_soft_labels(self, feature_layers(inner))
        if not self.attacks:
            return images
        self.check_attack(attack)
        with attack_mode(inner):
            return attack(self.attack_loss(inner, images, labels), images, generator=generator)

    def attack_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
        """What the attack maximises, one value per image; called with the model in attack mode.

        Feature layers that have an `attack_weight` add a term of their own, as their papers' attacks have it.
        """
        return attack_loss(model, labels, lambda logits: F.cross_entropy(logits, labels, reduction="none"))

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """What to minimise, given the adversarial images of `craft`; a single forward pass of `model`."""
        raise NotImplementedError

    def check_attack(self, attack: Attack) -> None:
        """Raise ValueError for an attack that cannot work with this method."""

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch; of mixed labels (N, classes) as timm's `SoftTargetCrossEntropy` of smoothed ones."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", package="timm_fsr.training.objectives", group="timm_fsr.objectives"
)
"""Every training objective by its name."""

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def register_objective(objective: ObjectiveClass) -> ObjectiveClass:
    """Class decorator that makes a training objective known by its `name`.

    Raises:
        ValueError: the name is missing, no identifier, or taken by another class; or the class is no dataclass derived
            from `Objective`.
    """
    if not issubclass(objective, Objective) or "__dataclass_fields__" not in vars(objective):
        raise RegistrationError(
            f"the objective {objective.__qualname__} has to derive from timm_fsr.Objective and be a dataclass; put "
            "@dataclass(frozen=True, kw_only=True) under @register_objective"
        )
    OBJECTIVES.add(getattr(objective, "name", ""), objective)
    return objective


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_soft_labels(
    objective: Objective, layers: Iterable[FeatureLayer | type[FeatureLayer]], *, because: str = ""
) -> None:
    """Raise ValueError for a method or a feature layer that has no formula for mixed labels.

    Args:
        objective: the method.
        layers: of the model.
        because: what mixes them, and can be left out.
    """
    remedy = f", or leave out {because}" if because else ", or give one class for each image"
    if not objective.soft_labels:
        able = [name for name in OBJECTIVES.names() if OBJECTIVES[name].soft_labels and not OBJECTIVES[name].layer]
        raise ValueError(
            f"the objective {objective.name!r} is about the one true class of an image, and says nothing of mixed "
            f"labels; take one of {', '.join(able)}{remedy}"
        )
    for layer in layers:
        if not layer.soft_labels:
            raise ValueError(
                f"the feature layer {layer.name!r} uses the one true class of an image while it trains, and says "
                f"nothing of mixed labels; take another layer{remedy}"
            )


def _check_dtype(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError for images of another precision than the model's, which no layer multiplies."""
    own = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), images.dtype)
    if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
        name = str(own).removeprefix("torch.")
        raise ValueError(
            f"images are {str(images.dtype).removeprefix('torch.')} but the model's weights are {name}; give "
            f"images.to(torch.{name}), and use torch.autocast for mixed precision"
        )


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError for a weight of a loss term that is negative or infinite."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name}={weight} must be 0 or more: it weighs a loss term")
