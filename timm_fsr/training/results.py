"""The results of a finished run: the plot, the report and the best model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from timm_fsr.attacks.base import Attack
from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.display import evaluation_display
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.inference import BATCH_SIZE, hardware
from timm_fsr.models.saving import load, save_pretrained
from timm_fsr.training.curves import plot_training
from timm_fsr.training.metrics import read_metrics
from timm_fsr.training.objectives.base import Objective
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import Progress
from timm_fsr.utils.registry import is_file_name


@dataclass(frozen=True, eq=False, kw_only=True)
class FinishedRun:
    """What the results are made of: how a run was trained, and which epoch was its best.

    Attributes:
        recipe: its folder holds the best model and the metrics.
        accelerator: device and processes.
        console: prints on the main process alone.
        label: name of the model in the report.
        objective: the training method.
        attack: the training attack, at full eps.
        data: training images.
        held_out: images that chose the best epoch.
        progress: where the run ended.
    """

    recipe: Recipe
    accelerator: Accelerator
    console: Console
    label: str
    objective: Objective
    attack: Attack
    data: Images
    held_out: Images
    progress: Progress


def conclude(run: FinishedRun) -> nn.Module:
    """Reload the best model as a user would, evaluate it on the test images, and save the report and the plot."""
    output, main = run.recipe.folder, run.accelerator.is_main_process
    model = load(str(output / "best")).to(run.accelerator.device).eval()
    if main:
        _plot(run)
    options = run.recipe.evaluation
    if not options.attacks:
        return model
    test = run.recipe.data.build_test(run.data.classes, progress=main, image_size=run.data.image_size)
    for note in test.notes:
        run.console.print(note)
    with evaluation_display(run.console, len(test) // run.accelerator.num_processes) as display:
        report = evaluate(
            model,
            test.to(run.accelerator.device),
            batch_size=BATCH_SIZE,
            norm=run.recipe.attack.norm,
            eps=run.recipe.attack.eps,
            attacks=options.attacks,
            seed=run.recipe.seed,
            name=run.label,
            data_name=test.name,
            conditions=_training_conditions(run, test) if main else None,
            folder=output / "evaluation",  # a kill costs one attack on one batch
            overwrite=True,
            accelerator=run.accelerator,
            progress=display.attacked,
        )
    if main:
        report.save(output / "report.json")
        save_pretrained(model, output / "best", report=report)
        run.console.print(f"{run.label}: {report.summary()}\nresults in {output}")
    run.accelerator.wait_for_everyone()
    return model


def _plot(run: FinishedRun) -> None:
    plot_training(
        read_metrics(run.recipe.folder),
        run.recipe.folder / "training.png",
        title=f"{run.label}, {run.recipe.objective.name}",
        best_epoch=run.progress.selection.epoch,
        chance=1 / run.data.num_classes,
    )


def _training_conditions(run: FinishedRun, test: Images) -> dict[str, object]:
    optim, selection = run.recipe.optim, run.progress.selection
    recipe = yaml.safe_load(run.recipe.to_yaml())
    return {
        "data_fingerprint": test.fingerprint,
        "training_data": run.data.name,
        **({"training_skipped_images": run.data.skipped} if run.data.skipped else {}),
        "checkpoint_rule": f"best {_attack_label(run)} accuracy on {run.held_out.name}",
        "checkpoint_epoch": selection.epoch,
        "training": f"{run.objective!r}, {run.attack!r}, {optim.epochs} epochs",
        "training_seed": run.recipe.seed,
        "training_seconds": round(sum(record["seconds"] for record in read_metrics(run.recipe.folder)), 1),
        "training_hardware": hardware(run.accelerator.device, run.accelerator.num_processes),
        "recipe": {
            **{key: value for key, value in recipe.items() if key not in ("output", "overwrite", "resume")},
            "imports": [Path(source).name if is_file_name(source) else source for source in recipe["imports"]],
        },
    }


def _attack_label(run: FinishedRun) -> str:
    """The validation attack as it is written: "PGD-10"."""
    options = run.recipe.evaluation
    return f"{options.validation_attack.upper()}-{options.validation_steps}"
