"""The part of a recipe that says how a model is trained: attack, objective, optimizer, checkpoints and validation."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from timm_fsr.attacks import FGSM, NFGSM, PGD, Attack
from timm_fsr.layers.base import unknown
from timm_fsr.notation import Number
from timm_fsr.objectives import OBJECTIVES, Objective


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """The attack that training images are made with, and the threat model of validation and evaluation.

    Attributes:
        name: "pgd", or with one step: "fgsm", "fgsm_rs" (Wong et al., 2020: uniform start, step 1.25 * eps, clipped to
            the ball) or "n_fgsm" (de Jorge et al., 2022: noise of 2 * eps, step eps, not clipped).
        norm: "linf" or "l2".
        eps: radius in pixels of [0, 1]; fractions such as 8/255 may be written so.
        steps: gradient steps; null means 10 for "pgd" and 1 for the others, which take no other number.
        step_size: null means 2.5 * eps / steps for "pgd", and the step named above for the others.
        random_start: of "pgd": begin at a random point of the ball.
        start_noise: of "pgd": standard deviation of a Gaussian start in place of the uniform one; TRADES and MART
            used 0.001.
        warmup_epochs: epochs over which the training eps rises from 0; validation always uses the full one.
    """

    name: Literal["pgd", "fgsm", "fgsm_rs", "n_fgsm"] = "pgd"
    norm: str = "linf"
    eps: Number = 8 / 255
    steps: int | None = None
    step_size: Number | None = None
    random_start: bool = True
    start_noise: Number | None = None
    warmup_epochs: Number = 0.0

    def check(self) -> None:
        """Raise ValueError for a number out of range or a key that the named attack has no use for."""
        self.build()
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"attack.warmup_epochs={self.warmup_epochs} must be 0 or more")

    def build(self) -> Attack:
        """The attack at full eps."""
        if self.name not in _ATTACKS:
            raise ValueError(unknown("attack.name", self.name, sorted(_ATTACKS)))
        if self.name != "pgd":
            self._check_one_step()
        return _ATTACKS[self.name](self)

    def eps_at(self, epoch: float) -> float:
        """The training eps at a point of the run, in epochs since its start."""
        return self.eps * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else self.eps

    def _check_one_step(self) -> None:
        unused = {"start_noise": self.start_noise is not None, "random_start": not self.random_start}
        unused["steps"] = self.steps not in (None, 1)
        unused["step_size"] = self.name == "fgsm" and self.step_size is not None
        unused["norm"] = self.name == "n_fgsm" and self.norm != "linf"
        for key in (key for key, given in unused.items() if given):
            default = json.dumps(getattr(AttackOptions, key)).strip('"')
            raise ValueError(
                f"attack.{key}={getattr(self, key)} has no meaning for the one-step attack {self.name!r}; leave it "
                f"out, or over a recipe that has it: --attack.{key}={default}"
            )


def _pgd(options: AttackOptions) -> PGD:
    return PGD(
        norm=options.norm,
        eps=options.eps,
        steps=10 if options.steps is None else options.steps,
        step_size=options.step_size,
        random_start=options.random_start,
        start_noise=options.start_noise,
    )


def _fgsm_rs(options: AttackOptions) -> PGD:
    step_size = options.step_size if options.step_size is not None else 1.25 * options.eps or None
    return PGD(norm=options.norm, eps=options.eps, steps=1, step_size=step_size)


_ATTACKS: dict[str, Callable[[AttackOptions], Attack]] = {
    "pgd": _pgd,
    "fgsm": lambda options: FGSM(norm=options.norm, eps=options.eps),
    "fgsm_rs": _fgsm_rs,
    "n_fgsm": lambda options: NFGSM(eps=options.eps, step_size=options.step_size),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The training method.

    Attributes:
        name: "at", "trades", "mart", "natural", or "afd", which fine-tunes with the feature layer of that name; this
            line alone decides which is trained by.
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
            _objective(name, args)
        return _objective(self.name, self.args.get(self.name, {}))


def _objective(name: str, args: Any) -> Objective:
    if name not in OBJECTIVES:
        raise ValueError(unknown("objective", name, sorted(OBJECTIVES)))
    if not isinstance(args, dict):
        raise ValueError(
            f"objective.args.{name} is {args!r}; write arguments by the name of their objective, such as "
            "args: {trades: {beta: 6}}"
        )
    known = [entry.name for entry in dataclasses.fields(OBJECTIVES[name]) if entry.init]
    for key in args:
        if key not in known:
            raise ValueError(unknown(f"argument of the objective {name!r}", key, known))
    try:
        return OBJECTIVES[name](**args)
    except TypeError as error:
        raise ValueError(f"objective.args.{name}={args} has a value of another type ({error}); correct it") from error


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
        validation_attack: "pgd" or "apgd", which needs no step size and is a little stronger at equal steps.
        validation_steps: its steps.
        validate_every: epochs between validations; the last epoch is always validated.
        patience: stop after so many validations without a better checkpoint; null trains to the end.
        overfitting_alarm: with a one-step training attack, stop when robust accuracy (PGD) collapses while the
            accuracy under one step rises, which is catastrophic overfitting.
    """

    attacks: list[str] = field(default_factory=lambda: ["fgsm", "pgd20"])
    validation_attack: Literal["pgd", "apgd"] = "pgd"
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
        keep: so many of the newest stay.
    """

    every_steps: int | None = None
    keep: int = 2

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for key in ("every_steps", "keep"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1")
