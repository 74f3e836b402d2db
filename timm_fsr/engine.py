"""The training loop: adversarial training of a recipe's model by Accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_fsr.attacks import Attack
from timm_fsr.data import ImageData, derive_generator, epoch_batches, epoch_steps
from timm_fsr.evaluation import evaluate
from timm_fsr.files import write_text
from timm_fsr.hub import load, save_pretrained
from timm_fsr.objectives import LossTerms, Objective
from timm_fsr.pixels import PixelModel
from timm_fsr.progress import bar
from timm_fsr.recipe import Recipe

_CHECK_EVERY = 20  # steps between looks at the loss: looking waits for the device


@dataclass(eq=False)
class Run:
    """Everything one training run works with.

    Attributes:
        recipe: what was asked.
        accelerator: device, precision and processes.
        timm_model: the model that is trained, in timm's convention.
        prepared: the same in pixel space, as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        ema: the averaged copy of `timm_model`, if asked for.
        data: training images.
        held_out: images that choose the best checkpoint.
        console: prints on the main process alone.
    """

    recipe: Recipe
    accelerator: Accelerator
    timm_model: nn.Module
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    data: ImageData
    held_out: ImageData
    console: Console

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and saved: the averaged one if there is one."""
        return self.timm_model if self.ema is None else self.ema.module


def train(recipe: Recipe) -> nn.Module:
    """Train a model by `recipe`, keep its best and last checkpoint, and evaluate the best on the test images.

    The best checkpoint has the highest robust accuracy (PGD) on held-out training images, then the highest clean
    accuracy. Runs on one process or on all that `accelerate launch` started.

    Args:
        recipe: from `Recipe.load` or made in Python.

    Returns:
        The best model, a timm model in eval mode. `recipe.output` holds `best/` and `last/`, `metrics.jsonl`,
        `recipe.yaml` and `report.json`.

    Raises:
        ValueError: something in the recipe cannot work; raised before training.
        FileExistsError: the output folder holds a run and `overwrite` is off.
        FloatingPointError: the loss became NaN or infinite; the checkpoints so far remain.
    """
    recipe.check()
    output = _claim(recipe)
    accelerator = build_accelerator(recipe.mixed_precision)
    console = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True)
    run = _prepare(recipe, accelerator, console)
    if accelerator.is_main_process:
        write_text(output / "recipe.yaml", recipe.to_yaml())
        write_text(output / "metrics.jsonl", "")
        (output / "report.json").unlink(missing_ok=True)  # of the run that is overwritten
    console.print(_headline(run))
    objective, attack = recipe.objective.build(), recipe.attack.build()
    best = (-1.0, -1.0)
    for epoch in range(recipe.optim.epochs):
        started = time.perf_counter()
        metrics = _train_epoch(run, objective, attack, epoch)
        last = epoch + 1 == recipe.optim.epochs
        if last or (epoch + 1) % recipe.evaluation.validate_every == 0:
            metrics |= _validate(run)
            accuracy = metrics["held_out.robust_accuracy"], metrics["held_out.clean_accuracy"]
            if accuracy > best:
                best = accuracy
                _save(run, output / "best")
        _save(run, output / "last")
        metrics["seconds"] = time.perf_counter() - started
        _log(run, output, epoch, metrics)
    accelerator.wait_for_everyone()
    return _finish(run, output)


def build_accelerator(mixed_precision: str = "no") -> Accelerator:
    """An Accelerator that uses the processes it was launched with, on the CPU where there is no GPU.

    Raises:
        ValueError: the launcher started processes that do not see each other, or asks for another precision; or fp16
            was asked for on a CPU, where it would silently be float32.
    """
    on_cpu = not torch.cuda.is_available()
    if mixed_precision == "fp16" and on_cpu:
        raise ValueError("mixed_precision='fp16' does nothing on a CPU; use 'bf16' or 'no'")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"`accelerate launch` asks for {asked} but the recipe, which decides, for {mixed_precision!r}; add "
            f"--mixed_precision={asked} to the script's own arguments"
        )
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but Accelerate joined {accelerator.num_processes}, so each would "
            "train alone; start with `accelerate launch --multi_gpu --num_processes N` (on CPUs too)"
        )
    return accelerator


def _claim(recipe: Recipe) -> Path:
    """The output folder, which must not hold another run."""
    output = Path(recipe.output)
    if (output / "metrics.jsonl").exists() and not recipe.overwrite:
        raise FileExistsError(
            f"{output} holds a training run; choose another folder with --output, or replace it with --overwrite=true"
        )
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, but results need a folder; choose another with --output")
    return output


