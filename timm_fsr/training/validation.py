"""Validation on held-out images: its robust accuracy chooses the best model and can end a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.evaluator import Standing, evaluate
from timm_fsr.evaluation.inference import BATCH_SIZE
from timm_fsr.reports.report import Report
from timm_fsr.reports.statistics import collapse
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import Selection

ONE_STEP = "fgsm"
COLLAPSED = "held_out.collapsed"


def validate(
    model: nn.Module,
    held_out: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    one_step: bool = False,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[Standing], None] | None = None,
) -> dict[str, float]:
    """Clean and robust accuracy of `model` on the held-out images, which the processes share.

    Args:
        model: a timm model, not the prepared one: it is evaluated in float32.
        held_out: images that are not trained on.
        recipe: names the attack, its norm and eps, and the seed.
        accelerator: the processes.
        one_step: measure the accuracy under FGSM too. With a one-step training attack it tells catastrophic
            overfitting from plain weakness.
        warn: called with a sentence if the model answers one class for nearly all images, or guesses.
        progress: called after each attack on a batch.

    Returns:
        In [0, 1]: "held_out.clean_accuracy", "held_out.robust_accuracy" and perhaps "held_out.one_step_accuracy"; and
        "held_out.collapsed", 1, if the model answers one class for nearly all images, or guesses.
    """
    attacks = {"robust": recipe.evaluation.validation}
    if one_step:
        attacks["one_step"] = ONE_STEP
    mine = torch.arange(accelerator.process_index, len(held_out), accelerator.num_processes)
    report = evaluate(
        model,
        held_out.take(mine).batches(BATCH_SIZE),
        norm=recipe.attack.norm,
        eps=recipe.attack.eps,
        attacks=list(attacks.values()),
        seed=recipe.seed,
        progress=progress,
    )
    names = {"clean": "clean", **attacks}
    counts = torch.tensor([int(report.correct[key].sum()) for key in names.values()] + [report.count])
    *correct, total = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    assert total == len(held_out)
    collapsed = _collapsed(report, held_out, accelerator)
    if collapsed and warn is not None:
        warn(collapsed)
    found = {f"held_out.{name}_accuracy": count / total for name, count in zip(names, correct, strict=True)}
    return found | ({COLLAPSED: 1.0} if collapsed else {})


def _collapsed(report: Report, held_out: Images, accelerator: Accelerator) -> str:
    """What is wrong with a model that cannot classify, by the images of all processes; "" for one that works."""
    assert report.labels is not None
    per_class = [report.labels[report.correct["clean"]], report.labels]
    counts = torch.stack([labels.bincount(minlength=held_out.num_classes) for labels in per_class])
    right, total = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    found = collapse(right, total, held_out.classes)
    return f"the model does not work: {found}" if found else ""


def judge(metrics: dict[str, float], selection: Selection, *, epoch: int, patience: int | None) -> tuple[bool, str]:
    """Compare a validation with the best one so far.

    Args:
        metrics: from `validate`.
        selection: the best validation so far; updated.
        epoch: that was validated, counted from 1.
        patience: end the run after this many validations without a better one; None: never.

    Returns:
        Whether this is the best validation, and why the run should end here ("" if it should go on).
    """
    robust, one_step = metrics["held_out.robust_accuracy"], metrics.get("held_out.one_step_accuracy")
    collapsed = selection.collapsed(robust, one_step)
    clean, works = metrics["held_out.clean_accuracy"], not metrics.get(COLLAPSED)
    best = selection.update(epoch, robust, clean, one_step, works=works)
    if collapsed:
        return best, (
            f"catastrophic overfitting: PGD accuracy fell from {100 * selection.robust:.1f} % in epoch "
            f"{selection.epoch} to {100 * robust:.1f} %, while that under one step rose to "
            f"{100 * (one_step or 0):.1f} %; lower attack.eps, or try attack.name=n_fgsm or "
            "objective.args.at.grad_align=0.2"
        )
    if patience is not None and selection.stale >= patience:
        return best, f"no better checkpoint in {patience} validation(s)"
    return best, ""
