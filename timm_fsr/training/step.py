"""One optimisation step: attack, minimise, guard against NaN; and SIGTERM, which stops a run after one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from timm_fsr.attacks.base import Attack
from timm_fsr.attacks.bn_folding import Folding
from timm_fsr.training.awp import kept_buffers, perturbed_weights
from timm_fsr.training.freezing import Frozen
from timm_fsr.training.objectives.base import LossTerms, Objective, unwrapped
from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.random import derive_generator

_ACCURACY = {"clean": "train.clean_accuracy", "adversarial": "train.robust_accuracy"}


class InterruptedRunError(RuntimeError):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has saved a checkpoint to resume from.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status for the shell: 143 after SIGTERM, 130 after Ctrl-C."""
        return 128 + self.number


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step; the same on every process, except for the metrics.

    Attributes:
        metrics: loss terms and accuracies of this process's images: detached scalars.
        broken: the loss or its gradient was NaN or infinite.
        overflow: the gradients of a finite loss overflowed in fp16, as happens until their scale is found.
        stop: a process was told to stop.
    """

    metrics: dict[str, Tensor]
    broken: bool
    overflow: bool
    stop: bool

    @property
    def undone(self) -> bool:
        """Whether the model is as it was before the step."""
        return self.broken or self.overflow


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One optimisation step, at its place in the run.

    Attributes:
        recipe: its seed, its options of the optimizer, and its rule for BatchNorm.
        accelerator: device, precision and processes.
        timm_model: the model that is trained, in timm's convention.
        prepared: the same in pixel space, as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        objective: the training method.
        attack: at the eps of this step.
        folding: pairs of layers that are folded while the model is attacked.
        frozen: the part of the model that this step leaves as it is, if there is one.
        epoch: epochs done before the step.
        index: steps of this epoch done before it.
    """

    recipe: Recipe
    accelerator: Accelerator
    timm_model: nn.Module
    prepared: nn.Module
    optimizer: AcceleratedOptimizer
    objective: Objective
    attack: Attack
    folding: Folding
    frozen: Frozen | None = None
    epoch: int
    index: int

    def take(self, images: Tensor, labels: Tensor, *, stop_asked: Callable[[], bool]) -> StepResult:
        """Attack the batch, minimise the loss, update the weights; a step that breaks leaves the model as it was.

        Args:
            images: (N, C, H, W) in [0, 1], of this process.
            labels: (N,), or (N, classes) if they are mixed; then accuracies count the class of the largest share.
            stop_asked: whether this process was told to stop.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.timm_model.buffers()]
        self.optimizer.zero_grad()
        metrics = self._accumulate(images, labels)
        if self.frozen is not None:
            self.frozen.drop_gradients()
        scaler = self.accelerator.scaler
        broken, stop = agreed(self.accelerator, self._is_broken(metrics), stop_asked())
        if not broken or scaler is not None:  # the scaler leaves out a bad step itself, and has to know of it
            self.optimizer.step()
        overflow = scaler is not None and self.accelerator.optimizer_step_was_skipped
        if broken or overflow:
            self._undo(buffers)
        else:
            _share_statistics(self.timm_model, self.accelerator, rule=self.recipe.batch_norm)
        return StepResult(metrics, broken=broken, overflow=overflow, stop=stop)

    def _accumulate(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Gradients of the whole batch, part by part; gives the metrics."""
        metrics: dict[str, Tensor] = {}
        parts = self.recipe.optim.accumulate
        for part in range(parts):  # by strides: extra images come last, and belong in every part
            some, classes = images[part::parts], labels[part::parts]
            with self.accelerator.accumulate(self.prepared):
                terms = self._backward(some, classes, part)
            for name, value in _metrics(terms, classes).items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value / parts
        return metrics

    def _backward(self, images: Tensor, labels: Tensor, part: int) -> LossTerms:
        """Attack one part of the batch and accumulate the gradient of its loss.

        Each use of randomness has its own generator, seeded by the position alone: a step depends on nothing before it.
        """
        accelerator, objective = self.accelerator, self.objective
        place = (self.recipe.seed, self.epoch, self.index, accelerator.process_index)
        suffix = f" {part}" if part else ""
        starts = derive_generator(*place, accelerator.device, stream="attack" + suffix)
        noise = derive_generator(*place, stream="model" + suffix).initial_seed()  # of masks and dropout, torch's own
        torch.manual_seed(noise)
        with self.folding.applied():
            adversarial = objective.craft(self.prepared, self.attack, images, labels, generator=starts)

        def loss_for_awp() -> Tensor:
            terms = objective.terms(unwrapped(self.prepared), self.attack, images, adversarial, labels)
            return terms.total() * (1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())

        with self._perturbation(loss_for_awp):
            torch.manual_seed(noise)  # both passes see the same masks
            terms = objective.terms(self.prepared, self.attack, images, adversarial, labels)
            # Checkpointing runs the forward pass again, in which BatchNorm would count the batch a second time.
            with kept_buffers(self.timm_model) if self.recipe.gradient_checkpointing else nullcontext():
                accelerator.backward(terms.total())
        return terms

    def _perturbation(self, loss_fn: Callable[[], Tensor]) -> AbstractContextManager[None]:
        optim = self.recipe.optim
        if not optim.awp_gamma or self.epoch < optim.awp_start:
            return nullcontext()
        return perturbed_weights(
            unwrapped(self.prepared),
            loss_fn,
            gamma=optim.awp_gamma,
            average=lambda gradients: self.accelerator.reduce(gradients, "mean"),
        )

    def _is_broken(self, metrics: dict[str, Tensor]) -> Tensor:
        """Scalar: 1 if a loss term is not finite, or the gradient (in fp16 the gradient scaler looks at that)."""
        values = [value for name, value in metrics.items() if name.startswith("loss.")]
        accelerator, clip = self.accelerator, self.recipe.optim.clip_grad
        norm: Tensor | None = None
        if clip is not None:
            norm = accelerator.clip_grad_norm_(list(self.prepared.parameters()), clip)
        elif accelerator.scaler is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.prepared.parameters() if p.grad is not None])
        if norm is not None and accelerator.scaler is None:
            values.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return (~torch.stack([value.float() for value in values]).isfinite()).any().float()

    def _undo(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Drop the gradients, and give the buffers their values from before the step."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def agreed(accelerator: Accelerator, broken: Tensor, stop: bool) -> tuple[bool, bool]:
    """Both flags, true where they are true on any process, because all of them have to do the same."""
    flags = torch.stack([broken, torch.full_like(broken, float(stop))])
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum")
    broken_anywhere, stop_anywhere = (flags > 0).tolist()
    return broken_anywhere, stop_anywhere


class StopRequest:
    """Whether this process was asked to stop; calling it says so.

    Attributes:
        number: the signal that asked; None if none has come.
    """

    number: int | None = None

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def error(self, where: str) -> InterruptedRunError:
        """What ends the run, after it is saved; where another process was asked, as by SIGTERM."""
        by = "Ctrl-C" if self.number == signal.SIGINT else "SIGTERM"
        return InterruptedRunError(
            f"stopped by {by} after {where}; the run is saved, go on with --resume=true",
            signal.SIGTERM if self.number is None else self.number,
        )


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Remember a SIGTERM or Ctrl-C instead of dying from it, while the block runs; a second Ctrl-C ends at once.

    Yields:
        Whether one came: never outside of the main thread, where Python allows no handler.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _metrics(terms: LossTerms, labels: Tensor) -> dict[str, Tensor]:
    metrics = {f"loss.{name}": value.detach() for name, value in terms.items()}
    labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
    for kind, logits in terms.logits.items():
        metrics[_ACCURACY[kind]] = (logits.argmax(dim=1) == labels).float().mean()
    return metrics


def _share_statistics(
    timm_model: nn.Module, accelerator: Accelerator, *, rule: Literal["average", "first", "sync"]
) -> None:
    """Make BatchNorm's running statistics the same on every process: those of the "first", or their average.

    DistributedDataParallel would copy those of the first process, but only when the next training pass begins: until
    then each process would attack, and save, another model.
    """
    if accelerator.num_processes == 1:
        return
    running = ("running_mean", "running_var")
    buffers = [buffer for name, buffer in timm_model.named_buffers() if name.endswith(running)]
    if not buffers:
        return
    joint = torch.cat([buffer.flatten().float() for buffer in buffers])
    joint = broadcast(joint) if rule == "first" else accelerator.reduce(joint, "mean")
    for buffer, value in zip(buffers, joint.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))
