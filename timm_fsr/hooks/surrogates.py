"""Surrogates: what adaptive attacks put in the place of feature layers, or of their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from timm_fsr.hooks.site import BYPASS, IDENTITY, layer_groups
from timm_fsr.layers import FeatureLayer
from timm_fsr.layers.scope import SURROGATES, opened
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.overrides import overridden

_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def surrogate(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Within it every layer that knows the surrogate `name` uses it, in passes of this thread or task.

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
    known = [layer for layer in feature_layers(model) if name in layer.surrogates]
    groups = layer_groups(model) if name in (BYPASS, IDENTITY) else []
    with opened(SURROGATES, [*groups, *_modules(known)], name):
        yield model


@contextmanager
def noisy(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the feature layers are as random as in training, while all else stays as it is.

    BatchNorm inside them goes on using its running statistics. The model itself is changed: other threads see it too.

    Raises:
        RuntimeError: another thread is inside `plain` or `attack_mode` of this model.
    """
    modules = [module for module in _modules(feature_layers(model)) if not isinstance(module, _STATISTICS)]
    with overridden((module, "training", True) for module in modules):
        yield model


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, also inside `surrogate` or `noisy`, the layers are themselves and deterministic.

    Raises:
        RuntimeError: another thread is inside `noisy` of this model.
    """
    modules = _modules(feature_layers(model))
    with (
        opened(SURROGATES, [*layer_groups(model), *modules], None),
        overridden((module, "training", False) for module in modules),
    ):
        yield model


def list_surrogates(model: nn.Module) -> tuple[str, ...]:
    """The surrogates that the layers of `model` know; () for a model without feature layers."""
    layers = feature_layers(model)
    own = dict.fromkeys(name for layer in layers for name in layer.surrogates)
    return (IDENTITY, *own, BYPASS) if layers else ()


def feature_layers(model: nn.Module) -> list[FeatureLayer]:
    """Every feature layer anywhere inside `model`; inside a wrapper that took its place, the one that is at work."""
    return [site.layer for group in layer_groups(model) for site in group.sites]


def _modules(layers: list[FeatureLayer]) -> list[nn.Module]:
    """Every module of the layers, each once; under a wrapper the layer itself is among them."""
    return list(dict.fromkeys(module for layer in layers for module in layer.modules()))
