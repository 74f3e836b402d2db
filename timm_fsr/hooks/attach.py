"""Attaching feature layers to the blocks of a timm model, and detaching them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_fsr.hooks.placement import At, find_places, pretrained_cfg_of
from timm_fsr.hooks.site import HEARD, Heard, LayerGroup, Site
from timm_fsr.layers import layer_class, list_layers
from timm_fsr.layers.base import FeatureLayer, check_layer_args
from timm_fsr.layers.scope import RECORDINGS, innermost
from timm_fsr.utils.errors import UnsoundError
from timm_fsr.utils.memory import check_memory

Model = TypeVar("Model", bound=nn.Module)
_SITES = "_timm_fsr_sites"  # attribute of a hooked module: the sites it serves
_GROUPS = "_timm_fsr_groups"  # attribute of the module that first sees the image: whom to tell its size


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
            the logits; the layer is attached already; the model is wrapped, or being recorded. The model is left as it
            was.
    """
    if not isinstance(layer, str):
        raise ValueError(
            f"layer={layer!r} names no feature layer; give one of {', '.join(list_layers())}, or leave the model as it "
            "is instead of calling attach"
        )
    cls = layer_class(layer)
    args = dict(layer_args or {})
    check_layer_args(cls, args)
    _check_bare(model)
    if hasattr(model, layer):
        raise ValueError(
            f"the model has a member called {layer!r} already; call timm_fsr.detach(model) first, then attach again"
        )
    if innermost(RECORDINGS, model) is not None:
        raise ValueError("record(model) is open, and would not hear the new layers; attach before it, or after its end")
    with torch.inference_mode(False):  # inside it no gradient would tell places apart, and no layer could ever learn
        places, stem = find_places(model, at, cls.default_at)
        group = LayerGroup()
        group.sites, group.stem = [], stem
        num_classes = int(getattr(model, "num_classes", 0) or 0)
        _check_size(cls, [place.layout.channels for place in places], num_classes, args)
        for index, place in enumerate(places):
            new = cls(place.layout.channels, num_classes, **args)
            new.take_place(index, len(places))
            key = place.name.replace(".", "_")
            group[key] = new
            group.sites.append(Site(place.name, place.path, place.layout, key, group))
        group.to(*_device_and_dtype(model)).train(model.training)
    group.base_architecture = pretrained_cfg_of(model).get("architecture")
    _register_first(model, layer, group)
    _hook(model, group)
    _describe(model, layer, group)
    _forget_compiled()
    return model


def _check_size(cls: type[FeatureLayer], widths: Sequence[int], num_classes: int, args: Mapping[str, Any]) -> None:
    """Refuse layers for feature maps of these `widths` that no memory holds; on the meta device they cost nothing."""
    given = ", ".join(f"{key}={value}" for key, value in args.items())
    remedy = f"change the layer's arguments ({given or 'the defaults'}), or attach it in fewer or narrower places"
    try:
        with torch.device("meta"):
            layers = nn.ModuleList(cls(channels, num_classes, **args) for channels in widths)
    except RuntimeError as error:
        if "overflow" not in str(error):  # a layer of the user's that needs numbers to be built
            return
        raise ValueError(f"feature layers {cls.name!r} of this size cannot be built; {remedy}") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*layers.parameters(), *layers.buffers()))
    check_memory(needed, f"feature layers {cls.name!r} of this size", remedy)


def detach(model: Model) -> Model:
    """Remove every feature layer, in place: the base model again, bit for bit.

    Returns:
        The same model; unchanged if nothing was attached.
    """
    root = _root(model)
    for name, group in _own_groups(root).items():
        delattr(root, name)
        config = pretrained_cfg_of(root)
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
    """Hook the sites again, onto the modules that now stand at their paths, after a conversion replaced some.

    Returns:
        The same model.
    """
    root = _root(model)
    _unhook(root)
    for group in _own_groups(root).values():
        _hook(root, group)
    _forget_compiled()
    return model


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
        group.note_image_size((inputs[0].shape[-2], inputs[0].shape[-1]))


def begin_pass(root: nn.Module, _: Any) -> None:
    """Forward pre-hook of the model: listen for its sites. In compiled code nobody hears: look once, in tracing.

    Raises:
        UnsoundError: compiled code would leave a layer out, as its module was replaced; torch puts it into an error of
            its own.
    """
    if torch.compiler.is_compiling():
        _check_traced(root)
    else:
        HEARD.set(Heard(root, HEARD.get()))


