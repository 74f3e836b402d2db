"""Sites: feature layers hooked onto the blocks of a timm model, and the tape they write to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_fsr.faults import UnsoundError
from timm_fsr.layers import FeatureLayer, layer_class
from timm_fsr.layers.base import Aux, check_layer_args
from timm_fsr.layout import Layout, Size
from timm_fsr.places import At, find_places

Model = TypeVar("Model", bound=nn.Module)
_SITES = "_timm_fsr_sites"  # attribute of a hooked module: the sites it serves
_GROUPS = "_timm_fsr_groups"  # attribute of the module that first sees the image: whom to tell its size


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


class Tape(Mapping[str, SimpleNamespace]):
    """What the sites had to say during the last forward pass inside `record`.

    A mapping from the site's name ("layer4") to its auxiliary tensors as attributes (`.mask`, (N, C, H, W)). Where
    two kinds of layer share a place, the name is qualified ("fsr.layer4").
    """

    def __init__(self, groups: list[LayerGroup], labels: Tensor | None) -> None:
        self.labels = labels
        self._sites = [site for group in groups for site in group.sites]
        self._aux: dict[str, tuple[Site, Aux]] = {}

    def write(self, site: Site, aux: Aux) -> None:
        """Keep what `site` says; a later forward pass replaces it."""
        self._aux[f"{site.layer.name}.{site.name}"] = (site, aux)

    def losses(self, logits: Tensor, labels: Tensor | None = None, *, rows: slice | None = None) -> dict[str, Tensor]:
        """Auxiliary loss terms, each averaged over the sites of its layer: {"fsr.separation": scalar, ...}.

        Args:
            logits: (N, classes), the model's output of the recorded pass.
            labels: (N,) true classes; those given to `record` when left out. Empty result without feature layers.
            rows: the part of the recorded batch that `logits` and `labels` are of, where it is not the whole.

        Raises:
            ValueError: no labels, or auxiliary heads of another width than the logits.
            UnsoundError: a site did not fire, or its layer would learn nothing from these losses.
        """
        labels = self.labels if labels is None else labels
        if labels is None:
            raise ValueError("auxiliary losses need labels; give them to record(model, labels) or to losses()")
        terms: dict[str, list[Tensor]] = {}
        for site, recorded in self.recorded():
            aux = recorded if rows is None else {name: value[rows] for name, value in recorded.items()}
            losses = site.layer.aux_losses(aux, logits.float(), labels)
            if logits.requires_grad:
                _check_gradients(site, losses)
            for name, value in losses.items():
                terms.setdefault(f"{site.layer.name}.{name}", []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def recorded(self) -> list[tuple[Site, Aux]]:
        """Each site with its auxiliary tensors; UnsoundError as from `check_fired`."""
        self.check_fired()
        return list(self._aux.values())

    def check_fired(self) -> None:
        """Raise UnsoundError, naming the remedy, when a site has not been heard since the tape began."""
        silent = [s for s in self._sites if f"{s.layer.name}.{s.name}" not in self._aux]
        if silent:
            raise UnsoundError(
                f"the {silent[0].layer.name} site at {silent[0].path!r} did not fire; run a forward pass inside "
                "record(), and if a conversion (such as SyncBatchNorm's) replaced the module, call "
                "timm_fsr.reattach(model) after it"
            )

    def __getitem__(self, name: str) -> SimpleNamespace:
        matches = [aux for key, (site, aux) in self._aux.items() if name in (key, site.name)]
        if len(matches) != 1:
            reason = "is ambiguous" if matches else "has recorded nothing"
            raise KeyError(f"site {name!r} {reason}; recorded: {', '.join(self._aux) or 'none'}")
        return SimpleNamespace(**matches[0])

    def __iter__(self) -> Iterator[str]:
        names = [site.name for site, _ in self._aux.values()]
        return iter(names if len(set(names)) == len(names) else list(self._aux))

    def __len__(self) -> int:
        return len(self._aux)


def attach(
    model: Model,
    layer: str = "fsr",
    *,
    at: At = None,
    layer_args: Mapping[str, Any] | None = None,
) -> Model:
    """Hook feature layers onto a timm model, in place.

    Attach before wrapping the model (`torch.compile`, DDP) and before making optimizers. The model stays an
    `images -> logits` function.

    Args:
        model: a model made by `timm.create_model`, in training or eval mode, on any device.
        layer: name of a registered feature layer; see `timm_fsr.list_layers()`.
        at: where: `feature_info` indices (-1 is the last stage), "stages" (each), "blocks:-1" (each block of the
            last stage), module names, or a tuple of these. Default: the layer's own `default_at`, moved to a place
            that can reach the logits where necessary.
        layer_args: the layer's keyword arguments by name; the others keep their defaults.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown layer, argument or place; a place with no single spatial output, or that cannot reach
            the logits; the layer is attached already; or the model is wrapped. The model is left as it was.
    """
    cls = layer_class(layer)
    args = dict(layer_args or {})
    check_layer_args(cls, args)
    _check_bare(model)
    if hasattr(model, layer):
        raise ValueError(
            f"the model has a member called {layer!r} already; call timm_fsr.detach(model) first to attach anew"
        )
    places, stem = find_places(model, at, cls.default_at)
    group = LayerGroup()
    group.sites, group.stem = [], stem
    num_classes = int(getattr(model, "num_classes", 0) or 0)
    for index, place in enumerate(places):
        new = cls(place.layout.channels, num_classes, **args)
        new.take_place(index, len(places))
        group[place.name.replace(".", "_")] = new
        group.sites.append(Site(place.name, place.path, place.layout, new, group))
    group.to(*_device_and_dtype(model)).train(model.training)
    group.base_architecture = _architecture(model)
    _register_first(model, layer, group)
    _hook(model, group)
    _describe(model, layer, group)
    _forget_compiled()
    return model


def detach(model: Model) -> Model:
    """Remove every feature layer, in place: the base model again, bit for bit.

    Returns:
        The same model; unchanged if nothing was attached.
    """
    root = _root(model)
    for name, group in _own_groups(root).items():
        delattr(root, name)
        config = getattr(root, "pretrained_cfg", None)
        if isinstance(config, dict) and group.base_architecture:
            config["architecture"] = group.base_architecture
        arguments = getattr(root, "_model_args", {})
        for key in [k for k in arguments if k in ("at", "pretrained_backbone") or k.startswith(f"{name}_")]:
            del arguments[key]
    root.__dict__.pop("reset_classifier", None)
    _unhook(root)
    _forget_compiled()
    return model


def reattach(model: Model) -> Model:
    """Hook the sites anew onto the modules that now stand at their paths, after a conversion replaced some.

    Returns:
        The same model.
    """
    root = _root(model)
    _unhook(root)
    for group in _own_groups(root).values():
        _hook(root, group)
    _forget_compiled()
    return model


@contextmanager
def record(model: nn.Module, labels: Tensor | None = None) -> Iterator[Tape]:
    """Record what the sites say during forward passes, in training or eval mode.

    Under DDP leave `find_unused_parameters` False: it would take what only the tape holds for unused.

    Args:
        model: any module that contains a model with feature layers (compiled, DDP-wrapped, ...) or none.
        labels: (N,) true classes, for layers that use them and as the default of `Tape.losses`.

    Yields:
        The tape; of several forward passes it holds the last.
    """
    groups = layer_groups(model)
    tape = Tape(groups, labels)
    with ExitStack() as undo:
        for group in groups:
            undo.callback(setattr, group, "tape", group.tape)
            group.tape = tape
        yield tape


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The groups of feature layers anywhere inside `model`, in the order they were attached."""
    return [module for module in model.modules() if isinstance(module, LayerGroup)]


