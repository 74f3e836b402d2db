"""Feature layers: one file each, found by name."""

from timm_fsr.layers.base import LAYERS, FeatureLayer, layer_class, list_layers, register_layer
from timm_fsr.layers.fsr import FSR

__all__ = ["FSR", "LAYERS", "FeatureLayer", "layer_class", "list_layers", "register_layer"]
