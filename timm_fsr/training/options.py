"""The sections of a recipe: model, data, attack, objective, optimizer, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from typing_extensions import TYPE_CHECKING  # noqa: UP035  (what stands under typing's own jsonargparse would run)

from timm_fsr.training.parsing import Number
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.memory import check_memory

# The command line shows these keys in its help and refuses wrong ones, which has to take no time: torch, timm and what
# imports them are imported where something is built.
if TYPE_CHECKING:
    import torch
    from timm.scheduler.scheduler import Scheduler
    from torch import nn

    from timm_fsr.attacks.base import Attack
    from timm_fsr.data.augment import Augmentation, ResizedCrop
    from timm_fsr.data.dataset import ImageData, Images
    from timm_fsr.data.timm_augment import TimmAugmentation
    from timm_fsr.training.objectives.base import Objective

Built = TypeVar("Built")

_HELD_OUT = 1000  # images that choose the checkpoint, where there are plenty


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
        from timm_fsr.models.saving import is_trained, resolve

        return self.pretrained or is_trained(resolve(self.name))

    def check(self) -> None:
        """Raise ValueError for a model, layer, place or argument that does not exist, without building weights.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
        """
        import torch

        from timm_fsr.layers import layer_class
        from timm_fsr.layers.base import check_layer_args
        from timm_fsr.models.memory import weight_bytes
        from timm_fsr.models.saving import is_trained, resolve

        if self.layer == "none":
            raise ValueError("model.layer=none is no layer; write null for the model as it is")
        self._check_args()
        for name in (*self.layer_args, *filter(None, [self.layer])):
            check_layer_args(layer_class(name), self._args_of(name))
        if not is_trained(resolve(self.name)):
            with torch.device("meta"):
                model = dataclasses.replace(self, pretrained=False).build(num_classes=10)
            # A gradient and a state of the optimizer come to the weights, but some optimizers do without.
            check_memory(2 * weight_bytes(model), f"the weights and gradients of {self.name}", "choose a smaller one")

    def build(self, *, num_classes: int, image_size: tuple[int, int, int] | None = None) -> nn.Module:
        """The model for `num_classes` classes of images of (channels, height, width) `image_size`.

        Raises:
            ValueError: see `check`.
        """
        import timm

        from timm_fsr.hooks.attach import attach
        from timm_fsr.models.saving import is_trained, load, resolve

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

    def _check_args(self) -> None:
        """Refuse arguments of `timm.create_model` that something else decides, or that make it no classifier."""
        for key, reason in _NOT_ARGS.items():
            if key in self.args:
                raise ValueError(f"model.args.{key}={self.args[key]} cannot be set: {reason}; leave it out")
        if self.args.get("in_chans", 3) not in (1, 3):
            raise ValueError(
                f"model.args.in_chans={self.args['in_chans']} fits no images: these have 1 channel (grey) or 3 (RGB); "
                "leave it out, and set data.channels"
            )
        _check_finite("model.args", self.args)
        weights = self.args.get("checkpoint_path")
        if weights and self.is_trained:
            raise ValueError(
                f"model.args.checkpoint_path={weights} and {self.name if not self.pretrained else 'model.pretrained'} "
                "both bring weights; keep one of the two"
            )
        if weights and not Path(weights).is_file():
            raise FileNotFoundError(f"there is no file {weights}; correct model.args.checkpoint_path or leave it out")

    def _has_layer(self, model: nn.Module, layer: str) -> bool:
        """Whether the model came with the layer; ValueError if with other arguments than those asked for."""
        from timm_fsr.hooks.site import layer_groups

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


# Arguments of `timm.create_model` that a recipe cannot set.
_NOT_ARGS = {
    "num_classes": "the training images decide on the number of classes",
    "pretrained": "model.pretrained says so",
    "features_only": "only a model that maps images to logits can be trained",
    "out_indices": "only a model that maps images to logits can be trained",
    "scriptable": "feature layers are forward hooks, which torch.jit.script does not support",
}


def _check_finite(where: str, values: Mapping[str, Any]) -> None:
    """Refuse NaN and infinities among free arguments, at any depth."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_finite(f"{where}.{key}", value)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{where}.{key}={value} must be a finite number")