def apply_sites(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Forward hook: pass a module's output through its sites.

    A module-level function that finds its sites through the module, so that deepcopy, pickle and EMA copies call
    their own layers.

    Raises:
        RuntimeError: the module is a copy made by `nn.DataParallel`, which knows nothing of the copies of the layers.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "feature layers do not work in torch.nn.DataParallel on several GPUs; use DistributedDataParallel "
            "(torchrun or `accelerate launch`), or one GPU"
        )
    for site in getattr(module, _SITES):
        output = site(output)
    return output


def note_image_size(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of the module that first sees the image: tell the groups its height and width."""
    for group in getattr(module, _GROUPS):
        group.image_size = (inputs[0].shape[-2], inputs[0].shape[-1])


def _check_bare(model: nn.Module) -> None:
    """Refuse a wrapper: its own forward, or code compiled earlier, would pass by what is attached to it."""
    if any(name in model._modules for name in ("_orig_mod", "module")):
        raise ValueError(f"{type(model).__name__} wraps a model; attach feature layers to the model, then wrap it")


def _forget_compiled() -> None:
    """Let torch.compile look again: it does not notice when hooks come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _hook(model: nn.Module, group: LayerGroup) -> None:
    for site in group.sites:
        module = model.get_submodule(site.path)
        _append_to(module, _SITES, site)
        if apply_sites not in module._forward_hooks.values():
            module.register_forward_hook(apply_sites)
    if any(site.layout.kind == "NLC" for site in group.sites):
        stem = model.get_submodule(group.stem)
        _append_to(stem, _GROUPS, group)
        if note_image_size not in stem._forward_pre_hooks.values():
            stem.register_forward_pre_hook(note_image_size)


def _append_to(module: nn.Module, attribute: str, value: Any) -> None:
    setattr(module, attribute, (*getattr(module, attribute, ()), value))


def _unhook(model: nn.Module) -> None:
    for module in model.modules():
        for hooks, function, attribute in (
            (module._forward_hooks, apply_sites, _SITES),
            (module._forward_pre_hooks, note_image_size, _GROUPS),
        ):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
            module.__dict__.pop(attribute, None)


def _check_gradients(site: Site, losses: dict[str, Tensor]) -> None:
    """Refuse losses from which a layer that is being trained would silently learn nothing."""
    trains = any(parameter.requires_grad for parameter in site.layer.parameters())
    if trains and losses and not any(loss.requires_grad for loss in losses.values()):
        raise UnsoundError(
            f"the auxiliary outputs of the {site.layer.name} site at {site.path!r} were recorded without gradients, "
            "as reentrant gradient checkpointing does; call timm.layers.set_reentrant_ckpt(False) and run it again"
        )


def _register_first(model: nn.Module, name: str, group: LayerGroup) -> None:
    """Register the group before the model's own members, so that the head's tensors stay the last parameters.

    `timm.models.model_parameters(exclude_head=True)` drops the last two.
    """
    own = dict(model._modules)
    setattr(model, name, group)
    for key in own:
        model._modules[key] = model._modules.pop(key)


def _describe(model: nn.Module, layer: str, group: LayerGroup) -> None:
    """Make exports rebuild the model: architecture name, resolved arguments, and resets that reach the heads."""
    first = group.sites[0].layer
    model._model_args = {  # type: ignore[assignment]
        **getattr(model, "_model_args", {}),
        "at": [site.name for site in group.sites],
        **{f"{layer}_{key}": value for key, value in first.resolved_args().items()},
    }
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and group.base_architecture:
        config["architecture"] = f"{group.base_architecture}_{layer}"
    if hasattr(type(model), "reset_classifier"):
        model.__dict__["reset_classifier"] = functools.partial(_reset_classifier, model)


def _reset_classifier(model: nn.Module, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """The model's own `reset_classifier`, which then resets the auxiliary classifiers too."""
    where = _device_and_dtype(model)
    type(model).reset_classifier(model, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    for group in _own_groups(model).values():
        group.reset_classifier(num_classes)
        group.to(*where)


def _root(model: nn.Module) -> nn.Module:
    """The module inside `model` that the groups are registered at."""
    return next((module for module in model.modules() if _own_groups(module)), model)


def _own_groups(model: nn.Module) -> dict[str, LayerGroup]:
    return {name: child for name, child in model.named_children() if isinstance(child, LayerGroup)}


def _architecture(model: nn.Module) -> str | None:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture")


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return tensor.device, tensor.dtype


def _in_backward() -> bool:
    """Whether this forward pass is a recomputation inside a backward pass, as gradient checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
