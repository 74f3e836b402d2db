"""Rounding: weights that half of the bits can hold, so that half of the bytes need to be stored and downloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round matrices and kernels, in place, to numbers that `dtype` has.

    They stay in their own precision, and so does all arithmetic; `save_pretrained(..., dtype=dtype)` then stores them
    exactly. Biases, norms and their statistics are few and stay as they are. float16 has 11 significant bits and is
    the better choice for weights of ordinary size, bfloat16 has 8 and the range of float32. It is another model than
    before: evaluate this one.

    Args:
        model: any model in float32.
        dtype: torch.float16 or torch.bfloat16.

    Returns:
        The model.

    Raises:
        ValueError: another dtype, or weights that are too large for it; nothing was changed.
    """
    _check(dtype)
    large = {name: tensor for name, tensor in model.state_dict().items() if _is_halved(tensor)}
    for name, tensor in large.items():
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(f"{name} has numbers that {dtype} cannot hold; use torch.bfloat16 or keep float32")
    for tensor in large.values():  # the model's own memory
        tensor.copy_(tensor.to(dtype))
    return model


def halved(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors, matrices and kernels in `dtype`.

    Raises:
        ValueError: another dtype than float16 and bfloat16, or a number that it has not.
    """
    _check(dtype)
    found = {name: tensor.to(dtype) if _is_halved(tensor) else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.equal(found[name].to(tensor.dtype), tensor):
            raise ValueError(
                f"{name} would be changed by being stored in {dtype}, and what was measured of the model would be that "
                f"of another; call timm_fsr.round_weights(model, {dtype}) first and evaluate the result"
            )
    return found


def _is_halved(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.ndim > 1


def _check(dtype: torch.dtype) -> None:
    if dtype not in HALVES:
        raise ValueError(f"weights cannot be rounded to {dtype}; use one of {', '.join(map(str, HALVES))}")
