"""A device that computes on the CPU and refuses what an accelerator refuses, for machines that have none.

Its tensors are on "stand_in:0". An operation over tensors of this device and of the CPU is an error, as are a generator
of the other device and `numpy()`; results are the CPU's to the bit. The import changes torch for good (it takes the
backend that torch keeps for other packages): for processes of their own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"
DEVICE = (NAME, 0)

_aten = torch.ops.aten
_BETWEEN = {_aten.copy_.default, _aten._to_copy.default}
_BY_INDICES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}  # indices may be on the CPU
_Generator, _tensor = torch.Generator, torch.tensor
_seeds: dict[str, set[int]] = {NAME: set(), "cpu": set()}
"""Of the generators of each device: what reaches an operation is no longer the object that was made here."""


class StandInTensor(Tensor):
    """A tensor on this device; `held` is the one on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> StandInTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(*DEVICE),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {NAME}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME} tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy


class StandIn(TorchDispatchMode):
    """While it is entered, `device="stand_in"` works in functions that make tensors."""

    def __enter__(self) -> Any:
        for seeds in _seeds.values():
            seeds.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = list(_leaves((args, list(kwargs.values()))))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    wanted = kwargs.get("device")
    ours = any(isinstance(tensor, StandInTensor) for tensor in given) if wanted is None else _is_ours(wanted)
    _refuse_mixtures(func, given)
    for generator in (leaf for leaf in leaves if isinstance(leaf, _Generator)):
        if generator.initial_seed() in _seeds["cpu" if ours else NAME]:
            raise RuntimeError(f"{func}: the generator is on {'cpu' if ours else NAME}, the tensors are not")
    there = {**kwargs, "device": torch.device("cpu")} if wanted is not None and ours else kwargs
    args, there = _mapped(_held, args), {key: _mapped(_held, value) for key, value in there.items()}
    known = {id(tensor.held): tensor for tensor in given if isinstance(tensor, StandInTensor)}

    def placed(result: Any) -> Any:
        if not ours or not isinstance(result, Tensor):
            return result
        return known[id(result)] if id(result) in known else StandInTensor(result)

    return _mapped(placed, func(*args, **there))


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, StandInTensor) else leaf


def _leaves(tree: Any) -> Iterator[Any]:
    """What operations take, out of its lists and tuples; torch's own pytree takes many times as long."""
    if isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _leaves(branch)
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    return type(tree)([_mapped(change, branch) for branch in tree]) if isinstance(tree, (list, tuple)) else change(tree)


def _refuse_mixtures(func: Any, given: list[Tensor]) -> None:
    others = [tensor for tensor in given if not isinstance(tensor, StandInTensor) and tensor.dim() > 0]
    if func in _BETWEEN or not others or not any(isinstance(tensor, StandInTensor) for tensor in given):
        return
    if func in _BY_INDICES and isinstance(given[0], StandInTensor):
        return
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in others)
    raise RuntimeError(f"{func}: expected all tensors to be on {NAME}, but found some on cpu, of shape {shapes}")


def _is_ours(device: Any) -> bool:
    return torch.device(device).type == NAME


class _Module:
    """What torch and Accelerate ask a device's module for."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Random numbers without a generator are the CPU's."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class _Noted(_Generator):
    """A generator whose seeds are noted for its device."""

    _device = "cpu"

    def manual_seed(self, seed: int) -> _Noted:
        super().manual_seed(seed)
        _seeds[self._device].add(self.initial_seed())
        return self


class _Ours(_Noted):
    _device = NAME

    @property
    def device(self) -> torch.device:
        return torch.device(*DEVICE)


class _GeneratorType(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _Ours() if _is_ours(device) else _Noted()

    def __instancecheck__(cls, other: object) -> bool:
        return isinstance(other, _Generator)


class _MadeGenerator(metaclass=_GeneratorType):
    """Stands where `torch.Generator` was."""


def _made_tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which copies to a device where no mode sees it."""
    made = _tensor(data, **kwargs)
    return made if device is None else made.to(device)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)  # autocast is allowed, and does nothing
torch.Generator = _MadeGenerator
torch.tensor = _made_tensor
