"""Attacks of other libraries: a function of (model, images, labels) as a stage of an evaluation."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode
from timm_fsr.utils.errors import UnsoundError

AttackFunction = Callable[[nn.Module, Tensor, Tensor], Any]
"""Maps (pixel-space model, images (N, C, H, W) in [0, 1], labels (N,)) to attacked images, as a tensor or an array."""

_ROUNDING = 1e-6  # outside of [0, 1]: libraries that compute in other units come back with so much
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def attack_name(attack: AttackFunction) -> str:
    """What a report calls an attack that comes without a name: the function's.

    Raises:
        ValueError: it has none.
    """
    name = getattr(attack, "__name__", "")
    if not name.isidentifier():  # "<lambda>", or an object
        raise ValueError(
            f"the attack {attack!r} has no name to be reported by; give "
            "timm_fsr.Suite.from_callable('name', lambda model, images, labels: ...)"
        )
    return str(name)


def check_attack_function(name: str, attack: AttackFunction) -> None:
    """Refuse what cannot be called with a model, images and labels.

    Raises:
        ValueError: see above.
    """
    example = "lambda model, images, labels: ATTACK(model, ...)(images, labels)"
    if not callable(attack):
        raise ValueError(f"the attack {name!r} is {type(attack).__name__}; give a function, such as {example}")
    try:
        inspect.signature(attack).bind("model", "images", "labels")
    except TypeError as error:
        raise ValueError(
            f"the attack {name!r} does not take (model, images, labels): {error}; wrap it in a function, such as "
            f"{example}"
        ) from error
    except ValueError:  # written in C: nothing is known of it
        return


def described(attack: AttackFunction) -> str:
    """An attack in words that change when its code, or a value that it uses, does: a folder knows it by them."""
    code = getattr(attack, "__code__", None)
    module, name = getattr(attack, "__module__", ""), getattr(attack, "__qualname__", type(attack).__qualname__)
    used = repr(attack) if code is None else f"{_code(code)} {attack.__defaults__} {_values(attack)}"
    digest = hashlib.sha256(_ADDRESS.sub("", used).encode()).hexdigest()[:12]
    return f"{module}.{name} (code {digest})"


def run_attack(
    name: str, attack: AttackFunction, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The attacked images, in the model's dtype and on its device; what lies outside of [0, 1] by rounding is clipped.

    NumPy's and Python's random numbers are seeded for the call, as torch's are, and afterwards as before.

    Raises:
        ValueError: it returned no images of this shape.
        UnsoundError: it changed the model.
    """
    before = _versions(model)
    with attack_mode(model), _seeded(generator.initial_seed()):
        found = attack(model, images.clone(), labels.clone())
    if _versions(model) != before:
        raise UnsoundError(
            f"the attack {name!r} changed the model's weights or statistics, so that every result after it would be "
            "that of another model; leave it out, or give it a copy of the model"
        )
    attacked = _as_images(name, found, images)
    close = (attacked >= -_ROUNDING) & (attacked <= 1 + _ROUNDING)
    return torch.where(close, attacked.clamp(0, 1), attacked)


def _as_images(name: str, found: Any, images: Tensor) -> Tensor:
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if not isinstance(found, Tensor):
        hint = "; of foolbox's three, return the second" if isinstance(found, (tuple, list)) else ""
        raise ValueError(
            f"the attack {name!r} returned {type(found).__name__}; return the attacked images alone, as a tensor or a "
            f"NumPy array (N, C, H, W){hint}"
        )
    if found.shape != images.shape:
        raise ValueError(
            f"the attack {name!r} returned images of shape {tuple(found.shape)} for such of {tuple(images.shape)}; "
            "return one attacked image for each image, in their order"
        )
    return found.detach().to(images)


def _versions(model: nn.Module) -> list[int]:
    """How often each tensor of a model was written to."""
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it, NumPy and Python draw from this seed."""
    numpys, pythons = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)


def _code(code: Any) -> str:
    inner = [_code(value) if inspect.iscode(value) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {inner}"


def _values(attack: Any) -> str:
    """What a function takes from around it: variables of the function that made it, and of its module."""
    cells = [cell.cell_contents for cell in attack.__closure__ or () if _is_filled(cell)]
    names: Mapping[str, Any] = attack.__globals__
    return repr([*cells, *(names[name] for name in attack.__code__.co_names if name in names)])


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises where a variable has no value yet)
    except ValueError:
        return False
    return True
