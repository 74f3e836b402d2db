"""Which epoch's model is the best one, and when to stop looking for a better one."""

from __future__ import annotations

from dataclasses import dataclass

_FALL = 0.1  # a robust accuracy that falls by so much ...
_SHARE = 0.5  # ... to less than this share of the best one has collapsed


@dataclass
class Selection:
    """The best validation so far, by robust accuracy, then clean accuracy, then the earlier one.

    Attributes:
        robust: its robust accuracy (PGD), in [0, 1].
        clean: its clean accuracy.
        one_step: its accuracy under a single-step attack, where that was measured.
        epoch: when it was, counted from 1; 0 before the first.
        stale: validations since then.
    """

    robust: float = -1.0
    clean: float = -1.0
    one_step: float | None = None
    epoch: int = 0
    stale: int = 0

    def update(self, epoch: int, robust: float, clean: float, one_step: float | None = None) -> bool:
        """Take note of a validation; whether it is the best so far."""
        if (robust, clean) <= (self.robust, self.clean):
            self.stale += 1
            return False
        self.robust, self.clean, self.one_step, self.epoch, self.stale = robust, clean, one_step, epoch, 0
        return True

    def collapsed(self, robust: float, one_step: float | None) -> bool:
        """Whether one-step training has overfitted catastrophically (Wong et al., 2020, arXiv 2001.03994).

        Robust accuracy under several steps has lost half of its best value and at least ten points, while the
        accuracy under one step is higher than it was then.
        """
        if one_step is None or self.one_step is None:
            return False
        return robust < _SHARE * self.robust and self.robust - robust >= _FALL and one_step > self.one_step
