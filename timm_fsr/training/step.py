"""One optimisation step: attack, minimise, guard, average."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor

from timm_fsr.attacks.base import Attack
from timm_fsr.training.awp import kept_buffers, perturbed_weights
from timm_fsr.training.objectives.base import LossTerms, unwrapped
from timm_fsr.training.state import Run, save_checkpoint
from timm_fsr.utils.random import derive_generator

MOST_SKIPPED = 20
"""Steps in a row that may be skipped because of a NaN or an infinity."""

_ACCURACY = {"clean": "train.clean_accuracy", "adversarial": "train.robust_accuracy"}


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (SIGTERM) and has saved a checkpoint to resume from."""


def take_step(run: Run, images: Tensor, labels: Tensor, *, stop_asked: Callable[[], bool] = lambda: False) -> None:
    """Train on one batch of this process, already augmented.

    Args:
        run: its progress and metric sums are updated.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        stop_asked: whether this process was told to stop; any process's word counts for all.

    Raises:
        FloatingPointError: the loss or the gradient is NaN or infinite and the recipe says to stop, or too often in a
            row; the state before this step is saved.
        InterruptedRunError: a stop was asked for; the state after this step is saved.
    """
    recipe, progress = run.recipe, run.progress
    epoch, step = divmod(progress.step, run.steps_per_epoch)
    run.schedule.step_update(progress.step)
    attack = run.attack
    if recipe.attack.warmup_epochs:
        attack = attack.with_eps(recipe.attack.eps_at(epoch + step / run.steps_per_epoch))
    buffers = [(buffer, buffer.clone()) for buffer in run.timm_model.buffers()]
    run.optimizer.zero_grad()
    metrics: dict[str, Tensor] = {}
    parts = recipe.optim.accumulate
    for part in range(parts):  # by strides: extra images, which come last, belong into every part
        some, classes = images[part::parts], labels[part::parts]
        with run.accelerator.accumulate(run.prepared):
            terms = _backward(run, attack, some, classes, epoch, step, part)
        for name, value in _metrics(terms, classes).items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value / parts
    broken, stop = agreed(run, _is_broken(run, metrics), stop_asked())
    if not broken or run.accelerator.scaler is not None:  # which leaves out a bad step by itself, and must know of it
        run.optimizer.step()
    overflow = run.accelerator.scaler is not None and run.accelerator.optimizer_step_was_skipped
    if broken or overflow:
        _skip_or_stop(run, buffers, usual=not broken)
    else:
        share_statistics(run)
        progress.skipped_in_a_row = 0
        progress.counted += 1
        for name, value in metrics.items():
            run.sums[name] = run.sums[name] + value if name in run.sums else value
    progress.step += 1
    if run.ema is not None and not (broken or overflow):
        run.ema.update(run.timm_model, step=progress.step if recipe.optim.ema_warmup else None)
    if stop:
        save_checkpoint(run)
        raise InterruptedRunError(
            f"stopped by SIGTERM after step {step + 1} of epoch {epoch + 1}; the run is saved, go on with --resume=true"
        )


def _backward(run: Run, attack: Attack, images: Tensor, labels: Tensor, epoch: int, step: int, part: int) -> LossTerms:
    """Attack one part of the batch and accumulate the gradient of its loss.

    Each use of randomness has its own generator, seeded by the position alone: a step depends on nothing before it.
    """
    recipe, accelerator = run.recipe, run.accelerator
    place = (recipe.seed, epoch, step, accelerator.process_index)
    suffix = f" {part}" if part else ""
    starts = derive_generator(*place, accelerator.device, stream="attack" + suffix)
    noise = derive_generator(*place, stream="model" + suffix).initial_seed()  # of masks and dropout, torch's own
    torch.manual_seed(noise)
    with run.folding.applied():
        adversarial = run.objective.craft(run.prepared, attack, images, labels, generator=starts)

    def loss_for_awp() -> Tensor:
        terms = run.objective.terms(unwrapped(run.prepared), attack, images, adversarial, labels)
        return terms.total() * (1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())

    with _perturbation(run, loss_for_awp, epoch):
        torch.manual_seed(noise)  # both passes see the same masks
        terms = run.objective.terms(run.prepared, attack, images, adversarial, labels)
        # Checkpointing runs the forward pass again, in which BatchNorm would count the batch a second time.
        with kept_buffers(run.timm_model) if recipe.gradient_checkpointing else nullcontext():
            accelerator.backward(terms.total())
    return terms


