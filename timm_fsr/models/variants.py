"""Registered variants: every supported timm architecture with a feature layer on it, as a timm entrypoint."""

from __future__ import annotations

import functools
import gc
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import is_scriptable
from timm.models import DefaultCfg, PretrainedCfg, model_entrypoint
from timm.models import _builder as timm_builder
from timm.models import _registry as timm_registry
from timm.models._builder import pretrained_cfg_for_features, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._registry import register_model
from torch import nn

from timm_fsr.hooks.attach import attach, watch_classifier
from timm_fsr.hooks.placement import At, pretrained_cfg_of
from timm_fsr.hooks.site import LayerGroup, layer_groups
from timm_fsr.layers import LAYERS, layer_class
from timm_fsr.layers.base import check_layer_args
from timm_fsr.models import cifar as _cifar  # noqa: F401  (registers the CIFAR-size networks)
from timm_fsr.models.description import forget_other_classes
from timm_fsr.models.pretrained import TAGS, Pretrained, embedded_pretrained, list_pretrained, read_pretrained
from timm_fsr.models.weights import StateDict, load_weights, told_by_version

__all__: list[str] = []  # timm's registry adds every entrypoint
default_cfgs: dict[str, DefaultCfg] = {}

# Layers that get a variant of every architecture.
VARIANT_LAYERS = tuple(LAYERS.own_names())

# Architectures that get no variant, and why (benchmarks/architectures.py finds them).
UNSUPPORTED: dict[str, str] = dict.fromkeys(
    (
        "deepseek_vit_412m_enc",
        "gemma4_vit_167m_enc",
        "gemma4_vit_570m_enc",
        "mobilenetv5_300m_enc",
        "qwen3_vit_306m_enc",
        "qwen3_vit_416m_enc",
        "qwen3_vit_88m_enc",
    ),
    "an encoder: it gives features, not logits",
)

# The official place of a layer where it is not the last stage: (architecture, layer) -> at.
OFFICIAL_PLACES: dict[tuple[str, str], tuple[int, ...]] = {("vgg16_bn_cifar", "fsr"): (3,)}

# Everything in a pretrained_cfg that says where weights come from.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


def register_variants(layers: Sequence[str] = VARIANT_LAYERS) -> None:
    """Register `<architecture>_<layer>` in timm for each supported architecture; twice does nothing new.

    Importing this package does it for the layers that come with it, `register_layer` for a layer of your own.

    Args:
        layers: names of feature layers; they have to be registered only when such a model is built.
    """
    listed = __all__.copy()
    with _uncollected():
        for base in timm.list_models():
            if base in UNSUPPORTED or base in default_cfgs:  # a variant is no base of others
                continue
            config = timm_registry._model_pretrained_cfgs.get(base) or PretrainedCfg()
            bare = {**vars(config), **dict.fromkeys(_SOURCES), "custom_load": False, "tag": None}
            for name, layer in ((f"{base}_{layer}", layer) for layer in layers):
                if name not in globals():
                    __all__.clear()  # timm looks each name up in it, which would take longer with every name
                    _register(name, base, layer, bare)
                    listed.append(name)
    __all__[:] = listed


