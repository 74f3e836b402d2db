"""The contract of a feature layer, and the registry that finds one by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from timm_fsr.layers.scope import CALL, SURROGATES, innermost
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.registry import Registry

Aux = dict[str, Tensor]


class FeatureLayer(nn.Module):
    """Maps an NCHW feature map to another of the same shape, with auxiliary outputs on the side.

    A subclass takes `channels` (of the feature map) and `num_classes` (0: unknown, then it has no auxiliary
    classifier), and after these keyword arguments of its own, each with a default and a plain value (number,
    string, bool or None), so that a checkpoint's `config.json` can hold them all.

    Attributes:
        name: registry name; the key prefix of the weights and of the loss terms.
        default_at: the place its paper puts it, as the `at` of `timm_fsr.attach`.
        surrogates: names of the stand-ins for its gradients that the layer knows; an adaptive attack selects each of
            them in turn. "bypass" and "identity" are the sites' own and work for every layer. A layer whose arguments
            leave a stand-in without meaning takes it out of its own list.
        attack_weight: weight of the layer's own term in what training attacks maximise; 0, the default, is none, and
            then nothing is recorded for it during the attack.
        soft_labels: the layer knows what to do with labels (N, classes), the share of each class in an image, as mixup
            makes them; otherwise it is not trained with such.
    """

    name: ClassVar[str]
    default_at: ClassVar[tuple[int | str, ...]] = (-1,)
    surrogates: tuple[str, ...] = ()
    attack_weight: float = 0.0
    soft_labels: ClassVar[bool] = False
    _wants_aux: bool = True
    _surrogate: str | None = None

    @property
    def wants_aux(self) -> bool:
        """Whether anybody will look at the auxiliary outputs. A layer skips what only they need when it is False."""
        call = CALL.get()
        return self._wants_aux if call is None else call.wants_aux

    @wants_aux.setter
    def wants_aux(self, wanted: bool) -> None:
        self._wants_aux = wanted

    @property
    def surrogate(self) -> str | None:
        """The stand-in that `timm_fsr.hooks.surrogates.surrogate` has selected; None is the layer itself."""
        call = CALL.get()
        if call is not None:
            return call.surrogate
        scope = innermost(SURROGATES, self)
        return self._surrogate if scope is None else scope.value

    @surrogate.setter
    def surrogate(self, name: str | None) -> None:
        self._surrogate = name

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Map `feature` (N, C, H, W) to a tensor of the same shape and dtype; works with `labels=None`.

        In eval mode `labels` (N,) have no influence: a defence that knew them would answer its own question.

        Returns:
            The new feature map, and named auxiliary tensors, each with one entry per image along its first
            dimension ({} when `wants_aux` is False).
        """
        raise NotImplementedError

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted scalar loss terms by name, from `aux`, the model's `logits` (N, classes) and `labels` (N,)."""
        return {}

    def attack_losses(self, aux: Aux, logits: Tensor, labels: Tensor, clean: Aux | None = None) -> Tensor | None:
        """What a training attack maximises besides its main loss: weighted, one value per image (N,), or None.

        Called if `attack_weight` is not 0, with what was recorded in eval mode without labels.

        Args:
            aux: auxiliary outputs of the attacked images.
            logits: (N, classes), the model's output for them.
            labels: (N,) true classes.
            clean: auxiliary outputs of the clean images, where the attack maximises a divergence from these (TRADES).
        """
        return None

    def take_place(self, index: int, count: int) -> None:
        """Called by `attach` with the index of this site (from 0) and their number; most layers ignore it."""

    def reset_classifier(self, num_classes: int) -> None:
        """Give auxiliary classifiers fresh weights for `num_classes` classes (0: none); others do nothing."""

    def resolved_args(self) -> dict[str, Any]:
        """Every keyword argument the layer was built with, defaults included, as plain values."""
        return {key: getattr(self, key) for key in layer_defaults(type(self))}


LayerClass = TypeVar("LayerClass", bound=type[FeatureLayer])

LAYERS: Registry[type[FeatureLayer]] = Registry("feature layer", package="timm_fsr.layers", group="timm_fsr.layers")
"""Every feature layer by its name."""


def register_layer(layer: LayerClass) -> LayerClass:
    """Class decorator that makes a feature layer known by its `name`, and gives timm its variants.

    Raises:
        ValueError: the name is missing, no identifier, or taken by another class.
    """
    LAYERS.add(getattr(layer, "name", ""), layer)
    return layer


def list_layers() -> list[str]:
    """Names of the registered feature layers, sorted; those of installed plug-ins are among them."""
    return LAYERS.names()


def layer_class(name: str) -> type[FeatureLayer]:
    """The registered feature layer called `name`.

    Raises:
        ValueError: no such layer; the message names the nearest.
    """
    return LAYERS[name]


def layer_defaults(layer: type[FeatureLayer]) -> dict[str, Any]:
    """The layer's own keyword arguments with their default values."""
    parameters = inspect.signature(layer).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_layer_args(layer: type[FeatureLayer], args: Mapping[str, Any]) -> None:
    """Refuse arguments that `layer` does not have, of another type than their default's, or NaN or infinite.

    Raises:
        ValueError: an unknown argument (the message names the nearest), or a value such as "1e-3" for a float.
    """
    defaults = layer_defaults(layer)
    for key, value in args.items():
        if key not in defaults:
            raise ValueError(unknown(f"argument of the feature layer {layer.name!r}", key, list(defaults)))
        if not _same_type(value, defaults[key]):
            kind = type(defaults[key]).__name__
            raise ValueError(f"{layer.name!r} takes {key} as {kind} (default {defaults[key]!r}), not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} of the feature layer {layer.name!r} must be a finite number")


def check_weights(**weights: float) -> None:
    """Refuse weights of loss terms, by their arguments' names, that are negative, infinite or NaN.

    Raises:
        ValueError: one of them is.
    """
    for key, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{key}={value}: loss weights must be 0 or more, and finite")


def check_temperature(tau: float) -> None:
    """Refuse a temperature that is not positive, infinite or NaN.

    Raises:
        ValueError: it is.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau={tau} must be positive and finite: it divides the mask's logits")


def check_choice(layer: type[FeatureLayer], key: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a `value` of the argument `key` that is none of `choices`.

    Raises:
        ValueError: it is none; the message names the nearest and all.
    """
    if value not in choices:
        raise ValueError(unknown(f"{key} of the feature layer {layer.name!r}", value, list(choices)))


def _same_type(value: Any, default: Any) -> bool:
    """Whether `value` may stand for `default`: an int may for a float, a bool for no number, anything for None."""
    kinds = (int, float) if isinstance(default, float) else type(default)
    return default is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool))
