"""The classes by which transformers loads, fine-tunes and saves our models; the folders stay timm's and ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from timm_fsr.data.decoding import MODES
from timm_fsr.data.pictures import to_mode
from timm_fsr.hooks.site import layer_groups
from timm_fsr.hooks.tape import record
from timm_fsr.models.description import numbered_names
from timm_fsr.models.pixel import per_channel
from timm_fsr.models.remote_code import ENTRIES, MODEL_TYPE, MODELLING, modelling_code
from timm_fsr.models.saving import check_architecture, remove_stale
from timm_fsr.models.weights import CONFIG, RECORD, WEIGHTS, check_digest, check_record, make_record

try:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    from transformers.conversion_mapping import PrefixChange, register_checkpoint_conversion_mapping
    from transformers.image_transforms import to_pil_image
    from transformers.image_utils import make_flat_list_of_images
    from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification
    from transformers.utils import cached_file
except ImportError as error:
    raise ImportError(
        f"timm_fsr's models work with transformers 5.24 or newer, which is not installed here ({error}); install it by "
        '`pip install "timm-fsr[transformers]"`'
    ) from error

_OF_A_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_SHARDED = f"{WEIGHTS}.index.json"


class TimmFsrConfig(TimmWrapperConfig):
    """A saved model's `config.json` as transformers sees it; written again, it is one for timm and for us."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a saved model, with the names of its classes wherever they stand in it.

        Args:
            config_dict: content of `config.json`.
            **kwargs: transformers' own, such as `num_labels` and `id2label`.

        Raises:
            ValueError: it needs a newer timm_fsr, or is damaged.
        """
        values = copy.deepcopy(dict(config_dict))
        check_record(values, str(kwargs.get("name_or_path") or CONFIG))
        own = values.get("pretrained_cfg") or {}
        (values.get("model_args") or {}).pop("num_classes", None)  # num_labels says it, and may say otherwise
        given = [place.pop("label_names", None) for place in (values, own)]
        own.pop("label_descriptions", None)
        names = numbered_names(next((names for names in given if names), None))
        if names and len(names) == values.get("num_classes", len(names)):
            values["label_names"] = list(names)
        if kwargs.get("id2label"):  # else the old number would win, and number the new names
            kwargs.setdefault("num_labels", len(kwargs["id2label"]))
        found = super().from_dict(values, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.__dict__.pop("label_names", None)  # id2label has them, and may be changed
        return found

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: the names of the classes only where somebody has given them."""
        values: dict[str, Any] = super().to_dict()
        if tuple(values.get("label_names") or ()) in _unnamed(self.num_labels):
            del values["label_names"]
        return values

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the code for transformers is not copied from the class, it is always the same file."""


class TimmFsrForImageClassification(TimmWrapperForImageClassification):
    """A saved model as an image classifier of transformers; `timm_model` is timm's, feature layers included.

    In training mode the loss is the cross-entropy plus the feature layers' own losses, in eval mode the cross-entropy.
    """

    config_class = TimmFsrConfig

    def __init__(self, config: Any) -> None:
        check_architecture(config.to_dict(), config.name_or_path or "the configuration")
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """What transformers loads, once the weights have the checksum that was saved with them.

        Args:
            pretrained_model_name_or_path: a folder or a repository of the Hub.
            *args: transformers' own.
            **kwargs: transformers' own.

        Raises:
            ValueError: the weights are damaged or were exchanged.
        """
        config = kwargs.get("config")
        if not isinstance(config, TimmFsrConfig):
            named = {key: kwargs[key] for key in _OF_A_DOWNLOAD if key in kwargs}
            config = TimmFsrConfig.from_pretrained(pretrained_model_name_or_path, **named)
        _check_weights(pretrained_model_name_or_path, config, kwargs)
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        _restore_constants(model.timm_model)
        model._note_origin(str(pretrained_model_name_or_path))
        return found

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits, and with `labels` the loss.

        Args:
            pixel_values: images (N, C, H, W) as the image processor gives them, normalised.
            labels: (N,) true classes.
            **kwargs: transformers' own.

        Returns:
            An `ImageClassifierOutput`, or a tuple with `return_dict=False`.
        """
        if labels is None or not self.training or not layer_groups(self.timm_model):
            return super().forward(pixel_values, labels=labels, **kwargs)
        labels = labels.to(self.device)
        with record(self.timm_model, labels) as tape:
            output = super().forward(pixel_values, labels=labels, **kwargs)
        logits = output[1] if isinstance(output, tuple) else output.logits
        own = sum(tape.losses(logits, labels).values())
        if isinstance(output, tuple):
            return (output[0] + own, *output[1:])
        output.loss = output.loss + own
        return output

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as timm, timm_fsr and transformers load it, with the checksum of the weights that were written.

        Args:
            save_directory: a folder; a report, recipe or model card in it is removed, for it is about other weights.
            *args: transformers' own.
            push_to_hub: push the folder when it is complete.
            **kwargs: transformers' own.

        Raises:
            ValueError: the weights were to be split into several files, which timm does not read.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and not getattr(self, "_hf_peft_config_loaded", False):
            self._complete(Path(save_directory))
        if push_to_hub:
            given = {key: kwargs[key] for key in ("commit_message", "token", "create_pr", "private") if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, **given)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: the code for transformers is not copied from the class, it is always the same file."""

    def _complete(self, folder: Path) -> None:
        """Make what transformers has written a saved model of ours."""
        if (folder / _SHARDED).is_file():
            raise ValueError(
                f"{folder} now has its weights in several files, which timm does not read; save the model again with a "
                "larger max_shard_size"
            )
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        before = config.get(RECORD) or {}
        kept = {key: before[key] for key in ("license", "origin") if key in before}
        config[RECORD] = {**make_record(folder / WEIGHTS, imports=before.get("imports", ())), **kept}
        (folder / CONFIG).write_text(json.dumps({**config, **ENTRIES}, indent=2), encoding="utf-8")
        (folder / MODELLING).write_bytes(modelling_code())
        remove_stale(folder)

    def _note_origin(self, name: str) -> None:
        """Remember from which repository the weights are, for what is saved of the model."""
        if not Path(name).is_dir():
            noted = getattr(self.config, RECORD, None) or {}
            setattr(self.config, RECORD, {**noted, "origin": {"name": name, "hub_id": name}})


class TimmFsrImageProcessor(TimmWrapperImageProcessor):
    """Makes pictures, in any mode and of any size, what the model was made to see: also grey ones for one channel.

    Args:
        pretrained_cfg: of the saved model.
        architecture: of the saved model.
        model_args: of the saved model; they may say another size and number of channels than the architecture's.
        **kwargs: further entries of `config.json`.

    Raises:
        ValueError: the model takes neither 1 nor 3 channels.
    """

    def __init__(
        self,
        pretrained_cfg: Mapping[str, Any],
        architecture: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        del kwargs  # nothing in them tells how pictures are prepared
        arguments, config = dict(model_args or {}), dict(pretrained_cfg)
        channels, *sides = config["input_size"]
        channels, size = arguments.get("in_chans") or channels, arguments.get("img_size") or sides
        if channels not in MODES:
            raise ValueError(f"the model takes images of {channels} channels, but pictures have 1 (grey) or 3 (RGB)")
        config["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
        for key in ("mean", "std"):
            config[key] = tuple(per_channel(config[key], channels, key).tolist())
        super().__init__(pretrained_cfg=config, architecture=architecture)
        self.channels = channels

    def preprocess(self, images: Any, return_tensors: Any = "pt") -> Any:
        """The model's input, `pixel_values` (N, C, H, W).

        Args:
            images: one or several pictures or arrays, or a tensor (C, H, W) or (N, C, H, W) in [0, 1].
            return_tensors: "pt".
        """
        if isinstance(images, Tensor):
            return super().preprocess(_with_channels(images, self.channels), return_tensors)
        pictures = [to_mode(to_pil_image(one), self.channels) for one in make_flat_list_of_images(images)]
        return super().preprocess(pictures, return_tensors)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoImageProcessor") -> None:
        """Nothing: the code for transformers is not copied from the class, it is always the same file."""


def register() -> None:
    """Make transformers find these classes by `model_type`, without `trust_remote_code`; twice does nothing new."""
    register_checkpoint_conversion_mapping(MODEL_TYPE, [PrefixChange(prefix_to_add="timm_model")], overwrite=True)
    AutoConfig.register(MODEL_TYPE, TimmFsrConfig, exist_ok=True)
    AutoModelForImageClassification.register(TimmFsrConfig, TimmFsrForImageClassification, exist_ok=True)
    AutoImageProcessor.register(TimmFsrConfig, TimmFsrImageProcessor, exist_ok=True)


def _check_weights(name: Any, config: Any, options: Mapping[str, Any]) -> None:
    """Refuse weights that are not those that the configuration is of; transformers finds the file."""
    digest = (getattr(config, RECORD, None) or {}).get("sha256")
    if digest is None or options.get("state_dict") is not None:
        return
    named = {key: options[key] for key in _OF_A_DOWNLOAD if options.get(key) is not None}
    named["revision"] = getattr(config, "_commit_hash", None) or named.get("revision")
    path = cached_file(name, WEIGHTS, **named)
    assert path is not None, "cached_file raises where there is none"
    check_digest(Path(path), digest, str(name))


def _restore_constants(model: nn.Module) -> None:
    """Compute again what no file has: constants of feature layers. transformers builds models without any numbers."""
    for site in (site for group in layer_groups(model) for site in group.sites):
        layer, saved = site.layer, site.layer.state_dict()
        constants = {name: buffer for name, buffer in layer.named_buffers() if name not in saved}
        if not constants:
            continue
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            classes = int(getattr(model, "num_classes", 0) or 0)
            fresh = dict(type(layer)(site.layout.channels, classes, **layer.resolved_args()).named_buffers())
        for name, buffer in constants.items():
            buffer.copy_(fresh[name])


def _unnamed(classes: int) -> list[tuple[str, ...]]:
    """The names that transformers makes up for classes without any: numbered labels, ImageNet's descriptions."""
    found = [tuple(f"LABEL_{number}" for number in range(classes))]
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset:
        info = ImageNetInfo(subset)
        described = info.label_descriptions(as_dict=True)
        found.append(tuple(described[name] for name in info.label_names()))
    return found


def _with_channels(images: Tensor, channels: int) -> Tensor:
    """Images (..., C, H, W) as grey or RGB, by the weights that Pillow takes."""
    if images.shape[-3] == channels:
        return images
    if channels == 3 and images.shape[-3] == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    if channels == 1 and images.shape[-3] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device).view(3, 1, 1)
        return (images * weights).sum(-3, keepdim=True)
    raise ValueError(
        f"images of {images.shape[-3]} channels are neither grey nor RGB; give tensors (N, {channels}, H, W) in [0, 1]"
    )


register()
