"""Validation on held-out images: the robust accuracy that chooses the checkpoint and raises the alarm."""

from __future__ import annotations

import torch

from timm_fsr.attacks.base import is_one_step
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.inference import BATCH_SIZE
from timm_fsr.training.state import Run

ONE_STEP = "fgsm"


def validate(run: Run) -> dict[str, float]:
    """Clean and robust accuracy of the judged model on the held-out images, shared over the processes.

    The timm model is evaluated in float32, not the prepared one. With a one-step training attack the accuracy under
    FGSM is measured as well: it tells catastrophic overfitting from plain weakness.

    Returns:
        "held_out.clean_accuracy", "held_out.robust_accuracy" and perhaps "held_out.one_step_accuracy", in [0, 1].
    """
    accelerator, recipe = run.accelerator, run.recipe
    attacks = {"robust": recipe.evaluation.validation}
    if is_one_step(run.attack) and recipe.evaluation.overfitting_alarm:
        attacks["one_step"] = ONE_STEP
    mine = torch.arange(accelerator.process_index, len(run.held_out), accelerator.num_processes)
    report = evaluate(
        run.judged,
        run.held_out.take(mine).batches(BATCH_SIZE),
        norm=recipe.attack.norm,
        eps=recipe.attack.eps,
        attacks=list(attacks.values()),
        seed=recipe.seed,
    )
    names = {"clean": "clean", **attacks}
    counts = torch.tensor([int(report.correct[key].sum()) for key in names.values()] + [report.count])
    *correct, total = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    assert total == len(run.held_out)
    return {f"held_out.{name}_accuracy": count / total for name, count in zip(names, correct, strict=True)}


def judge(run: Run, metrics: dict[str, float]) -> bool:
    """Take note of a validation; whether its model is the best so far. May decide that the run ends here."""
    progress, options = run.progress, run.recipe.evaluation
    robust, one_step = metrics["held_out.robust_accuracy"], metrics.get("held_out.one_step_accuracy")
    collapsed = progress.selection.collapsed(robust, one_step)
    best = progress.selection.update(progress.epoch, robust, metrics["held_out.clean_accuracy"], one_step)
    if collapsed:
        progress.stopped = (
            f"catastrophic overfitting: PGD accuracy fell from {100 * progress.selection.robust:.1f} % in epoch "
            f"{progress.selection.epoch} to {100 * robust:.1f} %, while that under one step rose to "
            f"{100 * (one_step or 0):.1f} %; lower attack.eps, or try attack.name=n_fgsm or "
            "objective.args.at.grad_align=0.2"
        )
    elif options.patience is not None and progress.selection.stale >= options.patience:
        progress.stopped = f"no better checkpoint in {options.patience} validation(s)"
    return best
