"""Feature layers: one file each, found by name."""

from timm_fsr.layers.afd import Disentangler
from timm_fsr.layers.base import FeatureLayer, layer_class, list_layers, register_layer
from timm_fsr.layers.cas import CAS
from timm_fsr.layers.cifs import CIFS
from timm_fsr.layers.denoise import Denoise
from timm_fsr.layers.fpcm import FPCM
from timm_fsr.layers.fsr import FSR
from timm_fsr.layers.hfdr import HFDR
from timm_fsr.layers.kwta import KWTA
from timm_fsr.layers.sap import SAP

__all__ = [
    "CAS",
    "CIFS",
    "FPCM",
    "FSR",
    "HFDR",
    "KWTA",
    "SAP",
    "Denoise",
    "Disentangler",
    "FeatureLayer",
    "layer_class",
    "list_layers",
    "register_layer",
]