def _perturbation(run: Run, loss_fn: Callable[[], Tensor], epoch: int) -> AbstractContextManager[None]:
    optim = run.recipe.optim
    if not optim.awp_gamma or epoch < optim.awp_start:
        return nullcontext()
    return perturbed_weights(
        unwrapped(run.prepared),
        loss_fn,
        gamma=optim.awp_gamma,
        average=lambda gradients: run.accelerator.reduce(gradients, "mean"),
    )


def _metrics(terms: LossTerms, labels: Tensor) -> dict[str, Tensor]:
    metrics = {f"loss.{name}": value.detach() for name, value in terms.items()}
    for kind, logits in terms.logits.items():
        metrics[_ACCURACY[kind]] = (logits.argmax(dim=1) == labels).float().mean()
    return metrics


def _is_broken(run: Run, metrics: dict[str, Tensor]) -> Tensor:
    """Scalar: 1 if a loss term is not finite, or the gradient (which in fp16 is the gradient scaler's business)."""
    values = [value for name, value in metrics.items() if name.startswith("loss.")]
    clip = run.recipe.optim.clip_grad
    norm: Tensor | None = None
    if clip is not None:
        norm = run.accelerator.clip_grad_norm_(list(run.prepared.parameters()), clip)
    elif run.accelerator.scaler is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.prepared.parameters() if p.grad is not None])
    if norm is not None and run.accelerator.scaler is None:
        values.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return (~torch.stack([value.float() for value in values]).isfinite()).any().float()


def agreed(run: Run, broken: Tensor, stop: bool) -> tuple[bool, bool]:
    """Both flags, true where they are on any process, for all of them must do the same."""
    flags = torch.stack([broken, torch.full_like(broken, float(stop))])
    if run.accelerator.num_processes > 1:
        flags = run.accelerator.reduce(flags, "sum")
    broken_anywhere, stop_anywhere = (flags > 0).tolist()
    return broken_anywhere, stop_anywhere


def _skip_or_stop(run: Run, buffers: list[tuple[Tensor, Tensor]], *, usual: bool) -> None:
    """Undo what the step has done to the model; raise if the policy or the number of such steps says so.

    Args:
        run: its progress is updated.
        buffers: of the model, with their values before the step.
        usual: gradients of a finite loss overflowed in fp16, as they do now and then until their scale is found.
    """
    progress = run.progress
    run.optimizer.zero_grad()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    epoch, step = divmod(progress.step, run.steps_per_epoch)
    where = f"the loss or its gradient became NaN or infinite in step {step + 1} of epoch {epoch + 1}"
    if (usual or run.recipe.optim.nonfinite == "skip") and progress.skipped_in_a_row < MOST_SKIPPED:
        if not usual:
            run.console.print(f"warning: {where}; the step is skipped")
        return
    progress.skipped -= 1
    progress.skipped_in_a_row -= 1
    save_checkpoint(run)  # the state before this step, which is whole
    raise FloatingPointError(
        f"{where}; the state before it is saved. Go on with --resume=true --optim.nonfinite=skip, or train anew: with "
        "a lower optim.lr or attack.eps, clipped gradients (optim.clip_grad), or in float32 (mixed_precision='no')"
    )


def share_statistics(run: Run) -> None:
    """Make BatchNorm's running statistics the same on every process, as the recipe says.

    DistributedDataParallel would copy those of the first process, but only as the next training pass begins: until
    then each process would attack, and save, another model.
    """
    if run.accelerator.num_processes == 1:
        return
    running = ("running_mean", "running_var")
    buffers = [buffer for name, buffer in run.timm_model.named_buffers() if name.endswith(running)]
    if not buffers:
        return
    joint = torch.cat([buffer.flatten().float() for buffer in buffers])
    joint = broadcast(joint) if run.recipe.batch_norm == "first" else run.accelerator.reduce(joint, "mean")
    for buffer, value in zip(buffers, joint.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Take note of SIGTERM instead of dying from it, while the block runs.

    Yields:
        A function that says whether one came. Outside of the main thread, where Python allows no handler, none does.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        came.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
