"""A site: the hook on one block of a model that calls a feature layer."""

from __future__ import annotations

import itertools
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn

from timm_fsr.hooks.layout import Layout, Size
from timm_fsr.layers import FeatureLayer
from timm_fsr.layers.base import Aux
from timm_fsr.layers.scope import CALL, RECORDINGS, SURROGATES, Call, innermost

if TYPE_CHECKING:
    from timm_fsr.hooks.tape import Tape

BYPASS, IDENTITY = "bypass", "identity"

_SIZES: ContextVar[tuple[tuple[int, Size], ...]] = ContextVar("timm_fsr_sizes", default=())
_MOST_SIZES = 16  # models that one forward pass may interleave
_numbers = itertools.count()


class Passed(NamedTuple):
    """What a forward pass was run with; its recomputation (gradient checkpointing) is run with the same."""

    labels: Tensor | None = None
    call: Call = Call(wants_aux=False, surrogate=None)
    stand_in: str | None = None
    image_size: Size | None = None


@dataclass(eq=False)
class Site:
    """One feature layer at one module: converts the layout once each way and writes to the tape.

    A plain object kept in the hooked module's `__dict__`, so that copies of the model own copies of it. It owns no
    layer: that is registered once, in the group at the model's root, and looked up there in each call, so that
    whatever takes a layer's place (a wrapper, a compiled one) takes effect.

    Attributes:
        name: what users call the place ("layer4").
        path: of the hooked module ("layer4.1").
        layout: of its output.
        key: of the layer in the group.
        group: at the root of the model.
        passed: what the last pass was run with.
        compiled: the last pass ran in compiled code, which nobody hears.
    """

    name: str
    path: str
    layout: Layout
    key: str
    group: LayerGroup
    passed: Passed = field(default_factory=Passed)
    compiled: bool = False

    @property
    def layer(self) -> FeatureLayer:
        """The layer that stands at the root now, or a wrapper that passes on what it is asked for."""
        return cast(FeatureLayer, self.group[self.key])

    def __call__(self, output: Tensor) -> Tensor:
        """Replace the hooked module's `output`, in its own layout, by the feature layer's."""
        if torch.compiler.is_compiling():
            self.compiled = True
            return self._compiled(output)
        self.compiled = False
        if isinstance(output, torch.fx.Proxy):
            return self._traced(output)
        if _in_backward():  # the tape is gone by then, and the thread is another on a GPU
            return self._apply(output, self.passed)[0]
        heard = HEARD.get()
        if heard is not None:
            heard.sites.add(self)
        layer, tape = self.layer, self.group.tape
        passed = Passed(
            labels=None if tape is None else tape.labels,
            call=Call(wants_aux=tape is not None, surrogate=getattr(layer, "surrogate", None)),
            stand_in=self.group.surrogate,
            image_size=self.group.image_size if self.layout.kind == "NLC" else None,
        )
        self.passed = passed
        new, aux = self._apply(output, passed)
        if tape is not None and passed.stand_in != BYPASS:
            tape.write(self, aux)
        return new

    def _apply(self, output: Tensor, passed: Passed) -> tuple[Tensor, Aux]:
        """The hooked module's new output and the auxiliary ones, by what one pass is run with."""
        if passed.stand_in == BYPASS:
            return output, {}
        layer = self.layer
        wants_aux = layer.training or passed.call.wants_aux
        if isinstance(layer, FeatureLayer):
            layer.wants_aux = wants_aux
        feature = self.layout.to_nchw(output, passed.image_size)
        token = CALL.set(passed.call._replace(wants_aux=wants_aux))  # for this thread, not for others at the same time
        try:
            new, aux = layer(feature, passed.labels)
        finally:
            CALL.reset(token)
        return self._finish(output, feature, new, passed.stand_in), aux

    def _compiled(self, output: Tensor) -> Tensor:
        """The same without context variables set, which torch.compile does not trace; it runs no recomputation."""
        layer, group = self.layer, self.group
        tape, stand_in = group.tape, group.surrogate
        if stand_in == BYPASS:
            return output
        if isinstance(layer, FeatureLayer):
            layer.wants_aux = layer.training or tape is not None
        feature = self.layout.to_nchw(output, group.image_size if self.layout.kind == "NLC" else None)
        new, aux = layer(feature, None if tape is None else tape.labels)
        if tape is not None:
            tape.write(self, aux)
        return self._finish(output, feature, new, stand_in)

    def _traced(self, output: Tensor) -> Tensor:
        """The same for a stand-in of the feature, as `torch.fx` traces it: the plain pass of eval mode.

        Raises:
            ValueError: the layer, or the order of the features, depends on what only a tensor knows.
        """
        try:
            return self._apply(output, Passed(image_size=self.group.image_size))[0]
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace the {self.layer.name} layer at {self.path!r} ({error}); use torch.export"
            ) from error

    def _finish(self, output: Tensor, feature: Tensor, new: Tensor, stand_in: str | None) -> Tensor:
        if stand_in == IDENTITY:  # its value, and the gradient of doing nothing
            new = feature + (new - feature).detach()
        return self.layout.from_nchw(new, output)


