"""Feature Separation and Recalibration for any timm image model.

With this package imported timm has the variants `<architecture>_fsr`: they are registered at once where timm is
imported already, else when it is. The public names are imported when they are first used: the command line's help needs
none of them.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import timm_fsr.utils.openmp  # noqa: F401  (first: torch reads what it sets when it is loaded)

# isort: split
from timm_fsr.utils.imports import when_imported
from timm_fsr.version import __version__

if TYPE_CHECKING:
    from timm_fsr.attacks.apgd import APGD
    from timm_fsr.attacks.base import attack_mode, register_attack
    from timm_fsr.attacks.minimum_norm import DDN, FMN
    from timm_fsr.attacks.pgd import FGSM, NFGSM, PGD
    from timm_fsr.data.dataset import ImageData, load_data
    from timm_fsr.evaluation.benchmark import assess
    from timm_fsr.evaluation.corruptions import corrupt
    from timm_fsr.evaluation.evaluator import evaluate
    from timm_fsr.evaluation.gradient_masking import gather_evidence
    from timm_fsr.evaluation.prediction import predict
    from timm_fsr.evaluation.registry import Stage, Suite, register_suite
    from timm_fsr.evaluation.saved_images import rescore
    from timm_fsr.hooks.attach import attach, detach, reattach
    from timm_fsr.hooks.tape import record
    from timm_fsr.hub.publish import push_to_hub
    from timm_fsr.hub.robustbench import model_info, register_alias
    from timm_fsr.layers import FSR, FeatureLayer, list_layers, register_layer
    from timm_fsr.models.conversion import convert_official
    from timm_fsr.models.export import export
    from timm_fsr.models.pixel import PixelModel
    from timm_fsr.models.pretrained import list_pretrained
    from timm_fsr.models.saving import from_pretrained, round_weights, save_pretrained
    from timm_fsr.models.variants import register_pretrained, register_variants
    from timm_fsr.reports.report import Report
    from timm_fsr.training.objectives import AFD, AT, MART, TRADES, Natural, Objective, register_objective
    from timm_fsr.training.recipe import Recipe
    from timm_fsr.training.step import InterruptedRunError
    from timm_fsr.training.trainer import train
    from timm_fsr.utils.errors import UnsoundError

_LATER = {
    "AFD": "training.objectives",
    "APGD": "attacks.apgd",
    "AT": "training.objectives",
    "DDN": "attacks.minimum_norm",
    "FGSM": "attacks.pgd",
    "FMN": "attacks.minimum_norm",
    "FSR": "layers",
    "FeatureLayer": "layers",
    "ImageData": "data.dataset",
    "InterruptedRunError": "training.step",
    "MART": "training.objectives",
    "NFGSM": "attacks.pgd",
    "Natural": "training.objectives",
    "Objective": "training.objectives",
    "PGD": "attacks.pgd",
    "PixelModel": "models.pixel",
    "Recipe": "training.recipe",
    "Report": "reports.report",
    "Stage": "evaluation.registry",
    "Suite": "evaluation.registry",
    "TRADES": "training.objectives",
    "UnsoundError": "utils.errors",
    "assess": "evaluation.benchmark",
    "attach": "hooks.attach",
    "attack_mode": "attacks.base",
    "convert_official": "models.conversion",
    "corrupt": "evaluation.corruptions",
    "detach": "hooks.attach",
    "evaluate": "evaluation.evaluator",
    "export": "models.export",
    "from_pretrained": "models.saving",
    "gather_evidence": "evaluation.gradient_masking",
    "list_layers": "layers",
    "list_pretrained": "models.pretrained",
    "load_data": "data.dataset",
    "model_info": "hub.robustbench",
    "predict": "evaluation.prediction",
    "push_to_hub": "hub.publish",
    "reattach": "hooks.attach",
    "record": "hooks.tape",
    "register_alias": "hub.robustbench",
    "register_attack": "attacks.base",
    "register_layer": "layers",
    "register_objective": "training.objectives",
    "register_pretrained": "models.variants",
    "register_suite": "evaluation.registry",
    "register_variants": "models.variants",
    "rescore": "evaluation.saved_images",
    "round_weights": "models.saving",
    "save_pretrained": "models.saving",
    "train": "training.trainer",
}

__all__ = [
    "AFD",
    "APGD",
    "AT",
    "DDN",
    "FGSM",
    "FMN",
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
    "export",
    "from_pretrained",
    "gather_evidence",
    "list_layers",
    "list_pretrained",
    "load_data",
    "model_info",
    "predict",
    "push_to_hub",
    "reattach",
    "record",
    "register_alias",
    "register_attack",
    "register_layer",
    "register_objective",
    "register_pretrained",
    "register_suite",
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


def __dir__() -> list[str]:
    """The public names, whether or not they have been used."""
    return sorted(__all__)


def _register_in_transformers() -> None:
    """Let transformers find our models; an older one than they work with goes on without them."""
    with suppress(ImportError):
        import_module("timm_fsr.models.for_transformers")


when_imported("timm", lambda: import_module("timm_fsr.models.variants"))
for _place in ("modeling_auto", "image_processing_auto"):  # where it looks classes up; imported where they are used
    when_imported(f"transformers.models.auto.{_place}", _register_in_transformers)
