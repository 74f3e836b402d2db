"""How evaluations call attacks: by their name, with steps and restarts in it, or by a short name for several."""

from __future__ import annotations

from collections.abc import Mapping

ALIASES: dict[str, tuple[str, ...]] = {
    "standard": ("autoattack",),
    "official": ("official-fgsm", "official-pgd20", "official-pgd100", "official-cw30"),
}
"""Short names for one or more suites."""

_EXAMPLES = {
    "pgd": ("pgd20", "pgd100x5"),
    "apgd": ("apgd100",),
    "cw": ("cw30",),
    "fmn": ("fmn100",),
    "ddn": ("ddn100",),
}


def spelled(attacks: Mapping[str, bool], suites: Mapping[str, bool]) -> list[str]:
    """What a user may write, numbers in it being examples.

    Args:
        attacks: names of single attacks, and whether each has steps.
        suites: names of suites, and whether each takes a number of steps.
    """
    names: list[str] = []
    for name, steps in (*attacks.items(), *suites.items()):
        names += _EXAMPLES.get(name, (f"{name}20",)) if steps else (name,)
    return [*names, *ALIASES]