def end_pass(root: nn.Module, _: Any, __: Any) -> None:
    """Forward hook of the model: refuse logits that went past a feature layer.

    Raises:
        UnsoundError: a site was not called, as its module was replaced or is not run any more.
    """
    if torch.compiler.is_compiling():
        return
    heard = HEARD.get()
    if heard is None or heard.root is not root:  # an outer part of this pass is compiled
        return
    HEARD.set(heard.outer)
    for group in _own_groups(root).values():
        for site in group.sites:
            if site not in heard.sites and not site.compiled:
                raise UnsoundError(_told_silent(site))


def check_sites(model: nn.Module) -> None:
    """Refuse a model in which a feature layer has lost its module to a conversion.

    Raises:
        UnsoundError: a module with a site was replaced.
    """
    root = _root(model)
    for group in _own_groups(root).values():
        for site in group.sites:
            try:
                module = root.get_submodule(site.path)
            except AttributeError:
                module = nn.Module()
            if not any(site in vars(inner).get(_SITES, ()) for inner in module.modules()):
                raise UnsoundError(_told_silent(site))


_check_traced = torch.compiler.assume_constant_result(check_sites)  # called while code is traced, not traced itself


def rebuilding_args(model: nn.Module) -> dict[str, Any]:
    """The `_model_args` that build the layers which stand at the root now, whatever was attached once.

    Raises:
        ValueError: no arguments build them: they differ from site to site, or something else took a layer's place.
    """
    root = _root(model)
    args = dict(getattr(root, "_model_args", {}))
    for name, group in _own_groups(root).items():
        args = {key: value for key, value in args.items() if not key.startswith(f"{name}_")}
        resolved = group.sites[0].layer.resolved_args()
        for index, site in enumerate(group.sites):
            layer = site.layer
            with torch.device("meta"):
                fresh = layer_class(name)(site.layout.channels, int(getattr(root, "num_classes", 0) or 0), **resolved)
                fresh.take_place(index, len(group.sites))
            own = {key.replace("_orig_mod.", ""): value for key, value in layer.state_dict().items()}
            if layer.resolved_args() != resolved or layer.name != name or _shapes(own) != _shapes(fresh.state_dict()):
                raise ValueError(
                    f"the {type(layer).__name__} at model.{name}[{site.key!r}] cannot be saved: timm_fsr.attach builds "
                    f"{layer_class(name).__name__} with the same arguments at each site, and this is something else; "
                    "put such a layer there (merge or unwrap adapters, save before quantisation)"
                )
        args |= {f"{name}_{key}": value for key, value in resolved.items()}
    return args


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


def _told_silent(site: Site) -> str:
    return (
        f"the {site.layer.name} layer at {site.path!r} was left out of the forward pass: a conversion (such as "
        "SyncBatchNorm's, or timm.utils.freeze) has replaced that module; call timm_fsr.reattach(model) after it, or "
        "timm_fsr.detach(model) for the plain model"
    )


def _check_bare(model: nn.Module) -> None:
    """Refuse a wrapper: its own forward, or code compiled earlier, would pass by what is attached to it."""
    if any(name in model._modules for name in ("_orig_mod", "module")):
        raise ValueError(f"{type(model).__name__} wraps a model; attach feature layers to the model, then wrap it")


def _forget_compiled() -> None:
    """Let torch.compile look again: it does not notice when hooks come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _hook(model: nn.Module, group: LayerGroup) -> None:
    if begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(begin_pass)
        model.register_forward_hook(end_pass)
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
            (module._forward_pre_hooks, begin_pass, None),
            (module._forward_hooks, end_pass, None),
        ):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
            if attribute:
                module.__dict__.pop(attribute, None)


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
    config = pretrained_cfg_of(model)
    if isinstance(config, dict) and group.base_architecture:
        config["architecture"] = f"{group.base_architecture}_{layer}"
    watch_classifier(model)


def watch_classifier(model: nn.Module) -> None:
    """Make `model.reset_classifier` reset auxiliary classifiers too, and forget the names of the classes before."""
    if hasattr(type(model), "reset_classifier"):
        model.__dict__["reset_classifier"] = functools.partial(_reset_classifier, model)


def _reset_classifier(model: nn.Module, num_classes: int, *args: Any, **kwargs: Any) -> None:
    where = _device_and_dtype(model)
    type(model).reset_classifier(model, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    config = pretrained_cfg_of(model)
    if isinstance(config, dict):
        for key in ("label_names", "label_descriptions"):
            config.pop(key, None)
    for group in _own_groups(model).values():
        group.reset_classifier(num_classes)
        group.to(*where)


def _root(model: nn.Module) -> nn.Module:
    """The module inside `model` that the groups are registered at."""
    return next((module for module in model.modules() if _own_groups(module)), model)


def _own_groups(model: nn.Module) -> dict[str, LayerGroup]:
    return {name: child for name, child in model.named_children() if isinstance(child, LayerGroup)}


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return tensor.device, tensor.dtype
