"""AutoAugment, RandAugment, AugMix and 3-Augment, by timm's code and timm's configuration strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from PIL import Image, ImageOps

from timm_fsr.utils.errors import unknown
from timm_fsr.utils.random import seeded_libraries

Transform = TypeVar("Transform", bound=Callable[[Image.Image], Image.Image])

_TRANSLATION = 0.45  # the largest absolute translation, as a share of the image's side: timm's training transform


class _Number(NamedTuple):
    """What a section of a configuration string may hold."""

    about: str
    low: float
    high: float = float("inf")
    whole: bool = True


_DEVIATION = _Number("standard deviation of the magnitude", 0, whole=False)
_SWITCH = (0, 1)
_RAND = {
    "m": _Number("magnitude", 0),
    "n": _Number("operations on each image", 1),
    "p": _Number("probability of each", 0, 1, whole=False),
    "mstd": _DEVIATION,
    "mmax": _Number("largest magnitude", 1),
    "inc": _Number("1: operations that get stronger with the magnitude", *_SWITCH),
}
_AUGMIX = {
    "m": _Number("magnitude", 0),
    "w": _Number("chains", 1),
    "d": _Number("operations in each chain", 1),
    "a": _Number("alpha of the mixing weights", 0, whole=False),
    "b": _Number("1: blend each chain", *_SWITCH),
    "mstd": _DEVIATION,
}
_AUTO = {"mstd": _DEVIATION}
_SECTIONS = {
    "rand": _RAND,
    "augmix": _AUGMIX,
    "original": _AUTO,
    "originalr": _AUTO,
    "v0": _AUTO,
    "v0r": _AUTO,
    "3a": _AUTO,
}
_SETS = {"weights": 15, "3a": 3, "3aw": 14}
"""Sets of operations of RandAugment ("tweights"), and how many each has."""
_DRAWN_ONCE = ("weights", "3aw")  # an operation of these is drawn at most once for an image


@dataclass(frozen=True)
class Policy:
    """A random policy for single pictures: `policy.over(pictures, seeds)`.

    Attributes:
        name: timm's configuration string, such as "rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4-d2", "3a".
            timm leaves out sections that it does not understand; here they are an error.
        fill: the pixel value, in [0, 1] for each channel, of what rotations and translations leave empty; timm takes
            the mean that the model subtracts.

    Raises:
        ValueError: `name` is no configuration that timm understands.
    """

    name: str
    fill: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check(self.name)

    def over(self, pictures: Iterable[Image.Image], seeds: Iterable[int]) -> list[Image.Image]:
        """Pictures of the same sizes and modes, "L" or "RGB"; the seed of each alone decides on its draws."""
        fill = tuple(min(255, round(255 * value)) for value in self.fill)
        found = []
        with seeded_libraries() as begin:
            for picture, seed in zip(pictures, seeds, strict=True):
                begin(seed)
                found.append(_transform(self.name, fill, min(picture.size))(picture))
        return found


@lru_cache(maxsize=8)
def _transform(name: str, fill: tuple[int, ...], side: int) -> Callable[[Image.Image], Image.Image]:
    """The transform of timm, with what its own training transform passes to it."""
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    params: dict[str, Any] = {"translate_const": int(side * _TRANSLATION), "img_mean": fill}
    if name.startswith("rand"):
        mixed = rand_augment_transform(name, params)
        return _for_any_pillow(mixed, mixed.ops)
    if name.startswith("augmix"):
        chains = augment_and_mix_transform(name, {**params, "translate_pct": 0.3})
        return _for_any_pillow(chains, chains.ops)
    pairs = auto_augment_transform(name, params)
    return _for_any_pillow(pairs, [operation for pair in pairs.policy for operation in pair])


def _for_any_pillow(transform: Transform, operations: Sequence[Any]) -> Transform:
    """Let the transform's own operations posterize to 0 bits, which Pillow 13 refuses."""
    from timm.data import auto_augment

    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits_to_keep: int, **_others: Any) -> Image.Image:
    """The highest bits of each pixel; black if none are kept, as earlier versions of Pillow had it."""
    if bits_to_keep >= 8:
        return picture
    return ImageOps.posterize(picture, bits_to_keep) if bits_to_keep else Image.new(picture.mode, picture.size)


def _check(name: str) -> None:
    """Raise ValueError for a string that timm would refuse, or of which it would leave out a part."""
    kind, *sections = name.split("-")
    if kind not in _SECTIONS:
        raise ValueError(unknown("auto_augment policy", kind, list(_SECTIONS)))
    found: dict[str, float | str] = {}
    for section in sections:
        key, value = _read(name, kind, section)
        if key in found:
            raise ValueError(f"auto_augment={name!r} has two sections {key!r}; keep one")
        found[key] = value
    choices, count = found.get("t"), float(found.get("n", 2))
    if choices in _DRAWN_ONCE and count > _SETS[str(choices)]:
        raise ValueError(
            f"auto_augment={name!r} draws {count:.0f} different operations for each image, but t{choices} has "
            f"{_SETS[str(choices)]}; lower n"
        )


def _read(name: str, kind: str, section: str) -> tuple[str, float | str]:
    """Key and value of one section; ValueError if the policy has no such section or it no such value."""
    if kind == "rand" and section.startswith("t"):
        if section[1:] not in _SETS:
            raise ValueError(unknown(f"set of operations in auto_augment={name!r}:", section[1:], list(_SETS)))
        return "t", section[1:]
    known = _SECTIONS[kind]
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?)", section)
    if match is None or match[1] not in known:
        listing = ", ".join(f"{key} ({number.about})" for key, number in known.items())
        listing += ", t (set of operations: weights, 3a or 3aw)" if kind == "rand" else ""
        raise ValueError(
            f"auto_augment={name!r} has the section {section!r}, which {kind!r} does not know; write a key and a "
            f"number, the keys are {listing}"
        )
    number, value = known[match[1]], float(match[2])
    whole = not number.whole or match[2].isdigit()
    positive = value > 0 or match[1] != "a"  # a Dirichlet distribution has no alpha of 0
    if not (whole and positive and number.low <= value <= number.high):
        kind_of = "a whole number" if number.whole else "a number"
        upper = f" and at most {number.high:g}" if number.high < float("inf") else ""
        lower = f"above {number.low:g}" if match[1] == "a" else f"of at least {number.low:g}"
        raise ValueError(
            f"auto_augment={name!r} has {match[1]}={match[2]}, the {number.about}, which must be {kind_of} "
            f"{lower}{upper}"
        )
    return match[1], value
