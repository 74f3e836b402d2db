"""Feature Separation and Recalibration for any timm image model.

Importing the package registers the variants `<architecture>_fsr` in timm. What needs accelerate, datasets or
jsonargparse is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_fsr.apgd import APGD
from timm_fsr.attacks import FGSM, NFGSM, PGD, attack_mode
from timm_fsr.convert import convert_official
from timm_fsr.layers import FSR, FeatureLayer, list_layers, register_layer
from timm_fsr.models import list_pretrained, register_pretrained, register_variants  # and registers the timm variants
from timm_fsr.objectives import AFD, AT, MART, TRADES, Natural, Objective
from timm_fsr.pixels import PixelModel
from timm_fsr.sites import attach, detach, reattach
from timm_fsr.tape import record
from timm_fsr.version import __version__

if TYPE_CHECKING:
    from timm_fsr.assessment import assess
    from timm_fsr.corruptions import corrupt
    from timm_fsr.data import ImageData, load_data
    from timm_fsr.engine import InterruptedRunError, train
    from timm_fsr.evaluation import evaluate
    from timm_fsr.evidence import gather_evidence
    from timm_fsr.faults import UnsoundError
    from timm_fsr.hub import from_pretrained, save_pretrained
    from timm_fsr.leaderboard import model_info, register_alias
    from timm_fsr.publishing import push_to_hub
    from timm_fsr.recipe import Recipe
    from timm_fsr.report import Report
    from timm_fsr.rescoring import rescore
    from timm_fsr.rounding import round_weights
    from timm_fsr.stages import Stage, Suite

_LATER = {
    "ImageData": "data",
    "InterruptedRunError": "engine",
    "Recipe": "recipe",
    "Report": "report",
    "Stage": "stages",
    "Suite": "stages",
    "UnsoundError": "faults",
    "assess": "assessment",
    "corrupt": "corruptions",
    "evaluate": "evaluation",
    "from_pretrained": "hub",
    "gather_evidence": "evidence",
    "load_data": "data",
    "model_info": "leaderboard",
    "push_to_hub": "publishing",
    "register_alias": "leaderboard",
    "rescore": "rescoring",
    "round_weights": "rounding",
    "save_pretrained": "hub",
    "train": "engine",
}

__all__ = [
    "AFD",
    "APGD",
    "AT",
    "FGSM",
    "FSR",
    "MART",
    "NFGSM",
    "PGD",
    "TRADES",
    "FeatureLayer",
    "ImageData",
    "InterruptedRunError",
    "Natural",
    "Objective",
    "PixelModel",
    "Recipe",
    "Report",
    "Stage",
    "Suite",
    "UnsoundError",
    "__version__",
    "assess",
    "attach",
    "attack_mode",
    "convert_official",
    "corrupt",
    "detach",
    "evaluate",
    "from_pretrained",
    "gather_evidence",
    "list_layers",
    "list_pretrained",
    "load_data",
    "model_info",
    "push_to_hub",
    "reattach",
    "record",
    "register_alias",
    "register_layer",
    "register_pretrained",
    "register_variants",
    "rescore",
    "round_weights",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use what `import timm_fsr` leaves out."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