class Heard:
    """The sites that were called in one eager pass of the model `root`; `outer` is the pass around it."""

    def __init__(self, root: nn.Module, outer: Heard | None) -> None:
        self.root, self.sites = root, set[Site]()
        while outer is not None and outer.root is root:  # an earlier pass, which an exception ended
            outer = outer.outer
        self.outer: Heard | None = outer


HEARD: ContextVar[Heard | None] = ContextVar("timm_fsr_heard", default=None)


class LayerGroup(nn.ModuleDict):
    """The layers of one `attach`, registered at the model's root under the layer's name.

    Attributes:
        sites: where each layer sits.
        stem: path of the module that first sees the image.
        base_architecture: what the model was called before.
        number: no other group of this process has it.
        compiled_size: (height, width) of the input that compiled code saw last, until eager code sees one.
    """

    sites: list[Site]
    stem: str
    base_architecture: str | None = None
    number: int
    compiled_size: Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.number = next(_numbers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: its input is another than the original's."""
        super().__setstate__(state)
        self.number = next(_numbers)

    @property
    def tape(self) -> Tape | None:
        """Who is recording in this thread, if anybody."""
        scope = innermost(RECORDINGS, self)
        return None if scope is None else scope.value

    @property
    def surrogate(self) -> str | None:
        """Says "bypass" or "identity" while an attack in this thread works around the layers; see `surrogates`."""
        scope = innermost(SURROGATES, self)
        return None if scope is None else scope.value

    @property
    def image_size(self) -> Size | None:
        """(height, width) of this thread's current input; kept only for models with token sequences."""
        if self.compiled_size is not None:
            return self.compiled_size
        for number, size in _SIZES.get():
            if number == self.number:
                return size
        return None

    def note_image_size(self, size: Size) -> None:
        """Hear (height, width) of the input."""
        if torch.compiler.is_compiling():  # which reads it again in the same graph, whatever other threads do
            self.compiled_size = size
            return
        self.compiled_size = None
        others = [entry for entry in _SIZES.get() if entry[0] != self.number]
        _SIZES.set(((self.number, size), *others[: _MOST_SIZES - 1]))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a layer; `group[name] = layer` calls this.

        Raises:
            ValueError: it is no feature layer, nor does it pass on what one is asked for.
        """
        if not hasattr(module, "aux_losses"):
            raise ValueError(
                f"{type(module).__name__} cannot be the feature layer {name!r}; give a timm_fsr.FeatureLayer, or a "
                "wrapper of one that passes on its attributes"
            )
        super().add_module(name, module)

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
    return torch._C._current_graph_task_id() != -1
