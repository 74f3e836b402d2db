"""A recipe: one training run as data, read from YAML and the command line, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jsonargparse import ArgumentParser
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from timm_fsr.attacks import PGD
from timm_fsr.data import Augmentation, ImageData, load_data
from timm_fsr.evaluation import build_attack
from timm_fsr.hub import load, resolve
from timm_fsr.layers import layer_class
from timm_fsr.layers.base import check_layer_args, unknown
from timm_fsr.notation import Number, options_parser, read_options, write_options
from timm_fsr.objectives import OBJECTIVES, Objective
from timm_fsr.sites import attach, layer_groups


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is trained.

    Attributes:
        name: a timm architecture, or a trained model (a folder, "local-dir:folder", "hf-hub:user/name").
        layer: the feature layer to put on it ("fsr"); null trains it as it is. This line alone decides what is
            compared: the next two describe layers and say nothing of a plain model.
        at: places, as in `timm_fsr.attach`; null takes the layer's own.
        layer_args: keyword arguments of each layer by its name: {fsr: {hidden: 16}}.
        args: further keyword arguments of `timm.create_model`.
        pretrained: start from timm's weights of the backbone.
    """

    name: str = "resnet_tiny_cifar"
    layer: str | None = "fsr"
    at: list[int | str] | None = None
    layer_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False

    def check(self) -> None:
        """Raise ValueError for a model, layer, place or argument that does not exist, without building weights.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
        """
        for name in (*self.layer_args, *filter(None, [self.layer])):
            check_layer_args(layer_class(name), self._args_of(name))
        if ":" not in resolve(self.name):
            with torch.device("meta"):
                dataclasses.replace(self, pretrained=False).build(num_classes=10)

    def build(self, *, num_classes: int, image_size: tuple[int, int, int] | None = None) -> nn.Module:
        """The model for `num_classes` classes of images of (channels, height, width) `image_size`.

        Raises:
            ValueError: see `check`.
        """
        name = resolve(self.name)
        trained = ":" in name
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
                f"model.layer_args.{layer}, or name a model without it"
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


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from and how they are augmented.

    Attributes:
        source: see `timm_fsr.data.load_data`, as are the next seven.
        config: configuration of a Hub data set.
        train_split: name of the training split.
        test_split: name of the test split.
        image_column: null finds it.
        label_column: null finds it.
        size: side that images are scaled and cropped to; null keeps theirs.
        channels: 1 or 3; null keeps theirs.
        limit_train: use at most so many training images, balanced.
        limit_test: use at most so many test images, balanced.
        held_out: training images held out, balanced, to choose the best checkpoint by robust accuracy.
        crop_padding: pixels of padding of the random crop.
        flip: mirror half of the training images.
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
    held_out: int = 1000
    crop_padding: int = 4
    flip: bool = True

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        if self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must be at least 1: these images choose the checkpoint")
        if self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding} must be 0 or more")

    def build(self, *, seed: int, progress: bool = True) -> tuple[ImageData, ImageData]:
        """Training and held-out validation images; the split is drawn from `seed`."""
        return self._load(self.train_split, self.limit_train, None, progress).split(self.held_out, seed=seed)

    def build_test(self, classes: Sequence[str] | None = None, *, progress: bool = True) -> ImageData:
        """Test images, in their stored order."""
        return self._load(self.test_split, self.limit_test, classes, progress)

    def augmentation(self) -> Augmentation:
        """The training augmentation."""
        return Augmentation(padding=self.crop_padding, flip=self.flip)

    def _load(self, split: str, limit: int | None, classes: Sequence[str] | None, progress: bool) -> ImageData:
        return load_data(
            self.source,
            split,
            config=self.config,
            image_column=self.image_column,
            label_column=self.label_column,
            classes=classes,
            size=self.size,
            channels=self.channels,
            limit=limit,
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """The attack that training images are made with: PGD.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixels of [0, 1]; fractions such as 8/255 may be written so.
        steps: gradient steps.
        step_size: null means 2.5 * eps / steps.
        random_start: begin at a random point of the ball.
    """

    norm: str = "linf"
    eps: Number = 8 / 255
    steps: int = 10
    step_size: Number | None = None
    random_start: bool = True

    def build(self) -> PGD:
        """The attack."""
        return PGD(**dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The training method.

    Attributes:
        name: "at" (adversarial training) or "natural".
        args: keyword arguments of the objective, such as label_smoothing.
    """

    name: str = "at"
    args: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Objective:
        """The objective.

        Raises:
            ValueError: an unknown name or argument.
        """
        if self.name not in OBJECTIVES:
            raise ValueError(unknown("objective.name", self.name, sorted(OBJECTIVES)))
        objective = OBJECTIVES[self.name]
        known = [entry.name for entry in dataclasses.fields(objective)]
        for key in self.args:
            if key not in known:
                raise ValueError(unknown(f"argument of the objective {self.name!r}", key, known))
        try:
            return objective(**self.args)
        except TypeError as error:
            raise ValueError(f"objective.args={self.args} has a value of another type ({error}); correct it") from error


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The optimizer, its schedule and its length.

    Attributes:
        optimizer: a timm optimizer; "sgd" has Nesterov momentum in timm, "momentum" is plain SGD with momentum.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: per step.
        decay_all: decay norm layers and biases too, as the FSR paper's code does; else matrices alone.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        schedule: "step" (times `gamma` at each milestone), "cosine" to 0, "one_cycle" (linear up, then down to
            0) or "constant".
        milestones: epochs at which "step" lowers the rate.
        gamma: factor of "step".
        warmup: share of the run that "one_cycle" and "cosine" spend rising from 0.
        ema_decay: of an exponential moving average of the weights, which is then validated and saved; 0 is none.
    """

    optimizer: str = "momentum"
    lr: Number = 0.1
    momentum: Number = 0.9
    weight_decay: Number = 5e-4
    decay_all: bool = True
    epochs: int = 100
    batch_size: int = 128
    schedule: Literal["step", "cosine", "one_cycle", "constant"] = "step"
    milestones: list[Number] = field(default_factory=lambda: [75, 90])
    gamma: Number = 0.1
    warmup: Number = 0.0
    ema_decay: Number = 0.0

    def check(self) -> None:
        """Raise ValueError for a number out of range or an unknown optimizer."""
        optimizers = [str(name) for name in list_optimizers()]
        if self.optimizer not in optimizers:
            raise ValueError(unknown("optim.optimizer", self.optimizer, optimizers))
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"optim.epochs={self.epochs} and optim.batch_size={self.batch_size} must be at least 1")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):  # also true for NaN
            raise ValueError(
                f"optim.lr={self.lr} must be positive and optim.weight_decay={self.weight_decay} 0 or more"
            )
        for key in ("momentum", "ema_decay", "warmup"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must lie in [0, 1)")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Timm's optimizer of that name over the model's parameters."""
        return create_optimizer_v2(
            model,
            opt=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            filter_bias_and_bn=not self.decay_all,
        )

    def lr_factor(self, epoch: float) -> float:
        """What `lr` is multiplied by at a point of the run, in epochs since its start (a fraction within one)."""
        progress = epoch / self.epochs
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return math.prod(self.gamma for milestone in self.milestones if epoch >= milestone)
        if progress < self.warmup:
            return progress / self.warmup
        remaining = (1 - progress) / (1 - self.warmup)
        return remaining if self.schedule == "one_cycle" else (1 - math.cos(math.pi * remaining)) / 2


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured: on held-out images after epochs (PGD), on test images at the end.

    Attributes:
        attacks: of the final evaluation on the test images, see `timm_fsr.evaluate`; [] leaves it out.
        validation_steps: PGD steps of the validation attack.
        validate_every: epochs between validations; the last epoch is always validated.
    """

    attacks: list[str] = field(default_factory=lambda: ["fgsm", "pgd20"])
    validation_steps: int = 10
    validate_every: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run as data.

    Attributes:
        output: folder of the results: `best/` and `last/` (checkpoints), `metrics.jsonl`, `recipe.yaml`,
            `report.json`.
        overwrite: replace a run that `output` holds already; else that is an error.
        seed: decides weights, order, augmentation, attacks and noise.
        mixed_precision: "no" (float32), "bf16" or "fp16", by Accelerate.
        channels_last: memory format of images and convolutions, usually faster; random numbers are drawn in memory
            order, so that the results differ as those of two seeds do.
        model: see `ModelOptions`.
        data: see `DataOptions`.
        attack: see `AttackOptions`.
        objective: see `ObjectiveOptions`.
        optim: see `OptimOptions`.
        evaluation: see `EvaluationOptions`.
    """

    output: str = "runs/latest"
    overwrite: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    attack: AttackOptions = field(default_factory=AttackOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe, then apply overrides such as "--optim.epochs=5".

        Raises:
            FileNotFoundError: no such file.
            ValueError: no YAML, an unknown key (the message names the nearest), or a value of another type.
        """
        config = [] if path is None else [f"--config={path}"]
        return parse_arguments([*config, *overrides])

    def check(self) -> None:
        """Raise ValueError for anything that cannot work, in a second, before data is read or weights are made."""
        self.model.check()
        self.data.check()
        self.attack.build()
        self.objective.build()
        self.optim.check()
        options = self.evaluation
        if options.validation_steps < 1 or options.validate_every < 1:
            raise ValueError(
                f"evaluation.validation_steps={options.validation_steps} and "
                f"evaluation.validate_every={options.validate_every} must be at least 1"
            )
        for name in [*self.evaluation.attacks, f"pgd{self.evaluation.validation_steps}"]:
            build_attack(name, self.attack.norm, self.attack.eps)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load` reads."""
        return write_options(self)


def recipe_parser() -> ArgumentParser:
    """The parser behind `timm-fsr train`: --config, and one flag per recipe key."""
    return options_parser(Recipe, prog="timm-fsr train", description="Train a model by a recipe.")


def parse_arguments(arguments: Sequence[str]) -> Recipe:
    """A recipe from command-line arguments; the errors are those of `Recipe.load`."""
    return read_options(Recipe, arguments, recipe_parser())


def _image_config(name: str, image_size: tuple[int, int, int]) -> dict[str, Any]:
    """The part of a timm `pretrained_cfg` that depends on the images; grey ones get the average mean and std."""
    config = get_pretrained_cfg(name) or PretrainedCfg()
    statistics = {"mean": config.mean, "std": config.std}
    if len(config.mean) != image_size[0]:
        statistics = {key: (sum(values) / len(values),) * image_size[0] for key, values in statistics.items()}
    return {"input_size": image_size, **statistics}
