"""Feature layers: one file each, found by name."""

from timm_fsr.layers.afd import Disentangler
from timm_fsr.layers.base import FeatureLayer, layer_class, list_layers, register_layer
from timm_fsr.layers.cas import CAS
from timm_fsr.layers.cifs import CIFS
from timm_fsr.layers.fsr import FSR
from timm_fsr.layers.hfdr import HFDR

__all__ = [
    "CAS",
    "CIFS",
    "FSR",
    "HFDR",
    "Disentangler",
    "FeatureLayer",
    "layer_class",
    "list_layers",
    "register_layer",
]
