"""Adversarial weight perturbation: the loss is minimised at weights that were moved to raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_weights(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    *,
    gamma: float,
    average: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients,
) -> Iterator[None]:
    """Move the weights by AWP (Wu et al., 2020, arXiv 2004.05884, equations 8 to 11) while the block runs.

    Each weight w becomes w + gamma * |w| * g / |g|, where g is the gradient of the loss: as in the original code each
    parameter of two or more dimensions that is called a weight. One whose gradient is not finite, as happens in fp16,
    stays. Forward and backward pass belong into the block; the optimizer's step comes after it, where the weights are
    again what they were, to the bit. BatchNorm's running statistics do not notice the pass of `loss_fn`.

    Args:
        model: the model as it is inside DistributedDataParallel.
        loss_fn: runs the model in training mode and returns the scalar loss that the objective minimises.
        gamma: relative size of the move; 0.01 for AT and 0.005 for TRADES in the paper.
        average: averages the gradients over processes, so that all move alike.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = [parameter for name, parameter in named if parameter.ndim > 1 and "weight" in name]
    with kept_buffers(model):
        found = torch.autograd.grad(loss_fn(), weights, allow_unused=True)
    used = [(weight, gradient) for weight, gradient in zip(weights, found, strict=True) if gradient is not None]
    gradients = average([gradient for _, gradient in used])
    before = [weight.detach().clone() for weight, _ in used]
    try:
        with torch.no_grad():
            for (weight, _), gradient in zip(used, gradients, strict=True):
                norm = gradient.norm()
                move = gradient * (gamma * weight.norm() / norm.clamp_min(1e-20))
                weight.add_(move.where(norm.isfinite(), 0.0))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(used, before, strict=True):
                weight.copy_(value)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Give the buffers of `model` (BatchNorm's running statistics) their values back after the block."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