def _check_default(section: str, options: Any, key: str, reason: str) -> None:
    """Refuse a key that something else in the recipe leaves without meaning, unless it has its default."""
    value, default = getattr(options, key), getattr(type(options)(), key)
    if value != default:
        written = json.dumps(default).strip('"')
        raise ValueError(
            f"{section}.{key}={value} has no meaning {reason}; leave it out, or over a recipe that has it: "
            f"--{section}.{key}={written}"
        )


def _image_config(name: str, image_size: tuple[int, int, int]) -> dict[str, Any]:
    """The part of a timm `pretrained_cfg` that depends on the images; grey ones get the average mean and std."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    config = get_pretrained_cfg(name) or PretrainedCfg()
    statistics = {"mean": config.mean, "std": config.std}
    if len(config.mean) != image_size[0]:
        statistics = {key: (sum(values) / len(values),) * image_size[0] for key, values in statistics.items()}
    return {"input_size": image_size, **statistics}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from and how they are augmented.

    Attributes:
        source: of the images: fashion_mnist (embedded), a folder, a file or a Hub id. See
            `timm_fsr.data.dataset.load_data`, also on the next seven.
        config: configuration of a Hub data set.
        train_split: name of the training split.
        test_split: name of the test split.
        image_column: column of the images; null finds it.
        label_column: column of the labels; null finds it.
        size: side that images are scaled and cropped to; null takes that of the saved model that is fine-tuned, else
            keeps theirs if they have one, else takes the model's input size.
        channels: 1 or 3; null takes that of the saved model that is fine-tuned, else keeps theirs.
        limit_train: largest number of training images, balanced.
        limit_test: largest number of test images, balanced.
        on_error: what becomes of images that cannot be used, such as broken files: "stop" names all of them in an
            error, "skip" goes on without them and reports their number (streamed images are all decoded once for that).
        held_out: training images held out, balanced, to choose the best checkpoint by robust accuracy; null takes
            1,000, but no more than a tenth of them.
        crop_padding: pixels of padding of the random crop.
        flip: mirror half of the training images.
        extra_source: further training images, such as generated ones, of the same classes; scaled like the others.
        extra_split: split of the extra images.
        extra_fraction: share of each batch that comes from the extra images, between 0 and 1; an epoch stays as long as
            without.
        extra_limit: largest number of extra images, balanced.
        streamed: decode images when they are needed, with `workers` processes, instead of holding them all in memory;
            needs `size`. See `timm_fsr.data.streaming.stream_data` for what it keeps on the disk.
        workers: processes that decode streamed images, for each training process; 0 decodes in that one.
        crop_scale: smallest and largest share of an image's area that a random resized crop takes, such as
            [0.25, 1.0], in place of the crop with padding: of streamed images as each is decoded, of images in memory
            after they got their size. null is no such crop.
        auto_augment: timm's configuration string of RandAugment, AutoAugment, AugMix or 3-Augment, such as
            rand-m9-mstd0.5-inc1; null is none. This key and the next ones are those of timm's training script.
        random_erasing: share of the images of which a random box is erased; 0 is none.
        erasing_mode: what is put in: "pixel" normal noise, "rand" one normal colour, "const" the mean colour.
        erasing_count: largest number of boxes of an image.
        mixup: alpha of mixup, such as 0.8; 0 is none. Labels are mixed too, and attacks maximise the mixed loss.
        cutmix: alpha of CutMix, such as 1.0; 0 is none.
        cutmix_minmax: smallest and largest side of CutMix's box as shares of the image's, such as [0.2, 0.8]; switches
            CutMix on.
        mixup_prob: how often mixup or CutMix is applied.
        mixup_switch_prob: how often that is CutMix, where both are on.
        mixup_mode: whether a "batch", a "pair" of images or each image ("elem") is mixed by its own draw.
        mixup_off_epoch: epochs after which nothing is mixed any more; 0 mixes to the end.
    """

    source: str = "fashion_mnist"
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    size: int | None = None
    channels: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    held_out: int | None = None
    crop_padding: int = 4
    flip: bool = True
    extra_source: str | None = None
    extra_split: str = "train"
    extra_fraction: Number = 0.0
    extra_limit: int | None = None
    streamed: bool = False
    workers: int = 4
    crop_scale: list[Number] | None = None
    auto_augment: str | None = None
    random_erasing: Number = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    erasing_count: int = 1
    mixup: Number = 0.0
    cutmix: Number = 0.0
    cutmix_minmax: list[Number] | None = None
    mixup_prob: Number = 1.0
    mixup_switch_prob: Number = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0

    def check(self) -> None:
        """Raise ValueError for a number out of range, or a key that another one leaves without meaning."""
        for key, reason in _COUNTED.items():
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} must be at least 1{reason}")
        if self.channels not in (None, 1, 3):
            raise ValueError(
                f"data.channels={self.channels} is neither 1 (grey) nor 3 (RGB); null keeps what they have"
            )
        if self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding} must be 0 or more")
        if self.size is not None:
            self.check_crop(self.size)
        self._check_extra()
        self._check_streamed()
        self._check_timm()

    def check_crop(self, side: int) -> None:
        """Raise ValueError if the padding lets crops show nothing of an image whose shorter side has `side` pixels."""
        if self.crop_scale is None and self.crop_padding >= side:
            raise ValueError(
                f"data.crop_padding={self.crop_padding} is no less than the side of the images, {side} pixels, so that "
                "a random crop could miss the image; use fewer, an eighth of the side is usual"
            )

    def check_boxes(self, image_size: tuple[int, int, int]) -> None:
        """Raise ValueError if CutMix's boxes fit no image of (channels, height, width) `image_size`."""
        augmentation = self.timm_augmentation(num_classes=2, mean=(0.5,), std=(0.5,))
        if augmentation is None or augmentation.mixing is None:
            return
        try:
            augmentation.mixing.check_size(*image_size[1:])
        except ValueError as error:
            raise ValueError(f"data.{error}") from error

    def _check_extra(self) -> None:
        if self.extra_source is None:
            _check_default("data", self, "extra_split", "without data.extra_source")
        if self.extra_source is None and (self.extra_fraction != 0 or self.extra_limit is not None):
            raise ValueError(
                "data.extra_fraction and data.extra_limit are about data.extra_source, which is not set; set it to "
                "where the extra images are, or leave out the others"
            )
        if self.extra_source is not None and not 0 < self.extra_fraction < 1:
            raise ValueError(
                f"data.extra_fraction={self.extra_fraction} is no share of a batch for {self.extra_source}; use a "
                "number between 0 and 1, such as 0.7, or leave out data.extra_source"
            )

    def _check_streamed(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")
        if not self.streamed:
            _check_default("data", self, "workers", "for images held in memory, which are decoded before the training")
        if self.crop_scale is not None:
            _check_default("data", self, "crop_padding", "with data.crop_scale, which is another crop")
        if self.streamed and self.size is None:
            raise ValueError("data.streamed does not look at every image, so set data.size to the side they get")
        if self.streamed and self.extra_source is not None:
            raise ValueError(
                "data.extra_source is held in memory and cannot join data.streamed; leave out one of the two"
            )
        self.augmentation()

    def build(
        self, *, seed: int, progress: bool = True, mixed_size: tuple[int, int] | None = None
    ) -> tuple[Images, Images]:
        """Training and held-out validation images; the split is drawn from `seed`.

        Args:
            seed: see above.
            progress: show a progress bar.
            mixed_size: (height, width) of images that are not all of one size, if `size` does not say.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: they cannot be read, or are too few to hold some out.
        """
        data = self._load(self.train_split, self.limit_train, None, progress, mixed_size=mixed_size)
        held_out = min(_HELD_OUT, max(1, len(data) // 10)) if self.held_out is None else self.held_out
        if held_out >= len(data):
            raise ValueError(
                f"cannot hold out {held_out} of the {len(data)} images of {data.name}, as none would be left to train "
                "on; use more images, or lower data.held_out (null holds out a tenth)"
            )
        return data.split(held_out, seed=seed)

    def build_test(
        self,
        classes: Sequence[str] | None = None,
        *,
        progress: bool = True,
        image_size: tuple[int, int, int] | None = None,
    ) -> Images:
        """Test images, in their stored order.

        Args:
            classes: of the training images, in the order of their labels.
            progress: show a progress bar.
            image_size: channels, height and width of the training images, whose size test images get.
        """
        box = None if image_size is None or self.size is not None else image_size[1:]
        return self._load(self.test_split, self.limit_test, classes, progress, size=box)

    def build_extra(
        self, classes: Sequence[str], image_size: tuple[int, int, int], *, progress: bool = True
    ) -> ImageData | None:
        """The extra training images, with these classes and (channels, height, width); None if there are none.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: they cannot be read, or have other classes.
        """
        from timm_fsr.data.dataset import load_data

        if self.extra_source is None:
            return None
        channels, height, width = image_size
        return load_data(
            self.extra_source,
            self.extra_split,
            classes=classes,
            size=(height, width),
            channels=channels,
            limit=self.extra_limit,
            on_error=self.on_error,
            progress=progress,
        )

    def augmentation(self) -> Augmentation | ResizedCrop:
        """The training augmentation.

        Raises:
            ValueError: `crop_scale` is no range of areas.
        """
        from timm_fsr.data.augment import Augmentation, ResizedCrop

        if self.crop_scale is None:
            return Augmentation(padding=self.crop_padding, flip=self.flip)
        return ResizedCrop(scale=tuple(map(float, self.crop_scale)), flip=self.flip)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and their labels with them."""
        return self.mixup != 0 or self.cutmix != 0 or self.cutmix_minmax is not None

    def timm_augmentation(
        self, *, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> TimmAugmentation | None:
        """What is done to images after crop and flip; None if that is nothing.

        Args:
            num_classes: of the labels.
            mean: that the model subtracts, for each channel.
            std: that it divides by.

        Raises:
            ValueError: a configuration string or number that timm does not have.
        """
        from timm_fsr.data.policy import Policy
        from timm_fsr.data.timm_augment import Erasing, Mixing, TimmAugmentation

        policy = erasing = mixing = None
        if self.auto_augment is not None:
            policy = Policy(self.auto_augment, fill=mean)
        if self.random_erasing != 0:
            erasing = Erasing(float(self.random_erasing), self.erasing_mode, self.erasing_count, mean=mean, std=std)
        if self.mixes:
            mixing = Mixing(
                num_classes=num_classes,
                mixup=float(self.mixup),
                cutmix=float(self.cutmix),
                cutmix_minmax=None if self.cutmix_minmax is None else tuple(map(float, self.cutmix_minmax)),
                prob=float(self.mixup_prob),
                switch_prob=float(self.mixup_switch_prob),
                mode=self.mixup_mode,
                off_epoch=self.mixup_off_epoch,
            )
        if policy is None and mixing is None and erasing is None:
            return None
        return TimmAugmentation(policy=policy, mixing=mixing, erasing=erasing)

    def _check_timm(self) -> None:
        """Raise ValueError for augmentations of timm that it would refuse, or keys without meaning."""
        if self.random_erasing == 0:
            for key in ("erasing_mode", "erasing_count"):
                _check_default("data", self, key, "without data.random_erasing")
        if not self.mixes:
            for key in ("mixup_prob", "mixup_mode", "mixup_off_epoch"):
                _check_default("data", self, key, "without data.mixup or data.cutmix")
        if self.mixup == 0 or (self.cutmix == 0 and self.cutmix_minmax is None):
            _check_default("data", self, "mixup_switch_prob", "unless data.mixup and data.cutmix are both on")
        try:
            self.timm_augmentation(num_classes=2, mean=(0.5,), std=(0.5,))
        except ValueError as error:
            unnamed = str(error).startswith("unknown")
            raise ValueError(f"data.{f'auto_augment={self.auto_augment}: ' if unnamed else ''}{error}") from error

    def _load(
        self,
        split: str,
        limit: int | None,
        classes: Sequence[str] | None,
        progress: bool,
        *,
        size: tuple[int, int] | None = None,
        mixed_size: tuple[int, int] | None = None,
    ) -> Images:
        from timm_fsr.data.dataset import load_data
        from timm_fsr.data.decoding import BrokenImagesError
        from timm_fsr.data.streaming import stream_data

        read: Callable[..., Images] = partial(load_data, mixed_size=mixed_size)
        if self.streamed:
            read = partial(stream_data, workers=self.workers)
        try:
            return read(
                self.source,
                split,
                config=self.config,
                image_column=self.image_column,
                label_column=self.label_column,
                classes=classes,
                size=size or self.size,
                channels=self.channels,
                limit=limit,
                on_error=self.on_error,
                progress=progress,
            )
        except BrokenImagesError as error:
            raise BrokenImagesError(error.found, "set data.on_error=skip to go on without such images") from error


# Counts of images or pixels, and what to add to the message about one below 1.
_COUNTED = {
    "held_out": ": these images choose the checkpoint",
    "size": ": it is the side of the images in pixels",
    "limit_train": "; null takes all training images",
    "limit_test": "; null takes all test images, and evaluation.attacks=[] leaves the final evaluation out",
    "extra_limit": "; null takes all of them",
}


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """The attack that training images are made with, and the threat model of validation and evaluation.

    Attributes:
        name: a registered attack, such as "pgd", or with one step: "fgsm", "fgsm_rs" (Wong et al., 2020: uniform
            start, step 1.25 * eps, clipped to the ball) or "n_fgsm" (de Jorge et al., 2022: noise of 2 * eps, step
            eps, not clipped).
        norm: "linf" or "l2".
        eps: radius in pixels of [0, 1]; fractions such as 8/255 may be written so.
        steps: gradient steps; null means the attack's own number (10 for "pgd"), one-step attacks take no other.
        step_size: null means the attack's own: 2.5 * eps / steps for "pgd", the step named above for the others.
        random_start: of "pgd": begin at a random point of the ball.
        start_noise: of "pgd": standard deviation of a Gaussian start in place of the uniform one; TRADES and MART
            used 0.001.
        warmup_epochs: epochs over which the training eps rises from 0; validation always uses the full one.
        args: further keyword arguments of each attack by its name: {n_fgsm: {noise: 1.5}}.
    """

    name: str = "pgd"
    norm: str = "linf"
    eps: Number = 8 / 255
    steps: int | None = None
    step_size: Number | None = None
    random_start: bool = True
    start_noise: Number | None = None
    warmup_epochs: Number = 0.0
    args: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for a number out of range or a key that the named attack has no use for."""
        self.build()
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"attack.warmup_epochs={self.warmup_epochs} must be 0 or more")

    def build(self) -> Attack:
        """The attack at full eps.

        Raises:
            ValueError: an unknown name or argument, also of an attack that is not used, or a key that the attack has
                no use for.
        """
        from timm_fsr.attacks.base import ATTACKS, attack_fields

        for name, args in self.args.items():
            _check_args("attack", "{n_fgsm: {noise: 1.5}}", name, args, ATTACKS[name], _COMMON_ATTACK_KEYS)
            _build("attack", ATTACKS[name], name, args)
        if self.name not in ATTACKS:
            raise ValueError(unknown("attack.name", self.name, ATTACKS.names()))
        cls = ATTACKS[self.name]
        given = {key: value for key in _COMMON_ATTACK_KEYS if (value := getattr(self, key)) is not None}
        fields = attack_fields(cls)
        for key in [key for key in given if key not in fields]:
            default = getattr(AttackOptions, key)
            if given.pop(key) not in (default, 1 if key == "steps" else default):
                written = json.dumps(default).strip('"')
                kind = "attack" if "steps" in fields else "one-step attack"
                raise ValueError(
                    f"attack.{key}={getattr(self, key)} has no meaning for the {kind} {self.name!r}; leave it out, or "
                    f"over a recipe that has it: --attack.{key}={written}"
                )
        return _build("attack", cls, self.name, {**given, **self.args.get(self.name, {})})

    def eps_at(self, epoch: float) -> float:
        """The training eps at a point of the run, in epochs since its start."""
        return self.eps * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else self.eps


# Keys of `AttackOptions` that many attacks have; an attack is given those that it knows.
_COMMON_ATTACK_KEYS = ("norm", "eps", "steps", "step_size", "random_start", "start_noise")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The training method.

    Attributes:
        name: a registered objective: "at", "trades", "mart", "natural", or "afd", which fine-tunes with the feature
            layer of that name. This line alone decides what is trained by.
        args: keyword arguments of each objective by its name: {trades: {beta: 6}, at: {label_smoothing: 0.1}}.
    """

    name: str = "at"
    args: dict[str, dict[str, Any]] = field(default_factory=dict)

    def build(self) -> Objective:
        """The objective.

        Raises:
            ValueError: an unknown name or argument, also of an objective that is not used.
        """
        from timm_fsr.training.objectives import OBJECTIVES

        for name, args in self.args.items():
            _check_args("objective", "{trades: {beta: 6}}", name, args, OBJECTIVES[name])
            _build("objective", OBJECTIVES[name], name, args)
        return _build("objective", OBJECTIVES[self.name], self.name, self.args.get(self.name, {}))


def _check_args(kind: str, example: str, name: str, args: Any, cls: type, without: Sequence[str] = ()) -> None:
    """Refuse arguments that `cls` does not have, NaN, infinities, and what has a recipe key of its own (`without`)."""
    if not isinstance(args, dict):
        raise ValueError(
            f"{kind}.args.{name} is {args!r}; write arguments by the name of their {kind}, such as args: {example}"
        )
    known = [entry.name for entry in dataclasses.fields(cls) if entry.init]
    for key in args:
        if key in without:
            raise ValueError(f"{kind}.args.{name}.{key} has a key of its own; write {kind}.{key}")
        if key not in known:
            raise ValueError(unknown(f"argument of the {kind} {name!r}", key, [k for k in known if k not in without]))
    _check_finite(f"{kind}.args.{name}", args)


def _build(kind: str, cls: type[Built], name: str, args: Mapping[str, Any]) -> Built:
    try:
        return cls(**args)
    except TypeError as error:
        raise ValueError(f"{kind}.args.{name}={args} has a value of another type ({error}); correct it") from error


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The optimizer, its schedule, its length, and what is done to gradients and weights.

    Attributes:
        optimizer: a timm optimizer; "sgd" has Nesterov momentum in timm, "momentum" is plain SGD with momentum.
        lr: peak learning rate.
        momentum: of SGD; other optimizers keep timm's default.
        weight_decay: per step.
        decay_all: decay norm layers and biases too, as the FSR paper's code does; else matrices alone.
        layer_decay: factor of the learning rate from each layer to the one below (timm's layer groups); null is none.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        accumulate: forward and backward passes that a step's batch is divided into, to save memory.
        schedule: "step" (times `gamma` at each milestone), "cosine" to 0, "one_cycle" (linear up, then down to
            0) or "constant".
        milestones: epochs at which "step" lowers the rate.
        gamma: factor of the rate at each milestone of "step".
        warmup: share of the run in which the rate rises linearly from 0.
        freeze: epochs at the beginning in which the feature layers and the classifier train alone, over a backbone that
            stays as it is, BatchNorm's statistics included; for a model that begins with trained weights.
        clip_grad: largest norm of the whole gradient; longer ones are scaled down. Null is none.
        ema_decay: of an exponential moving average of the weights, which is then validated and saved; 0 is none.
        ema_warmup: begin with a smaller decay, 1 - step^(-2/3), and rise to `ema_decay` (timm's rule).
        awp_gamma: relative size of the adversarial weight perturbation (Wu et al., 2020); 0 is none. Its paper has
            0.01 for AT and 0.005 for TRADES.
        awp_start: epoch from which on weights are perturbed.
        nonfinite: what to do when the loss or gradient becomes NaN or infinite: "stop" with the state before that
            step saved, or "skip" the step (20 in a row stop too).
    """

    optimizer: str = "momentum"
    lr: Number = 0.1
    momentum: Number = 0.9
    weight_decay: Number = 5e-4
    decay_all: bool = True
    layer_decay: Number | None = None
    epochs: int = 100
    batch_size: int = 128
    accumulate: int = 1
    schedule: Literal["step", "cosine", "one_cycle", "constant"] = "step"
    milestones: list[Number] = field(default_factory=lambda: [75, 90])
    gamma: Number = 0.1
    warmup: Number = 0.0
    freeze: int = 0
    clip_grad: Number | None = None
    ema_decay: Number = 0.0
    ema_warmup: bool = False
    awp_gamma: Number = 0.0
    awp_start: Number = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"

    def check(self) -> None:
        """Raise ValueError for a number out of range, an unknown optimizer or a combination without effect."""
        from timm.optim import get_optimizer_info, list_optimizers

        optimizers = [str(name) for name in list_optimizers()]
        if self.optimizer not in optimizers:
            raise ValueError(unknown("optim.optimizer", self.optimizer, optimizers))
        self._check_counts()
        self._check_numbers()
        self._check_freeze()
        if self.ema_warmup and not self.ema_decay:
            raise ValueError("optim.ema_warmup has no meaning without an average; set optim.ema_decay, such as 0.999")
        if not self.awp_gamma:
            _check_default("optim", self, "awp_start", "without weight perturbation (optim.awp_gamma)")
        elif self.awp_start >= self.epochs:
            raise ValueError(
                f"optim.awp_start={self.awp_start:g} lies beyond the end of the training (optim.epochs={self.epochs}), "
                "so that no weights would be perturbed; lower it, or set optim.awp_gamma=0"
            )
        if self.schedule != "step":
            for key in ("milestones", "gamma"):
                _check_default("optim", self, key, f"with optim.schedule={self.schedule}, which has no milestones")
        if not get_optimizer_info(self.optimizer).has_momentum:
            _check_default("optim", self, "momentum", f"for optim.optimizer={self.optimizer}")

    def _check_counts(self) -> None:
        for key in ("epochs", "batch_size", "accumulate"):
            if getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be at least 1")
        schedules = ["step", "cosine", "one_cycle", "constant"]
        if self.schedule not in schedules:
            raise ValueError(unknown("optim.schedule", self.schedule, schedules))
        if not all(milestone >= 0 for milestone in self.milestones):
            raise ValueError(f"optim.milestones={self.milestones} are epochs and must be 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"optim.batch_size={self.batch_size} does not divide into optim.accumulate={self.accumulate} equal "
                "parts"
            )

    def _check_freeze(self) -> None:
        if not 0 <= self.freeze <= self.epochs:
            raise ValueError(
                f"optim.freeze={self.freeze} must lie between 0 and optim.epochs={self.epochs}, as it counts epochs of "
                "the run"
            )
        if self.awp_gamma and self.awp_start < self.freeze:
            raise ValueError(
                f"optim.awp_start={self.awp_start} would perturb weights that optim.freeze={self.freeze} keeps as they "
                f"are; set optim.awp_start={self.freeze}"
            )

    def _check_numbers(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):  # also true for NaN
            raise ValueError(
                f"optim.lr={self.lr} must be positive and optim.weight_decay={self.weight_decay} 0 or more"
            )
        for key in ("momentum", "ema_decay", "warmup"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must lie in [0, 1)")
        for key in ("gamma", "awp_gamma", "awp_start"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be 0 or more")
        for key in ("clip_grad", "layer_decay"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"optim.{key}={value} must be positive; null is none")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Timm's optimizer of that name over timm's parameter groups of the model."""
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(
            model,
            opt=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            filter_bias_and_bn=not self.decay_all,
            layer_decay=self.layer_decay,
        )

    def build_schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
        """Timm's schedule of the learning rate; `step_update(step)` sets that of a step, counted from 0."""
        from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler

        total = self.epochs * steps_per_epoch
        rising = round(self.warmup * total)
        common: dict[str, Any] = {"t_in_epochs": False, "warmup_t": rising}
        if self.schedule in ("step", "constant"):
            # timm lowers the rate one step before a milestone and says that it will go on doing so.
            milestones = [round(epoch * steps_per_epoch) + 1 for epoch in sorted(self.milestones)]
            decay_t = milestones if self.schedule == "step" else []
            return MultiStepLRScheduler(optimizer, decay_t, self.gamma, warmup_prefix=False, **common)
        falling: dict[str, Any] = {"t_initial": max(1, total - rising), "warmup_prefix": True}
        if self.schedule == "cosine":
            return CosineLRScheduler(optimizer, **falling, **common)
        return PolyLRScheduler(optimizer, power=1.0, **falling, **common)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured: on held-out images after epochs (PGD), on test images at the end.

    Attributes:
        attacks: of the final evaluation on the test images, see `timm_fsr.evaluate`; [] leaves it out.
        validation_attack: a registered attack that has steps: "pgd", or "apgd", which needs no step size and is a
            little stronger at equal steps.
        validation_steps: steps of the validation attack.
        validate_every: epochs between validations; the last epoch is always validated.
        patience: stop after this many validations without a better checkpoint; null trains to the end.
        overfitting_alarm: with a one-step training attack, stop when robust accuracy (PGD) collapses while the
            accuracy under one step rises, which is catastrophic overfitting.
    """

    attacks: list[str] = field(default_factory=lambda: ["fgsm", "pgd20"])
    validation_attack: str = "pgd"
    validation_steps: int = 10
    validate_every: int = 1
    patience: int | None = None
    overfitting_alarm: bool = True

    @property
    def validation(self) -> str:
        """The validation attack's name: "pgd10"."""
        return f"{self.validation_attack}{self.validation_steps}"

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for key in ("validation_steps", "validate_every", "patience"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{key}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The checkpoints that a run resumes from, beside the models in `best/` and `last/`.

    Attributes:
        every_steps: steps between checkpoints; null saves at the end of each epoch alone, where one is always saved.
        keep: how many of the newest checkpoints stay.
    """

    every_steps: int | None = None
    keep: int = 2

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for key in ("every_steps", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1")