def _prepare(recipe: Recipe, accelerator: Accelerator, console: Console) -> Run:
    """Read the data, build the model from the seed, and hand both to the devices."""
    data, held_out = recipe.data.build(seed=recipe.seed, progress=accelerator.is_main_process)
    _check_test_split(recipe, data)
    torch.manual_seed(recipe.seed)
    timm_model: Any = recipe.model.build(num_classes=data.num_classes, image_size=data.image_size)
    timm_model.pretrained_cfg["label_names"] = list(data.classes)
    if recipe.channels_last:
        timm_model = timm_model.to(memory_format=torch.channels_last)
    timm_model.to(accelerator.device)
    pixel_model = PixelModel(timm_model).to(accelerator.device)
    ema = ModelEmaV3(timm_model, decay=recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    optimizer = recipe.optim.build(timm_model)
    prepared, optimizer = accelerator.prepare(pixel_model, optimizer)
    device = accelerator.device
    run = Run(
        recipe,
        accelerator,
        timm_model,
        prepared,
        optimizer,
        ema,
        data.to(device),
        held_out.to(device),
        console,
    )
    _steps_per_epoch(run)
    return run


def _check_test_split(recipe: Recipe, data: ImageData) -> None:
    """Open the test images that are wanted at the end; ValueError if they are not there or of another kind."""
    if not recipe.evaluation.attacks:
        return
    one = dataclasses.replace(recipe.data, limit_test=1).build_test(data.classes, progress=False)
    if one.image_size[0] != data.image_size[0]:
        raise ValueError(
            f"the test images have {one.image_size[0]} channels but the training images {data.image_size[0]}; set "
            "data.channels"
        )


def _steps_per_epoch(run: Run) -> int:
    """Steps of an epoch; ValueError if the batch does not divide among the processes or the images fill none."""
    world_size = run.accelerator.num_processes
    batch_size = run.recipe.optim.batch_size
    if batch_size % world_size:
        raise ValueError(f"optim.batch_size={batch_size} does not divide among {world_size} processes; change it")
    steps = epoch_steps(len(run.data), batch_size // world_size, world_size=world_size)
    if steps == 0:
        raise ValueError(f"{len(run.data)} training images do not fill a batch of {batch_size}; lower optim.batch_size")
    return steps


def _train_epoch(run: Run, objective: Objective, attack: Attack, epoch: int) -> dict[str, float]:
    """One pass over the training images.

    Returns:
        The mean of each loss term, the accuracy on the attacked batches, and the last learning rate.
    """
    recipe, accelerator = run.recipe, run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    steps = _steps_per_epoch(run)
    batches = epoch_batches(
        len(run.data),
        recipe.optim.batch_size // world_size,
        seed=recipe.seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
    )
    augment = recipe.data.augmentation()
    sums: dict[str, Tensor] = {}
    run.prepared.train()
    with bar(run.console, f"epoch {epoch + 1}/{recipe.optim.epochs}", steps) as show:
        for step, indices in enumerate(batches):
            _set_lr(run, epoch + step / steps)
            images, labels = run.data.batch(indices)
            images = augment(images, derive_generator(recipe.seed, epoch, step, rank))
            if recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            # Noise and dropout come from torch's own generator: seed it, so that a step depends on nothing before.
            torch.manual_seed(derive_generator(recipe.seed, epoch, step, rank, stream="model").initial_seed())
            starts = derive_generator(recipe.seed, epoch, step, rank, accelerator.device, stream="attack")
            terms = objective(run.prepared, attack, images, labels, generator=starts)
            run.optimizer.zero_grad()
            accelerator.backward(terms.total())
            run.optimizer.step()
            if run.ema is not None:
                run.ema.update(run.timm_model)
            _add(sums, terms, labels)
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == steps:
                show(step + 1, _describe(_means(sums, step + 1, epoch)))
    means = _means({key: accelerator.reduce(value, "mean") for key, value in sums.items()}, steps, epoch)
    return {**means, "lr": run.optimizer.param_groups[0]["lr"]}


def _set_lr(run: Run, epoch: float) -> None:
    """Set the scheduled learning rate; a function of the position alone, so it needs no state of its own."""
    factor = run.recipe.optim.lr_factor(epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = run.recipe.optim.lr * factor * group.get("lr_scale", 1.0)


def _add(sums: dict[str, Tensor], terms: LossTerms, labels: Tensor) -> None:
    """Add this step's metrics on the device, without waiting for it."""
    step = {f"loss.{name}": value.detach() for name, value in terms.items()}
    step["train.robust_accuracy"] = (terms.logits.argmax(dim=1) == labels).float().mean()
    for name, value in step.items():
        sums[name] = sums[name] + value if name in sums else value.clone()


def _means(sums: dict[str, Tensor], steps: int, epoch: int) -> dict[str, float]:
    means = {name: float(value) / steps for name, value in sums.items()}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"{broken[0]} became NaN or infinite in epoch {epoch + 1}; lower optim.lr or attack.eps, or train in "
            "float32 (mixed_precision='no'). The checkpoints saved so far are whole"
        )
    return means


def _validate(run: Run) -> dict[str, float]:
    """Clean and robust accuracy of the judged model on the held-out images, shared over the processes.

    The timm model is evaluated, not the prepared one, so that validation runs in float32.
    """
    accelerator, recipe = run.accelerator, run.recipe
    for buffer in run.judged.buffers():  # each process has BatchNorm statistics of its own; rank 0's are saved
        buffer.copy_(broadcast(buffer))
    attack = f"pgd{recipe.evaluation.validation_steps}"
    mine = torch.arange(accelerator.process_index, len(run.held_out), accelerator.num_processes)
    report = evaluate(
        run.judged,
        run.held_out.take(mine).batches(250),
        norm=recipe.attack.norm,
        eps=recipe.attack.eps,
        attacks=[attack],
        seed=recipe.seed,
    )
    counts = torch.tensor([int(report.correct[key].sum()) for key in ("clean", attack)] + [report.count])
    clean, robust, total = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    assert total == len(run.held_out)
    return {"held_out.clean_accuracy": clean / total, "held_out.robust_accuracy": robust / total}


def _save(run: Run, folder: Path) -> None:
    if run.accelerator.is_main_process:
        save_pretrained(run.judged, folder)


def _finish(run: Run, output: Path) -> nn.Module:
    """Reload the best checkpoint as a user would, evaluate it on the test images, and save the report."""
    model = load(str(output / "best")).to(run.accelerator.device).eval()
    options = run.recipe.evaluation
    if not (options.attacks and run.accelerator.is_main_process):
        return model
    test = run.recipe.data.build_test(run.data.classes)
    with bar(run.console, "evaluation", len(test)) as show:
        report = evaluate(
            model,
            test.to(run.accelerator.device).batches(250),
            norm=run.recipe.attack.norm,
            eps=run.recipe.attack.eps,
            attacks=options.attacks,
            seed=run.recipe.seed,
            name=_model_label(run),
            data_name=test.name,
            progress=lambda done, correct: show(done, f"right under all so far: {correct}/{done}"),
        )
    report = dataclasses.replace(report, conditions={**report.conditions, **_training_conditions(run, test)})
    report.save(output / "report.json")
    save_pretrained(model, output / "best", report=report)
    run.console.print(f"{_model_label(run)}: {report.summary()}\nresults in {output}")
    return model


def _training_conditions(run: Run, test: ImageData) -> dict[str, object]:
    optim = run.recipe.optim
    return {
        "data_fingerprint": test.fingerprint,
        "training_data": run.data.name,
        "checkpoint_rule": f"best PGD-{run.recipe.evaluation.validation_steps} accuracy on {run.held_out.name}",
        "training": f"{run.recipe.objective.build()!r}, {run.recipe.attack.build()!r}, {optim.epochs} epochs",
        "training_seed": run.recipe.seed,
    }


def _log(run: Run, output: Path, epoch: int, metrics: dict[str, float]) -> None:
    if run.accelerator.is_main_process:
        path = output / "metrics.jsonl"
        write_text(path, path.read_text(encoding="utf-8") + json.dumps({"epoch": epoch + 1, **metrics}) + "\n")
        run.console.print(f"epoch {epoch + 1}/{run.recipe.optim.epochs}: {_describe(metrics)}")


def _describe(metrics: dict[str, float]) -> str:
    """Metrics on one line: losses as they are, accuracies in percent."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("accuracy"):
            parts.append(f"{name.removesuffix('_accuracy').replace('.', ' ')} {100 * value:.1f} %")
        elif name == "seconds":
            parts.append(f"{value:.0f} s")
        elif name != "lr":
            parts.append(f"{name.removeprefix('loss.')} {value:.3f}")
    return ", ".join(parts)


def _headline(run: Run) -> str:
    parameters = sum(parameter.numel() for parameter in run.timm_model.parameters())
    precision = {"no": "float32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision)
    return (
        f"{_model_label(run)} ({parameters / 1e6:.2f} M parameters) on {len(run.data)} images of {run.data.name}, "
        f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}, {precision}"
    )


def _model_label(run: Run) -> str:
    return (getattr(run.timm_model, "pretrained_cfg", None) or {}).get("architecture") or run.recipe.model.name
