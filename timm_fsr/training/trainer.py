"""Adversarial training of a recipe's model, from the first step to the report."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_fsr.attacks.base import Attack, is_one_step
from timm_fsr.attacks.bn_folding import Folding, find_folding
from timm_fsr.data.dataset import ImageData, Images
from timm_fsr.data.sampling import training_batches
from timm_fsr.hooks.placement import pretrained_cfg_of
from timm_fsr.models.pixel import PixelModel, mean_and_std
from timm_fsr.models.saving import save_pretrained, weights_digest
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.freezing import Frozen, find_frozen
from timm_fsr.training.lock import reserved
from timm_fsr.training.metrics import begin_tracking, check_trackers, log_epoch, summarise
from timm_fsr.training.objectives.base import Objective, unwrapped
from timm_fsr.training.output import Snapshot, begin_output, check_output, failures_noted, find_snapshot
from timm_fsr.training.pace import Watch, watched
from timm_fsr.training.prepare import (
    build_model,
    cautions,
    check_first_pass,
    compilation,
    count_steps,
    in_order_of_head,
    read_images,
    with_input_of_model,
)
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.results import FinishedRun, conclude
from timm_fsr.training.state import (
    Progress,
    TrainingState,
    check_identity,
    checkpoints_of,
    gather_sums,
    gather_weights,
    identity,
    scatter_sums,
)
from timm_fsr.training.step import InterruptedRunError, Step, StepResult, StopRequest, agreed, stop_requests
from timm_fsr.training.validation import judge, validate

__all__ = ["InterruptedRunError", "Trainer", "train"]

MOST_SKIPPED = 20
"""Steps in a row that may be skipped because of a NaN or an infinity."""

OnValidation = Callable[[int, Mapping[str, float]], None]
"""Called with the epoch, counted from 1, and its metrics, when both are saved; what it raises ends the run."""


def train(recipe: Recipe | Mapping[str, Any], *, on_validation: OnValidation | None = None) -> nn.Module:
    """Train a model by `recipe`, keep its best and last model, and evaluate the best on the test images.

    The best model has the highest robust accuracy (PGD) on held-out training images, then the highest clean
    accuracy. Runs on one process or on all that `accelerate launch` started.

    Args:
        recipe: from `Recipe.load` or made in Python; or its keys and values as YAML would hold them.
        on_validation: called after each epoch with a validation, on every process; see `OnValidation`.

    Returns:
        The best model, a timm model in eval mode. `recipe.output` holds `best/` and `last/`, `checkpoints/`,
        `metrics.jsonl`, `recipe.yaml`, `report.json` and `training.png`.

    Raises:
        ValueError: something in the recipe cannot work; raised before training, as the next two are.
        FileNotFoundError: there is no such model or data.
        ModuleNotFoundError: a tracker or an attack needs a package that is not installed.
        FileExistsError: the output folder holds a run, and neither `resume` nor `overwrite` is on; or a run is going on
            there.
        FloatingPointError: the loss became NaN or infinite; the state before is saved.
        InterruptedRunError: SIGTERM or Ctrl-C came; the state is saved.
        UnsoundError: the evaluation at the end cannot judge the model; the trained model is saved.
    """
    recipe = Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else recipe
    recipe.check()
    check_trackers(recipe.trackers)
    check_output(recipe)
    accelerator = build_accelerator(recipe)
    console = Console(quiet=not accelerator.is_main_process, highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        with reserved(recipe.folder, accelerator), failures_noted(recipe.folder, accelerator):
            snapshot = find_snapshot(recipe, accelerator, console)
            begun = None if snapshot is None else snapshot[1]["identity"]
            recipe = with_input_of_model(recipe, begun and begun["recipe"], console)
            return Trainer.prepare(recipe, accelerator, console, begun=begun).fit(snapshot, on_validation)
    finally:
        accelerator.end_training()


@dataclass(eq=False, repr=False, kw_only=True)
class Trainer:
    """One training run: `prepare` makes it, `fit` tells its story.

    Attributes:
        recipe: says how to train.
        accelerator: device, precision and processes.
        timm_model: the model that is trained, in timm's convention.
        prepared: the same in pixel space, as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        schedule: of the learning rate.
        ema: the averaged copy of `timm_model`, if asked for.
        whole: a copy of `timm_model` that is not sharded, under FSDP; brought up to date after each epoch.
        objective: the training method.
        attack: at full eps.
        folding: pairs of layers that are folded while the model is attacked.
        backbone: the part of the model that the first epochs leave as it is, if the recipe says so.
        data: training images.
        extra: images mixed into each batch, if asked for.
        held_out: images that choose the best model.
        console: prints on the main process alone.
        steps_per_epoch: optimisation steps of an epoch.
        progress: how far the run is.
        sums: of each metric over the steps of the current epoch, on this process.
        watch: shows how far the run is, while `fit` runs.
    """

    recipe: Recipe
    accelerator: Accelerator
    timm_model: nn.Module
    prepared: nn.Module
    optimizer: AcceleratedOptimizer
    schedule: Scheduler
    ema: ModelEmaV3 | None
    whole: nn.Module | None
    objective: Objective
    attack: Attack
    folding: Folding
    backbone: Frozen | None
    data: Images
    extra: ImageData | None
    held_out: Images
    console: Console
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)
    sums: dict[str, Tensor] = field(default_factory=dict)
    watch: Watch | None = None

    @classmethod
    def prepare(
        cls, recipe: Recipe, accelerator: Accelerator, console: Console, *, begun: Mapping[str, Any] | None = None
    ) -> Trainer:
        """Read the data, build the model from the seed, and move both to the device.

        Args:
            recipe: of the run.
            accelerator: device, precision and processes.
            console: prints on the main process alone.
            begun: the `identity` of the run that is resumed, if any: its labels stay as they were.

        Raises:
            ValueError: data, model and recipe do not fit together.
            FileNotFoundError: there is no such model or data.
        """
        device, options = accelerator.device, recipe.optim
        data, extra, held_out = read_images(recipe, accelerator, console)
        steps_per_epoch = count_steps(recipe, len(data), len(held_out), accelerator.num_processes)
        keep_order = begun is not None and data.fingerprint in begun["data"]
        timm_model = build_model(recipe, data, device, accelerator.num_processes, keep_order=keep_order)
        data, held_out = in_order_of_head(timm_model, data, console), in_order_of_head(timm_model, held_out)
        extra = None if extra is None else in_order_of_head(timm_model, extra)
        optimizer = options.build(timm_model)
        ema = ModelEmaV3(timm_model, options.ema_decay, use_warmup=options.ema_warmup) if options.ema_decay else None
        objective = recipe.objective.build().begin(PixelModel(timm_model).to(device))
        check_first_pass(recipe, timm_model, objective, data, accelerator.num_processes, device)
        whole = copy.deepcopy(timm_model) if accelerator.distributed_type == DistributedType.FSDP else None
        if recipe.compile is not None:
            timm_model.compile(backend=recipe.compile)
        prepared, optimizer = accelerator.prepare(PixelModel(timm_model).to(device), optimizer)
        return cls(
            recipe=recipe,
            accelerator=accelerator,
            timm_model=timm_model,
            prepared=prepared,
            optimizer=optimizer,
            schedule=options.build_schedule(optimizer, steps_per_epoch),
            ema=ema,
            whole=whole,
            objective=objective,
            attack=recipe.attack.build(),
            folding=Folding()
            if whole is not None
            else find_folding(unwrapped(prepared), torch.zeros(1, *data.image_size, device=device)),
            backbone=find_frozen(timm_model) if options.freeze else None,
            data=data,
            extra=extra,
            held_out=held_out,
            console=console,
            steps_per_epoch=steps_per_epoch,
        )

    def fit(self, snapshot: Snapshot | None = None, on_validation: OnValidation | None = None) -> nn.Module:
        """Train to the end, evaluate the best model and return it. The errors are those of `train`.

        Args:
            snapshot: tensors and values of a checkpoint to resume from; None: start from the beginning.
            on_validation: see `train`.
        """
        if snapshot is not None:
            self.restore(*snapshot)
        self.console.print(str(self))
        for caution in cautions(self.recipe, self.steps_per_epoch) if snapshot is None else ():
            self.console.print(f"warning: {caution}")
        self.accelerator.wait_for_everyone()  # before the first process writes what the others look for
        with compilation(self.recipe.compile), stop_requests() as stop_asked, self._watched() as watch:
            self.watch = watch
            self._begin(new=snapshot is None)
            while self.progress.epoch < self.recipe.optim.epochs and not self.progress.stopped:
                self._train_epoch(stop_asked, watch)
                ended = time.perf_counter()
                metrics, best = self._training_metrics(), False
                if validated := self._validation_is_due():
                    self.save_checkpoint()  # validation may take long, or find that the model returns NaN
                    metrics |= self.validate()
                    best = self._judge(metrics)
                self._keep_model(best=best)
                self._finish_epoch(metrics, ended, watch.remaining())
                self.save_checkpoint()
                watch.end_epoch()
                if validated and on_validation is not None:
                    on_validation(self.progress.epoch, metrics)
                self._check_stop(stop_asked)
        if self.progress.stopped:
            self.console.print(f"stopped after epoch {self.progress.epoch}: {self.progress.stopped}")
        self.accelerator.wait_for_everyone()
        return self._conclude()

    def restore(self, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        """Go to where a checkpoint was taken, in a run that was just prepared.

        Raises:
            ValueError: the checkpoint belongs to another recipe, other data, or another number of processes.
        """
        check_identity(values["identity"], self._identity(), self.recipe, self.console)
        self._state().load_state_dict(tensors)
        self.progress = Progress.load(values["progress"])
        self.sums = scatter_sums(tensors["sums"], self.accelerator)

    def take_step(self, images: Tensor, labels: Tensor, *, stop_asked: StopRequest | None = None) -> None:
        """Train on one batch of this process, already augmented.

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: (N,), or (N, classes) if they are mixed.
            stop_asked: whether this process was told to stop; if any process was, all of them stop.

        Raises:
            FloatingPointError: the loss or the gradient is NaN or infinite and the recipe says to stop, or this
                happened too often in a row; the state before this step is saved.
            InterruptedRunError: a stop was asked for; the state after this step is saved.
        """
        progress, stop_asked = self.progress, stop_asked or StopRequest()
        epoch, index = divmod(progress.step, self.steps_per_epoch)
        self.schedule.step_update(progress.step)
        result = self._step(epoch, index).take(images, labels, stop_asked=stop_asked)
        if result.undone:
            self._skip_or_stop(result, f"step {index + 1} of epoch {epoch + 1}")
        else:
            self._count(result)
        progress.step += 1
        if self.ema is not None and not result.undone:
            self.ema.update(self.timm_model, step=progress.step if self.recipe.optim.ema_warmup else None)
        if result.stop:
            self.save_checkpoint()
            raise stop_asked.error(f"step {index + 1} of epoch {epoch + 1}")

    def validate(self) -> dict[str, float]:
        """Accuracies of the judged model on the held-out images; see `validation.validate`."""
        one_step = is_one_step(self.attack) and self.recipe.evaluation.overfitting_alarm
        share = len(self.held_out) // self.accelerator.num_processes
        with nullcontext() if self.watch is None else self.watch.validation(share) as tell:
            return validate(
                self.judged,
                self.held_out,
                self.recipe,
                self.accelerator,
                one_step=one_step,
                warn=self._warn_of_validation,
                progress=tell,
            )

    def _warn_of_validation(self, text: str) -> None:
        self.console.print(f"warning: validation in epoch {self.progress.epoch + 1}: {text}")

    def save_checkpoint(self) -> None:
        """Write a checkpoint from which `restore` continues to the bit. Every process has to call this."""
        tensors = {**self._state().state_dict(), "sums": gather_sums(self.sums, self.accelerator)}
        if self.accelerator.is_main_process:
            values = {"progress": dataclasses.asdict(self.progress), "identity": self._identity()}
            checkpoints_of(self.recipe).save(self.progress.step, tensors, values)

    def __str__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.timm_model.parameters())
        precision = {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        where = f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, {precision}"
        begun = f", resumed after step {self.progress.step}" if self.progress.step else ""
        return (
            f"{self.label} ({parameters / 1e6:.2f} M parameters) on {len(self.data)} images of {self.data.name}, "
            f"{where}{begun}"
        )

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and saved: the averaged one if there is one, never a sharded one."""
        if self.whole is not None:
            return self.whole
        return self.timm_model if self.ema is None else self.ema.module

    @property
    def label(self) -> str:
        """The registered name of the model, such as "resnet18_cifar_fsr"."""
        return pretrained_cfg_of(self.timm_model).get("architecture") or self.recipe.model.name

    def _identity(self) -> dict[str, Any]:
        images = [self.data] if self.extra is None else [self.data, self.extra]
        return identity(
            self.recipe,
            processes=self.accelerator.num_processes,
            fingerprints=[found.fingerprint for found in images],
            teacher=self._teacher,
        )

    @functools.cached_property
    def _teacher(self) -> str | None:
        """Checksum of the weights that the objective learns from, if it has a teacher."""
        return None if self.objective.teacher is None else weights_digest(self.objective.teacher)

    def _state(self) -> TrainingState:
        return TrainingState(
            model=self.timm_model,
            optimizer=self.optimizer,
            ema=self.ema,
            scaler=self.accelerator.scaler,
            sharded=self.whole is not None,
        )

    def _watched(self) -> AbstractContextManager[Watch]:
        return watched(self.console, self.recipe, self.steps_per_epoch, len(self.held_out))

    def _begin(self, *, new: bool) -> None:
        """Make the output folder and the trackers ready."""
        if self.accelerator.is_main_process:
            begin_output(self.recipe, new=new)
        begin_tracking(self.recipe, self.accelerator, lines=self.progress.lines)

    def _train_epoch(self, stop_asked: StopRequest, watch: Watch) -> None:
        """Train on the rest of the current epoch's batches."""
        progress, options = self.progress, self.recipe
        done = progress.step - progress.epoch * self.steps_per_epoch
        self.prepared.train()
        if self._frozen is not None:
            self._frozen.keep_statistics()
        elif self.backbone is not None and progress.epoch == options.optim.freeze and done == 0:
            self.console.print(f"epoch {progress.epoch + 1}: from here on the whole model trains")
        since, started = progress.seconds, time.perf_counter()
        watch.begin_epoch(progress.epoch, done)
        for step, (images, labels) in enumerate(self._batches(done), start=done + 1):
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self.take_step(images, labels, stop_asked=stop_asked)
            progress.seconds = since + time.perf_counter() - started
            watch.step(step, lambda: summarise(self._means(self.sums)))
            every = options.checkpoint.every_steps
            if every and progress.step % every == 0 and step < self.steps_per_epoch:  # the epoch's end saves too
                self.save_checkpoint()
        if self.whole is not None:
            gather_weights(self.timm_model, into=self.whole)

    def _batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this process in the current epoch, from the given step on."""
        mean, std = mean_and_std(self.prepared)
        return training_batches(
            self.data,
            batch_size=self.recipe.optim.batch_size // self.accelerator.num_processes,
            seed=self.recipe.seed,
            epoch=self.progress.epoch,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=start_step,
            augmentation=self.recipe.data.augmentation(),
            then=self.recipe.data.timm_augmentation(num_classes=self.data.num_classes, mean=mean, std=std),
            extra=self.extra,
            extra_fraction=self.recipe.data.extra_fraction,
        )

    @property
    def _frozen(self) -> Frozen | None:
        """What the current epoch leaves as it is."""
        return self.backbone if self.progress.epoch < self.recipe.optim.freeze else None

    def _step(self, epoch: int, index: int) -> Step:
        attack, options = self.attack, self.recipe.attack
        if options.warmup_epochs:
            attack = attack.with_eps(options.eps_at(epoch + index / self.steps_per_epoch))
        return Step(
            recipe=self.recipe,
            accelerator=self.accelerator,
            timm_model=self.timm_model,
            prepared=self.prepared,
            optimizer=self.optimizer,
            objective=self.objective,
            attack=attack,
            folding=self.folding,
            frozen=self._frozen,
            epoch=epoch,
            index=index,
        )

    def _skip_or_stop(self, result: StepResult, place: str) -> None:
        """Count a step that was undone; raise if the recipe or the number of such steps says so."""
        progress = self.progress
        expected = not result.broken  # fp16 overflows now and then, until the scale of its gradients is found
        where = f"the loss or its gradient became NaN or infinite in {place}"
        skips = expected or self.recipe.optim.nonfinite == "skip"
        if skips and progress.skipped_in_a_row + 1 < MOST_SKIPPED:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if not expected:
                self.console.print(f"warning: {where}; the step is skipped")
            return
        self.save_checkpoint()  # the state before this step, which is whole
        raise FloatingPointError(
            f"{where}; the state before it is saved. Go on with --resume=true --optim.nonfinite=skip, or start again "
            "with a lower optim.lr or attack.eps, with clipped gradients (optim.clip_grad), or in float32 "
            "(mixed_precision='no')"
        )

    def _count(self, result: StepResult) -> None:
        self.progress.skipped_in_a_row = 0
        self.progress.counted += 1
        for name, value in result.metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each metric over the steps that were counted."""
        return {name: float(value) / self.progress.counted for name, value in sums.items()}

    def _training_metrics(self) -> dict[str, float]:
        """Means over the epoch and all processes, the learning rate, and eps while it rises."""
        metrics = self._means({name: self.accelerator.reduce(value, "mean") for name, value in self.sums.items()})
        metrics["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        if self.recipe.attack.warmup_epochs:
            metrics["eps"] = self.recipe.attack.eps_at(self.progress.epoch + 1)
        return metrics

    def _validation_is_due(self) -> bool:
        epoch = self.progress.epoch + 1
        return epoch == self.recipe.optim.epochs or epoch % self.recipe.evaluation.validate_every == 0

    def _judge(self, metrics: dict[str, float]) -> bool:
        """Whether the epoch that is ending is the best so far. May decide that the run stops with it."""
        best, self.progress.stopped = judge(
            metrics,
            self.progress.selection,
            epoch=self.progress.epoch + 1,
            patience=self.recipe.evaluation.patience,
        )
        return best

    def _keep_model(self, *, best: bool) -> None:
        if self.accelerator.is_main_process:
            for name in ("best", "last") if best else ("last",):
                save_pretrained(self.judged, self.recipe.folder / name)

    def _finish_epoch(self, metrics: dict[str, float], ended: float, left: str) -> None:
        """Count the epoch, log its metrics, and clear them for the next one.

        Args:
            metrics: of training and validation; completed here.
            ended: when its last step ended, by `time.perf_counter`.
            left: the time that the run still takes, in words.
        """
        progress = self.progress
        progress.epoch += 1
        if progress.skipped:
            metrics["skipped_steps"] = float(progress.skipped)
        metrics["seconds"] = progress.seconds + time.perf_counter() - ended
        log_epoch(metrics, progress, recipe=self.recipe, accelerator=self.accelerator, console=self.console, left=left)
        self.sums.clear()
        progress.counted = progress.skipped = 0
        progress.seconds = 0.0

    def _check_stop(self, stop_asked: StopRequest) -> None:
        """Raise InterruptedRunError if SIGTERM or Ctrl-C came after the last step; the whole epoch is saved by now."""
        _, stop = agreed(self.accelerator, torch.zeros((), device=self.accelerator.device), stop_asked())
        if stop:
            raise stop_asked.error(f"epoch {self.progress.epoch}")

    def _conclude(self) -> nn.Module:
        """Evaluate the best model, and save the report and the plot."""
        return conclude(
            FinishedRun(
                recipe=self.recipe,
                accelerator=self.accelerator,
                console=self.console,
                label=self.label,
                objective=self.objective,
                attack=self.attack,
                data=self.data,
                held_out=self.held_out,
                progress=self.progress,
            )
        )
