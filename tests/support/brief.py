"""Attacks with a fraction of their steps, for tests of what surrounds them."""

from __future__ import annotations

from typing import Any

import pytest


def brief_autoattack(patch: pytest.MonkeyPatch) -> None:
    """Give the reference implementation of AutoAttack few steps and queries, whoever uses it."""
    import pyautoattack

    class Brief(pyautoattack.AutoAttack):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = attack.n_iter_orig = 10  # the second is for L1, in which steps are shared out
            self.square.n_queries = 200

    patch.setattr(pyautoattack, "AutoAttack", Brief)
