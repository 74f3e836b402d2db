"""Training objectives: one file each, found by name."""

from timm_fsr.training.objectives.afd import AFD
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.base import OBJECTIVES, LossTerms, Objective, register_objective, unwrapped
from timm_fsr.training.objectives.mart import MART
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.trades import TRADES

__all__ = [
    "AFD",
    "AT",
    "MART",
    "OBJECTIVES",
    "TRADES",
    "LossTerms",
    "Natural",
    "Objective",
    "register_objective",
    "unwrapped",
]
