"""A small registered variant, and variants that are registered for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry as timm_registry
from torch import nn

from timm_fsr.models import variants


def variant(**kwargs: Any) -> nn.Module:
    """A registered variant; every tensor, also running statistics, differs from a fresh model's."""
    torch.manual_seed(1)
    model = timm.create_model("resnet_tiny_cifar_fsr", **{"fsr_hidden": 4, **kwargs})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) / 10 if tensor.is_floating_point() else 3)
    return model.eval()


@contextmanager
def only(*bases: str) -> Iterator[None]:
    """Within it these are all architectures there are; afterwards the variants registered in it are unknown again."""
    before = set(variants.default_cfgs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", lambda: list(bases))
        yield
    for name in set(variants.default_cfgs) - before:
        timm_registry._clear_model_entries(name)
        del timm_registry._model_entrypoints[name], variants.default_cfgs[name], vars(variants)[name]
        variants.__all__.remove(name)
