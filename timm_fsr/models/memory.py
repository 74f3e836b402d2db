"""How much memory a model needs, estimated without computing anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

_KEPT = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
"""Modules whose output is kept for the backward pass, by themselves or by what comes next."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; they may be on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def activation_bytes(model: nn.Module, shape: tuple[int, int, int, int], *, gradients: bool = True) -> int:
    """Bytes of feature maps that one pass over images of `shape` (N, C, H, W) holds at the same time, from below.

    The pass runs in eval mode on the meta device, where tensors have shapes and no content, whatever device the model
    is on.

    Args:
        model: a timm model or a pixel-space model; its mode is put back.
        shape: of the images.
        gradients: the pass keeps what its backward pass needs; else only its largest feature map counts.

    Returns:
        0 if the model does not run on the meta device, and so nothing is known.
    """
    sizes: list[int] = []

    def note(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, _KEPT)]
    try:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        elsewhere = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        with torch.no_grad():
            functional_call(model.eval(), elsewhere, torch.empty(shape, device="meta"))
    except Exception:  # each network has its own reason; an estimate is all that is lost
        return 0
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return sum(sizes) if gradients else max(sizes, default=0)