def watch_loaded_models() -> None:
    """Let `reset_classifier` forget the names of classes on every model that timm loads with some; twice adds nothing.

    Such a model may have no layer of this package, and so pass through none of its functions before it is saved: after
    `reset_classifier` for as many classes as before nothing else would tell that the names are those of other classes.
    """
    load_pretrained: Callable[..., None] = timm_builder.load_pretrained
    if hasattr(load_pretrained, "__wrapped__"):
        return

    @functools.wraps(load_pretrained)
    def load_and_watch(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        load_pretrained(model, *args, **kwargs)
        if pretrained_cfg_of(model).get("label_names"):
            watch_classifier(model)

    timm_builder.load_pretrained = load_and_watch


def register_pretrained(folder: str | Path) -> str:
    """Make a checkpoint known to timm by the name of its folder, `<architecture>.<tag>`.

    Its weights are those in the folder; without any there, those of the Hub repository of this name in the namespace
    that the environment variable TIMM_FSR_HUB names, which must have the noted checksum.

    Args:
        folder: with `config.json` and `report.json` as `save_pretrained` writes them; it must stay where it is.

    Returns:
        The name: `timm.create_model(name, pretrained=True)` builds the model.

    Raises:
        FileNotFoundError: the folder holds no configuration.
        ValueError: it is damaged, of a network without feature layer, or the name is known already.
    """
    entry = read_pretrained(folder)
    if entry.architecture not in globals():
        raise ValueError(
            f"{entry.architecture} is no network with a feature layer that timm_fsr has registered; plain networks are "
            f"loaded from local-dir:{folder}"
        )
    if entry.name in TAGS and TAGS[entry.name].folder != entry.folder:
        raise ValueError(f"{entry.name} is known already, from {TAGS[entry.name].folder}; use another tag")
    _register_tag(entry)
    return entry.name


def build_variant(
    base: str,
    layer: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_backbone: bool | str = False,
    at: At = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build timm's `base` with `layer` on it; what `timm.create_model(f"{base}_{layer}", ...)` calls.

    Args:
        base: a timm architecture.
        layer: a registered feature layer.
        pretrained: load weights of the whole model, layer included.
        pretrained_cfg: tag or configuration that says where those are, as in `timm.create_model`; the arguments that
            a tag's network was built with are taken where none are given.
        pretrained_cfg_overlay: fields that replace those of the configuration.
        pretrained_backbone: load timm's weights of `base` under a fresh layer: True takes the tag
            of the model's name ("resnet50_fsr.a1_in1k") or the default one, a string names a tag.
        at: see `timm_fsr.attach`.
        features_only: return the feature extractor that timm returns, with the layer at work inside.
        out_indices: of the features wanted.
        cache_dir: where downloads are kept.
        **kwargs: arguments of the layer, prefixed by its name (`fsr_tau=0.2`); the others go to timm's entrypoint.

    Raises:
        ValueError: an unknown layer argument or place, weights that hold no such layer, that differ from the checksum
            saved with them, or that a newer version of this package has saved.
        RuntimeError: `pretrained=True` where no weights of the whole model exist.
        FileNotFoundError: the configuration names a file of weights that is not there.
    """
    variant = f"{base}_{layer}"
    if is_scriptable():
        raise ValueError(f"{variant} uses forward hooks, which torch.jit.script does not support; use torch.export")
    source_args = kwargs.get("pretrained_model_args") or {}
    if pretrained or "pretrained_backbone" in source_args:  # a saved model's own weights replace its backbone's
        pretrained_backbone = False
    if pretrained_backbone is True and isinstance(pretrained_cfg, str):  # "resnet50_fsr.a1_in1k" names the backbone's
        pretrained_backbone, pretrained_cfg = pretrained_cfg, None
    config = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    known = _known(variant, config)
    if known:  # what the tag's network was built with, unless other arguments were given
        kwargs = {**known.model_args, **kwargs}
        at = at if at is not None else known.model_args.get("at")
        kwargs.pop("at", None)
    layer_args = {key.removeprefix(f"{layer}_"): kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{layer}_")}
    with told_by_version(config, cache_dir):
        check_layer_args(layer_class(layer), layer_args)
    if pretrained or pretrained_backbone:
        _check_file(config.get("file"))
    own, backbone = _load_state(base, layer, config, known, cache_dir) if pretrained else ({}, {})
    overlay = {key: value for key, value in config.items() if key not in (*_SOURCES, "architecture", "tag")}
    overlay |= {**dict.fromkeys(_SOURCES), "custom_load": False, "state_dict": backbone or None}
    model = model_entrypoint(base)(
        pretrained=pretrained or bool(pretrained_backbone),
        pretrained_cfg=pretrained_backbone if isinstance(pretrained_backbone, str) else None,
        pretrained_cfg_overlay=pretrained_cfg_overlay if pretrained_backbone else overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    if pretrained_backbone:
        model.pretrained_cfg.pop("state_dict", None)
    else:
        model.pretrained_cfg = {key: value for key, value in config.items() if key != "state_dict"} | {
            "architecture": base
        }
    model.default_cfg = model.pretrained_cfg
    if known:  # so that what is saved of it is complete
        model._model_args = {key: kwargs[key] for key in known.model_args if key in kwargs}
    attach(model, layer, at=at if at is not None else OFFICIAL_PLACES.get((base, layer)), layer_args=layer_args)
    if pretrained:
        _load_layer(getattr(model, layer), own, config["num_classes"], model.num_classes)
    forget_other_classes(model)
    if features_only:
        return _features(model, base, out_indices, kwargs)
    return model


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within it the garbage collector rests: thousands of new objects, all of which stay, would set it off in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _register(name: str, base: str, layer: str, bare: dict[str, Any]) -> None:
    """Make a module-level entrypoint called `name`, with the fields of its base's configuration less the weights.

    There are thousands of variants: the configuration is a plain copy, handed to timm after the entrypoint so that it
    does not copy it again.
    """
    entrypoint = _entrypoint(base, layer)
    entrypoint.__name__ = entrypoint.__qualname__ = name
    globals()[name] = register_model(entrypoint)
    config = object.__new__(PretrainedCfg)
    vars(config).update(bare, architecture=name)
    default_cfgs[name] = DefaultCfg(tags=deque([""]), cfgs={"": config})
    timm_registry._model_default_cfgs[name] = default_cfgs[name]  # type: ignore[assignment]  # timm's slip
    timm_registry._model_pretrained_cfgs[name] = config
    timm_registry._model_with_tags[name].append(name)


def _known(variant: str, config: dict[str, Any]) -> Pretrained | None:
    """The checkpoint of a tag of ours, if the configuration takes its weights from there."""
    entry = TAGS.get(f"{variant}.{config.get('tag')}")
    ours = entry.pretrained_cfg() if entry else None
    return entry if ours and all(config.get(key) == getattr(ours, key) for key in _SOURCES) else None


def _register_tag(entry: Pretrained) -> None:
    """Add a tag to what timm knows of a registered variant; its default stays the configuration without weights."""
    TAGS[entry.name] = entry
    config = entry.pretrained_cfg()
    defaults = default_cfgs[entry.architecture]
    if entry.tag not in defaults.tags:
        defaults.tags.append(entry.tag)
        timm_registry._model_with_tags[entry.architecture].append(entry.name)
    defaults.cfgs[entry.tag] = config
    timm_registry._model_pretrained_cfgs[entry.name] = config
    timm_registry._model_has_pretrained.add(entry.name)


def _entrypoint(base: str, layer: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_variant(base, layer, pretrained=pretrained, **kwargs)

    return build


def _check_file(file: str | None) -> None:
    """Timm's own error for a missing file of weights says nothing."""
    if file and not Path(file).exists():
        raise FileNotFoundError(f"there are no weights at {str(file)!r}; give the path of a .safetensors or .pth file")


def _load_state(
    base: str, layer: str, config: dict[str, Any], known: Pretrained | None, cache_dir: str | None
) -> tuple[StateDict, StateDict]:
    """The weights that `config` names: those of the layer, and those of the network it is on."""
    variant = f"{base}_{layer}"
    state = load_weights(config, cache_dir, known.digest if known else None)
    if state is None:
        tags = [entry.name for entry in list_pretrained() if entry.architecture == variant]
        names = f"a tag ({', '.join(tags)})" if tags else "a tag"
        raise RuntimeError(
            f"no weights of the whole model {variant!r} exist under this name; use pretrained_backbone=True for "
            f"timm's weights under a fresh layer, or {names}, a hub id or a folder that has them"
        )
    own, backbone = _split(state, f"{layer}.")
    if not own and _has_weights(layer):
        raise ValueError(
            f"the weights for {variant} hold no {layer!r} layer; for plain {base} weights under a fresh layer use "
            "pretrained_backbone=True (timm's), or build without weights and load_state_dict(..., strict=False)"
        )
    return own, backbone


def _has_weights(layer: str) -> bool:
    """Whether a layer leaves anything in a state dict; k-WTA and pruning do not."""
    with torch.device("meta"):
        return bool(layer_class(layer)(1, 1).state_dict())


def _split(state: StateDict, prefix: str) -> tuple[StateDict, StateDict]:
    """The entries under `prefix`, without it, and the others."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return own, {key: value for key, value in state.items() if not key.startswith(prefix)}


def _load_layer(group: LayerGroup, state: StateDict, source_classes: int, classes: int) -> None:
    """Load the layers' weights strictly; auxiliary heads for another number of classes start afresh."""
    if source_classes != classes:
        group.reset_classifier(source_classes)
    try:
        group.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split(":", 1)[-1].split())
        raise ValueError(
            "the weights do not fit the feature layer this model was built with; build it with the arguments and "
            f"places of its config.json: {textwrap.shorten(first, 300, placeholder=' ...')}"
        ) from error
    if source_classes != classes:
        group.reset_classifier(classes)


def _features(
    model: nn.Module, base: str, out_indices: int | Sequence[int] | None, kwargs: dict[str, Any]
) -> nn.Module:
    """A getter over the finished model: timm's other feature classes would drop the layers at the root."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{base} has no forward_intermediates, so features_only cannot keep its feature layer; "
            "use the classification model and hook what you need"
        )
    if out_indices is None:
        with torch.device("meta"):
            defaults = model_entrypoint(base)(pretrained=False, features_only=True, **kwargs)
        out_indices = defaults.feature_info.out_indices
    indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
    # timm prunes a final norm that its getter is not asked for; a site may sit on it.
    norm = any(site.path == "norm" for group in layer_groups(model) for site in group.sites)
    features: Any = FeatureGetterNet(model, out_indices=indices, norm=norm)
    features.pretrained_cfg = pretrained_cfg_for_features(getattr(model, "pretrained_cfg", {}))
    features.default_cfg = features.pretrained_cfg
    features.in_chans = getattr(model, "in_chans", None)
    features._traits = dict(getattr(model, "_traits", {}))
    return features


register_variants()
watch_loaded_models()
register_variants(LAYERS.promised_names())
LAYERS.observe(lambda name: register_variants((name,)))


for _entry in embedded_pretrained():
    _register_tag(_entry)
