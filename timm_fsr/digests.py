"""Digests: short names for what decides an outcome, so that another model, batch or attack is not taken for it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from timm_fsr.layers import FeatureLayer


def model_digest(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the structure and all the weights and buffers of a model."""
    digest = hashlib.sha256(repr(model).encode())
    for module in model.modules():  # what a module's repr does not say: the arguments of feature layers and of timm
        digest.update(repr(getattr(module, "_model_args", "")).encode())
        digest.update(repr(module.resolved_args() if isinstance(module, FeatureLayer) else "").encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]  # buffers that are not saved count too: mean, std
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def batch_key(index: int, images: Tensor, labels: Tensor) -> str:
    """The name under which the outcomes of a batch are noted; other images, or others beside them, give another one."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for tensor in (images, labels):
        digest.update(_bytes(tensor))
    return f"{index} {digest.hexdigest()[:16]}"


def text_digest(text: str) -> str:
    """The first 8 hexadecimal digits of a SHA-256 over a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor; by way of bytes, as numpy does not know bfloat16."""
    plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # also of expanded ones
    return plain.flatten().view(torch.uint8).numpy().tobytes()
