"""The sections of a recipe: model, data, attack, objective, optimizer, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from timm_fsr.attacks.base import ATTACKS, Attack, attack_fields
from timm_fsr.data.augment import Augmentation, ResizedCrop
from timm_fsr.data.dataset import ImageData, Images, load_data
from timm_fsr.data.decoding import BrokenImagesError
from timm_fsr.data.streaming import stream_data
from timm_fsr.hooks.attach import attach
from timm_fsr.hooks.site import layer_groups
from timm_fsr.layers import layer_class
from timm_fsr.layers.base import check_layer_args
from timm_fsr.models.saving import is_trained, load, resolve
from timm_fsr.training.objectives import OBJECTIVES
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.parsing import Number
from timm_fsr.utils.errors import unknown

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


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from and how they are augmented.

    Attributes:
        source: see `timm_fsr.data.dataset.load_data`, as are the next seven.
        config: configuration of a Hub data set.
        train_split: name of the training split.
        test_split: name of the test split.
        image_column: null finds it.
        label_column: null finds it.
        size: side that images are scaled and cropped to; null takes that of the saved model that is fine-tuned, else
            keeps theirs if they have one, else takes the model's input size.
        channels: 1 or 3; null likewise.
        limit_train: largest number of training images, balanced.
        limit_test: largest number of test images, balanced.
        on_error: what becomes of images that cannot be used, such as broken files: "stop" names all of them in an
            error, "skip" goes on without them and reports their number (streamed images are all decoded once for that).
        held_out: training images held out, balanced, to choose the best checkpoint by robust accuracy; null takes
            1,000, but no more than a tenth of them.
        crop_padding: pixels of padding of the random crop.
        flip: mirror half of the training images.
        extra_source: further training images, such as generated ones, of the same classes; scaled like the others.
        extra_split: name of their split.
        extra_fraction: share of each batch that comes from them, between 0 and 1; an epoch stays as long as without.
        extra_limit: largest number of them, balanced.
        streamed: decode images when they are needed, with `workers` processes, instead of holding them all in memory;
            needs `size`. See `timm_fsr.data.streaming.stream_data` for what it keeps on the disk.
        workers: processes that decode streamed images, for each training process; 0 decodes in that one.
        crop_scale: smallest and largest share of a streamed image's area that a random resized crop takes, such as
            [0.25, 1.0], in place of the crop with padding; null scales the whole image and takes its centre.
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

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        if self.held_out is not None and self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must be at least 1: these images choose the checkpoint")
        if self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding} must be 0 or more")
        self._check_extra()
        self._check_streamed()

    def _check_extra(self) -> None:
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
        if self.crop_scale is not None and not self.streamed:
            raise ValueError(
                "data.crop_scale is drawn as images are decoded, but these are decoded once, before the training; set "
                "data.streamed to true or leave out data.crop_scale"
            )
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
        if self.crop_scale is None:
            return Augmentation(padding=self.crop_padding, flip=self.flip)
        return ResizedCrop(scale=tuple(map(float, self.crop_scale)), flip=self.flip)

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
        for name, args in self.args.items():
            _check_args("objective", "{trades: {beta: 6}}", name, args, OBJECTIVES[name])
            _build("objective", OBJECTIVES[name], name, args)
        return _build("objective", OBJECTIVES[self.name], self.name, self.args.get(self.name, {}))


def _check_args(kind: str, example: str, name: str, args: Any, cls: type, without: Sequence[str] = ()) -> None:
    """Refuse arguments that the dataclass `cls` does not have, or that have recipe keys of their own (`without`)."""
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
        gamma: factor of "step".
        warmup: share of the run in which the rate rises linearly from 0.
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
    clip_grad: Number | None = None
    ema_decay: Number = 0.0
    ema_warmup: bool = False
    awp_gamma: Number = 0.0
    awp_start: Number = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"

    def check(self) -> None:
        """Raise ValueError for a number out of range, an unknown optimizer or a combination without effect."""
        optimizers = [str(name) for name in list_optimizers()]
        if self.optimizer not in optimizers:
            raise ValueError(unknown("optim.optimizer", self.optimizer, optimizers))
        self._check_counts()
        self._check_numbers()
        if self.ema_warmup and not self.ema_decay:
            raise ValueError("optim.ema_warmup has no meaning without an average; set optim.ema_decay, such as 0.999")

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
        validation_steps: its steps.
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
        keep: how many of the newest stay.
    """

    every_steps: int | None = None
    keep: int = 2

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for key in ("every_steps", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1")
