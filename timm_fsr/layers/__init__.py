"""Feature layers: one file each, found by name."""

from timm_fsr.layers.base import FeatureLayer, layer_class, list_layers, register_layer
from timm_fsr.layers.fsr import FSR

__all__ = ["FSR", "FeatureLayer", "layer_class", "list_layers", "register_layer"]
