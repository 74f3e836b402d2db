"""A site: the hook on one block of a model that calls a feature layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from timm_fsr.hooks.layout import Layout, Size
from timm_fsr.layers import FeatureLayer

if TYPE_CHECKING:
    from timm_fsr.hooks.tape import Tape


@dataclass(eq=False)
class Site:
    """One feature layer at one module: converts the layout once each way and writes to the group's tape.

    A plain object kept in the hooked module's `__dict__`, so that copies of the model own copies of it, while its
    layer is registered once, at the model's root.
    """

    name: str
    path: str
    layout: Layout
    layer: FeatureLayer
    group: LayerGroup
    labels: Tensor | None = None  # of the last pass, for its recomputation

    def __call__(self, output: Tensor) -> Tensor:
        """Replace the hooked module's `output`, in its own layout, by the feature layer's."""
        tape = self.group.tape
        recomputing = _in_backward()
        if not recomputing:
            self.labels = None if tape is None else tape.labels
        # A recomputation (gradient checkpointing) must do what its pass did, though the tape is gone by then.
        wanted = self.layer.wants_aux if recomputing else tape is not None
        self.layer.wants_aux = self.layer.training or wanted
        if self.group.surrogate == "bypass":
            return output
        feature = self.layout.to_nchw(output, self.group.image_size)
        new, aux = self.layer(feature, self.labels)
        if self.group.surrogate == "identity":  # its value, and the gradient of doing nothing
            new = feature + (new - feature).detach()
        if tape is not None and not recomputing:
            tape.write(self, aux)
        return self.layout.from_nchw(new, output)


class LayerGroup(nn.ModuleDict):
    """The layers of one `attach`, registered at the model's root under the layer's name.

    Attributes:
        sites: where each layer sits.
        stem: path of the module that first sees the image.
        tape: who is recording, if anybody.
        image_size: (height, width) of the current input, kept only for models with token sequences.
        base_architecture: what the model was called before.
        surrogate: "bypass" or "identity" while an attack works around the layers; see `timm_fsr.surrogates`.
    """

    sites: list[Site]
    stem: str
    tape: Tape | None = None
    image_size: Size | None = None
    base_architecture: str | None = None
    surrogate: str | None = None

    def reset_classifier(self, num_classes: int) -> None:
        """Give every layer's auxiliary classifier `num_classes` classes."""
        for site in self.sites:
            site.layer.reset_classifier(num_classes)

    def __prepare_scriptable__(self) -> None:
        """Called by `torch.jit.script`, which would fail on the hooks with an error that names no remedy."""
        raise ValueError("feature layers use forward hooks, which torch.jit.script does not support; use torch.export")


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The groups of feature layers anywhere inside `model`, in the order they were attached."""
    return [module for module in model.modules() if isinstance(module, LayerGroup)]


def _in_backward() -> bool:
    """Whether this forward pass is a recomputation inside a backward pass, as gradient checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
