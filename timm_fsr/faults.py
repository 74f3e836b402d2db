"""Faults: what must not happen while a model runs, and what to do about it."""


class UnsoundError(RuntimeError):
    """Neither bad input nor a bug of torch: a result that would mean nothing, as of a layer that is not reached."""
