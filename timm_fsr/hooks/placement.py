"""Placement: where a feature layer can be attached to a timm model."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from timm_fsr.hooks.layout import Layout, Size, measure
from timm_fsr.utils.errors import ImageSizeError, unknown

At = int | str | tuple[int | str, ...] | list[int | str] | None

# Model classes whose `feature_info` names no module with one spatial output: where their last feature map is,
# in order of preference. A negative index counts a list's modules from its end.
_LAST_FEATURE: dict[str, tuple[str, ...]] = {
    "CoaT": ("parallel_blocks.-1.norm14", "serial_blocks4.-1", "serial_blocks4.-2"),
    "CrossVit": ("blocks.-1.blocks.-1",),
    "EfficientViM": ("norm.-1",),
    "EfficientViMDistilled": ("norm.-1",),
    "Gemma4VitClassifier": ("encoder.blocks.-1",),
    "HighResolutionNet": ("final_layer",),
    "MultiScaleVit": ("norm", "stages.-1.blocks.-1.norm1"),
    "PoolingVisionTransformer": ("transformers.-1.blocks.-1", "transformers.-1.blocks.-2"),
    "TNT": ("norm", "blocks.-1.norm_out"),
    "Twins": ("blocks.-1.-1",),
}
# Classes whose tokens are in the order of the image in the last stage only.
_SHUFFLED = ("Hiera",)
_NORMS_WITH_ACT = (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct)
_BATCH = 2  # images in the probe
# Operations by which a token sees others; a class token reads the spatial ones through nothing else.
_MIXING = ("Bmm", "Baddbmm", "ScaledDotProduct", "Convolution")
# How the names in `feature_info` begin that are a stem's and no stage's; "" is TResNet's.
_STEM_NAMES = ("", "act1", "bn1", "conv0", "conv1", "conv_0", "conv_stem", "layer0", "stem", "stem_dct")


@dataclass(frozen=True)
class Place:
    """A module that a feature layer can be hooked onto.

    Attributes:
        name: what users call it ("layer4").
        path: dotted path of the hooked module ("layer4.1").
        layout: of its output.
    """

    name: str
    path: str
    layout: Layout


@dataclass
class Probe:
    """One forward pass of a copy of the model on the meta device, which costs no memory and little time.

    Attributes:
        image_size: (height, width) of the images it was given.
        outputs: of each module, in the order of its calls.
        stem: path of the module that first sees the image.
        result: what the model gave.
    """

    image_size: Size
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    stem: str = ""
    result: Any = None


def find_places(model: nn.Module, at: At, default_at: tuple[int | str, ...]) -> tuple[list[Place], str]:
    """Resolve `at` to places, and find the module that first sees the image.

    Raises:
        ValueError: see `timm_fsr.attach`.
    """
    probe = run_probe(model)
    if at is None:
        return _default_places(model, probe, default_at), probe.stem
    tokens = tuple(at) if isinstance(at, (list, tuple)) else (at,)
    if not tokens:
        raise ValueError("at=() names no place; give feature_info indices such as (-1,), 'stages' or module names")
    places = [place for token in tokens for place in _places(model, probe, token)]
    twice = [path for path, count in Counter(place.path for place in places).items() if count > 1]
    if twice:
        raise ValueError(f"at={at!r} names the module {twice[0]!r} twice; name each place once")
    return places, probe.stem


def pretrained_cfg_of(model: nn.Module) -> Mapping[str, Any]:
    """The `pretrained_cfg` of a timm model, not a copy; empty for a model that timm did not build."""
    config = getattr(model, "pretrained_cfg", None)
    return {} if config is None else config


def run_probe(model: nn.Module) -> Probe:
    """Run a weightless copy of `model` once in eval mode and note every module's output.

    Raises:
        ValueError: the model does not run on an image of its own input size.
    """
    channels, *image_size = _input_size(model)
    probe = Probe(image_size=(image_size[0], image_size[1]))
    weightless = _meta_copy(model).eval().requires_grad_(True)
    set_checkpointing = getattr(weightless, "set_grad_checkpointing", None)
    if set_checkpointing is not None:
        set_checkpointing(False)
    for path, module in weightless.named_modules():
        module.register_forward_pre_hook(functools.partial(_note_stem, probe, path))
        module.register_forward_hook(functools.partial(_note_output, probe, path))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = torch.zeros(_BATCH, channels, *probe.image_size, dtype=dtype, device="meta", requires_grad=True)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            probe.result = weightless(images.clone())
    except Exception as error:
        raise ImageSizeError(
            f"{type(model).__name__} does not run on images of its input size {tuple(images.shape[1:])} "
            f"({type(error).__name__}: {error}); feature layers attach to models that map images to logits"
        ) from error
    return probe


def _default_places(model: nn.Module, probe: Probe, default_at: tuple[int | str, ...]) -> list[Place]:
    """The layer's own default; the last stage moves back to the nearest earlier place that works.

    So do the blocks of the last stage where it has none, or one that cannot reach the logits; "stages" are those that
    work: a layer at each stage of a ViT that pools its class token leaves out the last.
    """
    info = [entry["module"] for entry in _feature_info(model)]
    if default_at == (-1,) and info and not _last_features(model):
        return [_first_place(model, probe, info[::-1])]
    if default_at == ("stages",):
        return _working_places(model, probe) or _default_places(model, probe, (-1,))
    try:
        return [place for token in default_at for place in _places(model, probe, token)]
    except ValueError:
        if default_at != ("blocks:-1",):
            raise
        return _default_places(model, probe, (-1,))


def _places(model: nn.Module, probe: Probe, token: int | str) -> list[Place]:
    """The places that one entry of `at` stands for."""
    if token == -1 and (names := _last_features(model)):
        return [_first_place(model, probe, names)]
    return [_place(model, probe, name) for name in _names(model, token)]


def _working_places(model: nn.Module, probe: Probe) -> list[Place]:
    """The stages that a feature layer can be hooked onto."""
    places = []
    for name in _names(model, "stages") if _feature_info(model) else ():
        try:
            places.append(_place(model, probe, name))
        except ValueError:
            continue
    return places


def _first_place(model: nn.Module, probe: Probe, names: list[str]) -> Place:
    """The first of `names` that works; where none does, the reason of the first."""
    first_error: ValueError | None = None
    for name in names:
        try:
            return _place(model, probe, name)
        except ValueError as error:
            first_error = first_error or error
    assert first_error is not None, names
    raise first_error


def _last_features(model: nn.Module) -> list[str]:
    """The modules of `_LAST_FEATURE` that this model has, if its class is listed."""
    found = []
    for pattern in _LAST_FEATURE.get(type(model).__name__, ()):
        path = ""
        for part in pattern.split("."):
            children = list(dict(model.get_submodule(path).named_children()))
            if part.startswith("-"):
                part = children[int(part)] if len(children) >= -int(part) else part
            if part not in children:
                break
            path = f"{path}.{part}".lstrip(".")
        else:
            found.append(path)
    return found


def _names(model: nn.Module, token: int | str) -> list[str]:
    """The module names that one entry of `at` stands for."""
    if isinstance(token, bool) or not isinstance(token, (int, str)):
        raise ValueError(f"at contains {token!r}; give feature_info indices, 'stages', 'blocks:-1' or module names")
    info = [entry["module"] for entry in _feature_info(model)]
    if isinstance(token, int):
        return [_indexed(model, info, token)]
    if token == "stages":
        if not info:
            raise ValueError(f"{type(model).__name__} has no feature_info; name modules instead of 'stages'")
        return [name for name in info if name.split(".")[0] not in _STEM_NAMES] or info
    if token.startswith("blocks:"):
        return _blocks(model, info, token)
    known = [name for name, _ in model.named_modules() if name]
    if token not in known:
        raise ValueError(unknown(f"module of {type(model).__name__}", token, known))
    return [token]


def _indexed(model: nn.Module, info: list[str], index: int) -> str:
    if not -len(info) <= index < len(info):
        places = ", ".join(f"{i}: {name}" for i, name in enumerate(info)) or "it has none; name modules instead"
        raise ValueError(f"at index {index} is not in the feature_info of {type(model).__name__} ({places})")
    return info[index]


def _blocks(model: nn.Module, info: list[str], token: str) -> list[str]:
    """The names of the blocks of one stage."""
    try:
        stage = _indexed(model, info, int(token.removeprefix("blocks:")))
    except ValueError as error:
        raise ValueError(f"at={token!r} does not name a stage; write 'blocks:' and an index: {error}") from error
    module = _module(model, stage)
    for name in ("", ".blocks", ".layers"):
        container = getattr(module, name[1:], None) if name else module
        if isinstance(container, (nn.Sequential, nn.ModuleList)) and len(container):
            return [f"{stage}{name}.{child}" for child in dict(container.named_children())]
    raise ValueError(f"{stage!r} of {type(model).__name__} has no list of blocks; name modules instead of {token!r}")


def _place(model: nn.Module, probe: Probe, name: str) -> Place:
    """Measure the place called `name`; ValueError where a feature layer would be useless or impossible."""
    where = f"{name!r} of {type(model).__name__}"
    path = _last_leaf(model, name)
    outputs = probe.outputs.get(path, [])
    if len(outputs) != 1:
        count = f"is called {len(outputs)} times" if outputs else "is not used as a module"
        raise ValueError(f"{where} {count} in a forward pass; choose a module that runs exactly once")
    (output,) = outputs
    entry = next((e for e in _feature_info(model) if e["module"] == name), {})
    layout = None
    if isinstance(output, Tensor) and output.shape[:1] == (_BATCH,):  # windows of an image are no image
        prefer = str(getattr(model, "output_fmt", "NCHW"))
        layout = measure(output.shape, probe.image_size, entry.get("num_chs"), entry.get("reduction"), prefer)
        layout = layout or measure(output.shape, probe.image_size, prefer=prefer)
    if layout is None:
        given = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ValueError(
            f"{where} gives an output {given}, not one spatial feature map for images of {probe.image_size}; "
            "choose another module by name"
        )
    if type(model).__name__ in _SHUFFLED and layout.channels != model.num_features:
        raise ValueError(f"{where} gives tokens in another order than the image's; choose a module of the last stage")
    _check_reach(model, probe, name, layout, output)
    return Place(name, path, layout)


def _check_reach(model: nn.Module, probe: Probe, name: str, layout: Layout, output: Tensor) -> None:
    """ValueError unless the logits depend on the spatial part of `output`."""
    site = output.grad_fn
    reached = {narrow for node, narrow in _nodes_behind(probe.result, layout.prefix_tokens) if node is site}
    if not reached:
        raise ValueError(f"{name!r} of {type(model).__name__} has no influence on the logits; choose an earlier module")
    if reached == {True}:
        info = _feature_info(model)
        last = bool(info) and name == info[-1]["module"]
        spot, remedy = ("on its last block", "at=(-2,)") if last else (f"at {name!r}", "an earlier module")
        raise ValueError(
            f"{_architecture(model)} pools its class token, so a site {spot} cannot reach the logits; "
            f"use {remedy} or global_pool='avg'"
        )


def _nodes_behind(result: Any, prefix_tokens: int) -> set[tuple[Any, bool]]:
    """The operations `result` was computed from, each with whether it gave no more than its prefix tokens."""
    queue = [(tensor.grad_fn, False) for tensor in _tensors(result)]
    seen: set[tuple[Any, bool]] = set()
    while queue:
        node, narrow = queue.pop()
        if node is None or (node, narrow) in seen:
            continue
        seen.add((node, narrow))
        narrow = _picks_prefix(node, prefix_tokens) or (narrow and not node.name().startswith(_MIXING))
        queue += [(parent, narrow) for parent, _ in node.next_functions]
    return seen


def _picks_prefix(node: Any, prefix_tokens: int) -> bool:
    """Whether an operation keeps nothing but the first `prefix_tokens` tokens, or fewer, of (N, L, C)."""
    if not node.name().startswith(("Select", "Slice")):
        return False
    end = node._saved_end if node.name().startswith("Slice") else node._saved_index + 1
    return node._saved_dim == 1 and len(node._saved_self_sym_sizes) == 3 and end <= prefix_tokens


def _last_leaf(model: nn.Module, name: str) -> str:
    """The module that is hooked for the one called `name`, and has the same output.

    Plain Sequentials give way to their last child: under gradient checkpointing timm calls the children. A BatchNorm
    with an activation gives way to that, which conversions (SyncBatchNorm, freezing) hand on to the norm they make. A
    BatchNorm without one, which they replace, gives way to the Sequential around it where that is one of several, which
    checkpointing calls as a whole (ConvMixer).
    """
    module, around = _module(model, name), ""
    while True:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
            child, module = list(module.named_children())[-1]
        elif isinstance(module, _NORMS_WITH_ACT) and isinstance(module.act, nn.Module):
            child, module = "act", module.act
        elif around and isinstance(module, nn.BatchNorm2d) and isinstance(_parent(model, around), nn.Sequential):
            return around
        else:
            return name
        name, around = f"{name}.{child}", name


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"feature_info of {type(model).__name__} names {name!r}, which is no module of it; name modules instead"
        ) from None


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    return [dict(entry) for entry in getattr(info, "info", info)]


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images the model was built for."""
    config = pretrained_cfg_of(model)
    channels, height, width = config.get("input_size") or (3, 224, 224)
    image_size = getattr(model, "_traits", {}).get("img_size") or (height, width)
    return getattr(model, "in_chans", None) or channels, *image_size


def _architecture(model: nn.Module) -> str:
    return pretrained_cfg_of(model).get("architecture") or type(model).__name__


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without its weights, nor what it caches from them; the live model is not touched."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _note_stem(probe: Probe, path: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Remember the first module inside the model that is given an image."""
    first = inputs[0] if inputs else None
    if path and not probe.stem and isinstance(first, Tensor) and first.shape[2:] == probe.image_size:
        probe.stem = path


def _note_output(probe: Probe, path: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    """Keep the output, and hand on a copy: what becomes of the copy shows what a hook here would change."""
    if isinstance(output, Tensor):
        output = output.clone()
    probe.outputs.setdefault(path, []).append(output)
    return output


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]
