"""Feature layers: one file each, found by name."""

from timm_fsr.layers.base import FeatureLayer, layer_class, list_layers, register_layer
from timm_fsr.layers.denoise import Denoise
from timm_fsr.layers.fpcm import FPCM
from timm_fsr.layers.fsr import FSR
from timm_fsr.layers.kwta import KWTA
from timm_fsr.layers.sap import SAP

__all__ = [
    "FPCM",
    "FSR",
    "KWTA",
    "SAP",
    "Denoise",
    "FeatureLayer",
    "layer_class",
    "list_layers",
    "register_layer",
]
