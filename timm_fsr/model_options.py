"""The part of a recipe that says which model is trained, and builds it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from timm_fsr.hub import is_trained, load, resolve
from timm_fsr.layers import layer_class
from timm_fsr.layers.base import check_layer_args
from timm_fsr.sites import attach
from timm_fsr.tape import layer_groups


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is trained.

    Attributes:
        name: a timm architecture, or a trained model (a folder, "local-dir:folder", "hf-hub:user/name", or a tag of
            this package such as "resnet_tiny_cifar_fsr.at_fashion_mnist").
        layer: the feature layer to put on it ("fsr"); null trains it as it is. This line alone decides what is
            compared: the next two describe layers and say nothing of a plain model.
        at: places, as in `timm_fsr.attach` (-1, stages, [layer3, layer4]); null takes the layer's own.
        layer_args: keyword arguments of each layer by its name: {fsr: {hidden: 16}}.
        args: further keyword arguments of `timm.create_model`.
        pretrained: start from timm's weights of the backbone.
    """

    name: str = "resnet_tiny_cifar"
    layer: str | None = "fsr"
    at: list[int | str] | int | str | None = None
    layer_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether it begins with trained weights."""
        return self.pretrained or is_trained(resolve(self.name))

    def check(self) -> None:
        """Raise ValueError for a model, layer, place or argument that does not exist, without building weights.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
        """
        if self.layer == "none":
            raise ValueError("model.layer=none is no layer; write null for the model as it is")
        for name in (*self.layer_args, *filter(None, [self.layer])):
            check_layer_args(layer_class(name), self._args_of(name))
        if not is_trained(resolve(self.name)):
            with torch.device("meta"):
                dataclasses.replace(self, pretrained=False).build(num_classes=10)

    def build(self, *, num_classes: int, image_size: tuple[int, int, int] | None = None) -> nn.Module:
        """The model for `num_classes` classes of images of (channels, height, width) `image_size`.

        Raises:
            ValueError: see `check`.
        """
        name = resolve(self.name)
        trained = is_trained(name)
        arguments: dict[str, Any] = {"num_classes": num_classes, **self.args}
        if image_size is not None:
            if trained or self.pretrained:  # weights exist: timm adapts their first layer
                arguments.setdefault("in_chans", image_size[0])
            else:  # the new weights' configuration says what images they are for
                arguments.setdefault("pretrained_cfg_overlay", _image_config(name, image_size))
        variant = f"{name.split('.')[0]}_{self.layer}"
        if self.layer is not None and not trained and timm.is_model(variant):
            arguments |= {f"{self.layer}_{key}": value for key, value in self._args_of(self.layer).items()}
            backbone = self.pretrained and (name.partition(".")[2] or True)
            return load(variant, at=self.at, pretrained_backbone=backbone, **arguments)
        model = load(name, **({} if trained else {"pretrained": self.pretrained}), **arguments)
        if self.layer is None or self._has_layer(model, self.layer):
            return model
        return attach(model, self.layer, at=self.at, layer_args=self._args_of(self.layer))

    def _has_layer(self, model: nn.Module, layer: str) -> bool:
        """Whether the model came with the layer; ValueError if with other arguments than those asked for."""
        present = [s.layer.resolved_args() for g in layer_groups(model) for s in g.sites if s.layer.name == layer]
        other = present and any(present[0][key] != value for key, value in self._args_of(layer).items())
        if other or (present and self.at is not None):
            raise ValueError(
                f"{self.name} has the layer {layer!r} already, built with {present[0]}; leave out model.at and "
                f"model.layer_args.{layer} (over a recipe that has them: --model.at=null --model.layer_args={{}}), or "
                "name a model without it"
            )
        return bool(present)

    def _args_of(self, layer: str) -> dict[str, Any]:
        args = self.layer_args.get(layer, {})
        if not isinstance(args, dict):
            raise ValueError(
                f"model.layer_args.{layer} is {args!r}; write arguments by the name of their layer, such as "
                "layer_args: {fsr: {hidden: 16}}"
            )
        return args


def _image_config(name: str, image_size: tuple[int, int, int]) -> dict[str, Any]:
    """The part of a timm `pretrained_cfg` that depends on the images; grey ones get the average mean and std."""
    config = get_pretrained_cfg(name) or PretrainedCfg()
    statistics = {"mean": config.mean, "std": config.std}
    if len(config.mean) != image_size[0]:
        statistics = {key: (sum(values) / len(values),) * image_size[0] for key, values in statistics.items()}
    return {"input_size": image_size, **statistics}
