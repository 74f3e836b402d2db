"""Results: the plot, the report and the model that a finished run leaves behind."""

from __future__ import annotations

import importlib.util

import yaml
from torch import nn

from timm_fsr.evaluation import evaluate
from timm_fsr.hub import load, save_pretrained
from timm_fsr.inference import BATCH_SIZE, hardware
from timm_fsr.plots import plot_training
from timm_fsr.progress import bar
from timm_fsr.state import Run
from timm_fsr.streaming import Images
from timm_fsr.tracking import read_metrics


def conclude(run: Run) -> nn.Module:
    """Reload the best model as a user would, evaluate it on the test images, and save the report and the plot."""
    output, main = run.recipe.folder, run.accelerator.is_main_process
    model = load(str(output / "best")).to(run.accelerator.device).eval()
    if main:
        _plot(run)
    options = run.recipe.evaluation
    if not options.attacks:
        return model
    test = run.recipe.data.build_test(run.data.classes, progress=main)
    with bar(run.console, "evaluation", len(test) // run.accelerator.num_processes) as show:
        report = evaluate(
            model,
            test.to(run.accelerator.device).batches(BATCH_SIZE),
            norm=run.recipe.attack.norm,
            eps=run.recipe.attack.eps,
            attacks=options.attacks,
            seed=run.recipe.seed,
            name=model_label(run),
            data_name=test.name,
            folder=output / "evaluation",  # a kill costs one attack on one batch
            overwrite=True,
            accelerator=run.accelerator,
            progress=lambda now: show(now.images, f"at most {100 * now.bound:.1f} % robust"),
        )
    if main:
        report.conditions.update(_training_conditions(run, test))
        report.save(output / "report.json")
        save_pretrained(model, output / "best", report=report)
        run.console.print(f"{model_label(run)}: {report.summary()}\nresults in {output}")
    run.accelerator.wait_for_everyone()
    return model


def _plot(run: Run) -> None:
    output = run.recipe.folder
    if importlib.util.find_spec("matplotlib") is None:
        run.console.print("matplotlib is not installed: no training.png (pip install matplotlib)")
        return
    title = f"{model_label(run)}, {run.recipe.objective.name}"
    plot_training(read_metrics(run), output / "training.png", title=title, best_epoch=run.progress.selection.epoch)


def _training_conditions(run: Run, test: Images) -> dict[str, object]:
    optim, selection = run.recipe.optim, run.progress.selection
    recipe = yaml.safe_load(run.recipe.to_yaml())
    return {
        "data_fingerprint": test.fingerprint,
        "training_data": run.data.name,
        "checkpoint_rule": f"best {_attack_label(run)} accuracy on {run.held_out.name}",
        "checkpoint_epoch": selection.epoch,
        "training": f"{run.objective!r}, {run.attack!r}, {optim.epochs} epochs",
        "training_seed": run.recipe.seed,
        "training_seconds": round(sum(record["seconds"] for record in read_metrics(run)), 1),
        "training_hardware": hardware(run.accelerator.device, run.accelerator.num_processes),
        "recipe": {key: value for key, value in recipe.items() if key not in ("output", "overwrite", "resume")},
    }


def _attack_label(run: Run) -> str:
    """The validation attack as it is written: "PGD-10"."""
    options = run.recipe.evaluation
    return f"{options.validation_attack.upper()}-{options.validation_steps}"


def model_label(run: Run) -> str:
    """The registered name of what is trained, such as "resnet18_cifar_fsr"."""
    return (getattr(run.timm_model, "pretrained_cfg", None) or {}).get("architecture") or run.recipe.model.name
