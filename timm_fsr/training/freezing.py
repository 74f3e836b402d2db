"""The part of a model that stays as it is while its feature layers and classifier begin to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_fsr.hooks.site import layer_groups


@dataclass(frozen=True, eq=False)
class Frozen:
    """The backbone: what is neither feature layer nor classifier.

    It is frozen by dropping its gradients before the optimizer's step, which then neither moves nor decays it. The
    parameters keep `requires_grad`, so that DistributedDataParallel waits for every gradient in every step, and the
    passes cost what they cost without. Its BatchNorm runs in eval mode: its statistics are used and not changed.

    Attributes:
        parameters: get no update.
        norms: modules with running statistics.
    """

    parameters: tuple[nn.Parameter, ...]
    norms: tuple[nn.Module, ...]

    def drop_gradients(self) -> None:
        """To be called between the last backward pass and whatever looks at gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def keep_statistics(self) -> None:
        """To be called after `train()`, which puts every module in training mode."""
        for norm in self.norms:
            norm.eval()


def find_frozen(timm_model: nn.Module) -> Frozen:
    """The backbone of a timm model with its feature layers on.

    Raises:
        ValueError: the model has no classifier and no feature layer, so nothing would train.
    """
    trained = [*layer_groups(timm_model), *_classifiers(timm_model)]
    own = {id(parameter) for module in trained for parameter in module.parameters()}
    inside = {id(module) for part in trained for module in part.modules()}
    if not own:
        raise ValueError(
            "optim.freeze leaves nothing to train: the model has neither a feature layer with weights nor a "
            "classifier; set optim.freeze=0"
        )
    return Frozen(
        parameters=tuple(p for p in timm_model.parameters() if id(p) not in own),
        norms=tuple(
            module
            for module in timm_model.modules()
            if getattr(module, "running_mean", None) is not None and id(module) not in inside
        ),
    )


def _classifiers(timm_model: Any) -> list[nn.Module]:
    """The last layers, of which distilled models have two."""
    found = timm_model.get_classifier() if hasattr(timm_model, "get_classifier") else ()
    return [
        module for module in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(module, nn.Module)
    ]
