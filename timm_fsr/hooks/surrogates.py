"""Surrogates: what adaptive attacks put in the place of feature layers, or of their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from timm_fsr.hooks.site import layer_groups
from timm_fsr.layers import FeatureLayer
from timm_fsr.utils.errors import unknown

_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BYPASS, IDENTITY = "bypass", "identity"


@contextmanager
def surrogate(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Within it every layer that knows the surrogate `name` uses it.

    Args:
        model: any module that contains a model with feature layers.
        name: "bypass" (the layers are left out), "identity" (their gradient is that of doing nothing: BPDA,
            Athalye et al., 2018, arXiv 1802.00420), or one that a layer of the model declares.

    Yields:
        The same model.

    Raises:
        ValueError: no layer of the model knows that surrogate.
    """
    if name not in list_surrogates(model):
        raise ValueError(unknown("surrogate", name, list(list_surrogates(model))))
    with ExitStack() as undo:
        for group in layer_groups(model):
            if name in (BYPASS, IDENTITY):
                undo.callback(setattr, group, "surrogate", group.surrogate)
                group.surrogate = name
        for layer in feature_layers(model):
            if name in layer.surrogates:
                undo.callback(setattr, layer, "surrogate", layer.surrogate)
                layer.surrogate = name
        yield model


@contextmanager
def noisy(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the feature layers are as random as in training, while all else stays as it is.

    BatchNorm inside them goes on using its running statistics.
    """
    with ExitStack() as undo:
        for module in [module for layer in feature_layers(model) for module in layer.modules()]:
            if not isinstance(module, _STATISTICS):
                undo.callback(setattr, module, "training", module.training)
                module.training = True
        yield model


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, also inside `surrogate` or `noisy`, the layers are themselves and deterministic."""
    with ExitStack() as undo:
        for group in layer_groups(model):
            undo.callback(setattr, group, "surrogate", group.surrogate)
            group.surrogate = None
        for layer in feature_layers(model):
            undo.callback(setattr, layer, "surrogate", layer.surrogate)
            layer.surrogate = None
            for module in layer.modules():
                undo.callback(setattr, module, "training", module.training)
                module.training = False
        yield model


def list_surrogates(model: nn.Module) -> tuple[str, ...]:
    """The surrogates that the layers of `model` know; () for a model without feature layers."""
    layers = feature_layers(model)
    own = dict.fromkeys(name for layer in layers for name in layer.surrogates)
    return (IDENTITY, *own, BYPASS) if layers else ()


def feature_layers(model: nn.Module) -> list[FeatureLayer]:
    """Every feature layer anywhere inside `model`."""
    return [site.layer for group in layer_groups(model) for site in group.sites]
