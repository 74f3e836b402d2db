"""Training objectives: how to attack a batch, and what to minimise on it."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_fsr.attacks import Attack, LossFunction, attack_mode
from timm_fsr.passes import attack_loss, divergence, forward, gradient_misalignment, joins_attacks, joint_forward
from timm_fsr.pixels import check_images
from timm_fsr.surrogates import feature_layers
from timm_fsr.tape import Tape, record

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

    A subclass defines `terms`, and `attack_loss` where it is not the cross-entropy. The auxiliary terms of feature
    layers ("fsr.separation", ...) are added on adversarial images, as the FSR paper does (equation 8, where the
    classification loss is that of any adversarial training).

    Attributes:
        label_smoothing: in [0, 1), of the main cross-entropy of the training loss only.
        layer: name of the feature layer that the method cannot do without, if any.
        fine_tunes: the method starts from a trained model.
        teacher: a frozen model that the method learns from, if any; `begin` makes it.
    """

    layer: ClassVar[str | None] = None
    fine_tunes: ClassVar[bool] = False
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
        """Loss terms of `images` (N, C, H, W) in [0, 1] with `labels` (N,): `craft`, then `terms`.

        Args:
            model: in pixel space and training mode; also wrapped by DistributedDataParallel.
            attack: maximises `attack_loss`, with the model in eval mode.
            images: clean images.
            labels: their classes.
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
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Natural(Objective):
    """Training on clean images: cross-entropy, and the feature layers' auxiliary terms on them."""

    @property
    def attacks(self) -> bool:
        """Never."""
        return False

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "natural" and the auxiliary ones; `attack` and `adversarial` are not used."""
        logits, aux = forward(model, images, labels)
        terms = LossTerms(natural=self._cross_entropy(logits, labels), **aux)
        terms.logits = {"clean": logits.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class AT(Objective):
    """Adversarial training (Madry et al., 2018, arXiv 1706.06083): cross-entropy on adversarial images.

    The auxiliary terms are those of the same pass.

    Attributes:
        label_smoothing: see `Objective`.
        grad_align: weight of GradAlign (Andriushchenko and Flammarion, 2020, arXiv 2007.02617, equation 6), which
            keeps one-step training from catastrophic overfitting: 1 - cosine of the input gradients at the image and
            at a uniformly random point of the ball (0.2 for eps 8/255 in its paper); 0 leaves it out. The gradients
            are of the model in eval mode, as the attack's are; the original takes those in training mode.
    """

    grad_align: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("grad_align", self.grad_align)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The term "adversarial", "grad_align" if asked for, and the auxiliary ones."""
        logits, aux = forward(model, adversarial, labels)
        terms = LossTerms(adversarial=self._cross_entropy(logits, labels), **aux)
        if self.grad_align:
            terms["grad_align"] = self.grad_align * gradient_misalignment(unwrapped(model), attack, images, labels)
        terms.logits = {"adversarial": logits.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """TRADES (Zhang et al., 2019, arXiv 1901.08573, equation 5): natural cross-entropy + beta * KL(clean || attacked).

    The attack maximises the divergence, whose gradient is zero at the image itself, so it needs a random start. Clean
    and adversarial images share one forward pass, and so their BatchNorm statistics (the original makes two passes,
    which DistributedDataParallel cannot do with BatchNorm). Auxiliary terms are those of the adversarial half.

    Attributes:
        beta: weight of the divergence (6 in the paper). 0 is natural training: nothing is attacked.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("beta", self.beta)

    @property
    def attacks(self) -> bool:
        """Unless beta is 0."""
        return bool(self.beta)

    def check_attack(self, attack: Attack) -> None:
        """Raise ValueError for an attack without a random start."""
        if self.attacks and not getattr(attack, "random_start", True):
            raise ValueError(
                "TRADES maximises a divergence whose gradient is zero at the image itself, so an attack that starts "
                "there does nothing; use one with random_start=True, such as PGD"
            )

    def attack_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossFunction:
        """KL divergence of the attacked image's class probabilities from the clean image's, and layers' terms."""
        heard = record(model) if joins_attacks(model) else nullcontext()
        with torch.no_grad(), heard as tape:
            clean = model(images).float().log_softmax(dim=1)
        return attack_loss(model, labels, lambda logits: divergence(clean, logits.log_softmax(dim=1)), tape)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "natural" and "consistency", and the auxiliary ones."""
        if not self.beta:
            return Natural(label_smoothing=self.label_smoothing).terms(model, attack, images, images, labels)
        clean, attacked, aux = joint_forward(model, images, adversarial, labels)
        consistency = divergence(clean.log_softmax(dim=1), attacked.log_softmax(dim=1)).mean()
        terms = LossTerms(natural=self._cross_entropy(clean, labels), consistency=self.beta * consistency, **aux)
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """MART (Wang et al., 2020, ICLR, equation 11): boosted cross-entropy + beta * KL weighted by 1 - p(label | clean).

    The boosted cross-entropy adds -log(1 - p) of the strongest wrong class of the attacked image. The attack maximises
    the cross-entropy. One forward pass and auxiliary terms as in `TRADES`.

    Attributes:
        beta: weight of the divergence (5 in the paper).
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("beta", self.beta)

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "adversarial", "margin" and "consistency", and the auxiliary ones."""
        clean, attacked, aux = joint_forward(model, images, adversarial, labels)
        own = F.one_hot(labels, clean.shape[1]).bool()
        probabilities = attacked.softmax(dim=1)
        rival = probabilities.masked_fill(own, 0).amax(dim=1)
        weights = 1.0000001 - clean.softmax(dim=1)[own]  # these small numbers are the original code's
        apart = divergence(clean.log_softmax(dim=1), (probabilities + 1e-12).log())
        terms = LossTerms(
            adversarial=self._cross_entropy(attacked, labels),
            margin=-(1.0001 - rival + 1e-12).log().mean(),
            consistency=self.beta * (weights * apart).mean(),
            **aux,
        )
        terms.logits = {"clean": clean.detach(), "adversarial": attacked.detach()}
        return terms


@dataclass(frozen=True, kw_only=True)
class AFD(Objective):
    """Adversarial fine-tuning via disentanglement (Zhou et al., AAAI 2025, arXiv 2401.14707).

    Cross-entropy on adversarial images + alignment * (1 - cos(i, t)), where i are the pooled intrinsic features of the
    adversarial images, as the feature layer "afd" gives them, and t those that the teacher has of the clean images. The
    teacher is the model as it was before this training, frozen and in eval mode. The layer's own terms disentangle
    the features. The attack maximises the cross-entropy.

    Attributes:
        label_smoothing: see `Objective`.
        alignment: weight of the alignment with the teacher (gamma, 25 in the paper for ResNet-18 on CIFAR-10).
    """

    layer: ClassVar[str | None] = "afd"
    fine_tunes: ClassVar[bool] = True
    alignment: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("alignment", self.alignment)

    def begin(self, model: nn.Module) -> AFD:
        """The objective with a frozen copy of `model` for its teacher.

        Raises:
            ValueError: the model has no feature layer "afd".
        """
        if not any(layer.name == self.layer for layer in feature_layers(model)):
            raise ValueError(
                f"AFD needs the feature layer {self.layer!r}, which the model does not have; attach it, or set "
                f"model.layer={self.layer} in the recipe"
            )
        objective = dataclasses.replace(self)
        teacher = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
        object.__setattr__(objective, "teacher", teacher)
        return objective

    def terms(self, model: nn.Module, attack: Attack, images: Tensor, adversarial: Tensor, labels: Tensor) -> LossTerms:
        """The terms "adversarial" and "alignment", and the auxiliary ones."""
        if self.teacher is None:
            raise ValueError("AFD has no teacher yet; train with objective.begin(model), called before the first step")
        with torch.no_grad(), record(self.teacher) as taught:
            self.teacher(images)
        with record(model, labels) as tape:
            logits = model(adversarial).float()
        pairs = zip(self._intrinsic(tape), self._intrinsic(taught), strict=True)
        apart = torch.stack([1 - F.cosine_similarity(mine, wanted, dim=1).mean() for mine, wanted in pairs])
        terms = LossTerms(
            adversarial=self._cross_entropy(logits, labels),
            alignment=self.alignment * apart.mean(),
            **tape.losses(logits, labels),
        )
        terms.logits = {"adversarial": logits.detach()}
        return terms

    def _intrinsic(self, tape: Tape) -> list[Tensor]:
        return [aux["intrinsic"] for site, aux in tape.recorded() if site.layer.name == self.layer]


OBJECTIVES: dict[str, type[Objective]] = {"natural": Natural, "at": AT, "trades": TRADES, "mart": MART, "afd": AFD}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name}={weight} must be 0 or more: it weighs a loss term")
