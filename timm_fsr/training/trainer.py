"""The training loop: adversarial training of a recipe's model by Accelerate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

from timm_fsr.attacks.bn_folding import Folding, find_folding
from timm_fsr.data.dataset import Images
from timm_fsr.data.sampling import epoch_steps, training_batches
from timm_fsr.hooks.attach import reattach
from timm_fsr.models.pixel import PixelModel
from timm_fsr.models.saving import save_pretrained
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.metrics import begin_tracking, check_trackers, describe, log_epoch
from timm_fsr.training.objectives.base import unwrapped
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.results import conclude, model_label
from timm_fsr.training.state import Run, checkpoints_of, refresh_whole, restore, save_checkpoint
from timm_fsr.training.step import InterruptedRunError, agreed, stop_requests, take_step
from timm_fsr.training.validation import judge, validate
from timm_fsr.utils.files import write_text
from timm_fsr.utils.progress import bar

__all__ = ["InterruptedRunError", "train"]

_SHOW_EVERY = 20  # steps between looks at the metrics: looking waits for the device
_RESULTS = ("metrics.jsonl", "best", "last", "checkpoints", "trackers", "evaluation", "report.json", "training.png")
_COMPILED_VARIANTS = 64  # of the forward pass: modes, batch sizes, with and without gradients and recording

Snapshot = tuple[dict[str, Any], dict[str, Any]]


def train(recipe: Recipe) -> nn.Module:
    """Train a model by `recipe`, keep its best and last model, and evaluate the best on the test images.

    The best model has the highest robust accuracy (PGD) on held-out training images, then the highest clean
    accuracy. Runs on one process or on all that `accelerate launch` started.

    Args:
        recipe: from `Recipe.load` or made in Python.

    Returns:
        The best model, a timm model in eval mode. `recipe.output` holds `best/` and `last/`, `checkpoints/`,
        `metrics.jsonl`, `recipe.yaml`, `report.json` and `training.png`.

    Raises:
        ValueError: something in the recipe cannot work; raised before training, as the next two are.
        FileNotFoundError: there is no such model or data.
        ModuleNotFoundError: a tracker or an attack needs a package that is not installed.
        FileExistsError: the output folder holds a run, and neither `resume` nor `overwrite` is on.
        FloatingPointError: the loss became NaN or infinite; the state before is saved.
        InterruptedRunError: SIGTERM came; the state is saved.
        UnsoundError: the evaluation at the end cannot judge the model; the trained model is saved.
    """
    recipe.check()
    check_trackers(recipe.trackers)
    _check_output(recipe)
    accelerator = build_accelerator(recipe)
    console = Console(quiet=not accelerator.is_main_process, highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        snapshot = _find_snapshot(recipe, accelerator, console)
        run = prepare(recipe, accelerator, console)
        if snapshot is not None:
            restore(run, *snapshot)
        console.print(_headline(run))
        accelerator.wait_for_everyone()  # before the first process writes what the others look for
        with _compilation(run), stop_requests() as stop_asked:
            _begin(run, anew=snapshot is None)
            while run.progress.epoch < recipe.optim.epochs and not run.progress.stopped:
                _train_epoch(run, stop_asked)
                _end_epoch(run)
                _check_stop(run, stop_asked)
        if run.progress.stopped:
            console.print(f"stopped after epoch {run.progress.epoch}: {run.progress.stopped}")
        accelerator.wait_for_everyone()
        return conclude(run)
    finally:
        accelerator.end_training()


def _check_output(recipe: Recipe) -> None:
    """Refuse an output folder that must not be written to."""
    output = recipe.folder
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, but results need a folder; choose another with --output")
    present = [name for name in _RESULTS if (output / name).exists()]
    if not present or recipe.overwrite or (recipe.resume and "metrics.jsonl" in present):
        return
    if "metrics.jsonl" in present:
        raise FileExistsError(
            f"{output} holds a training run; go on with it by --resume=true, replace it by --overwrite=true, or choose "
            "another folder with --output"
        )
    raise FileExistsError(
        f"{output} holds {', '.join(present)}, which no run here has made and this one would replace; choose another "
        "folder with --output, or replace them by --overwrite=true"
    )


def _find_snapshot(recipe: Recipe, accelerator: Accelerator, console: Console) -> Snapshot | None:
    """What to resume from, if that is asked for and there is something; the same on every process."""
    if not recipe.resume:
        return None
    snapshot = checkpoints_of(recipe).load_newest(lambda problem: console.print(f"warning: {problem}"))
    step = -1 if snapshot is None else snapshot[1]["progress"]["step"]
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {recipe.output} (steps {steps}); it must be a folder that "
            "all of them share"
        )
    if snapshot is None:
        _check_nothing_is_lost(recipe)
        console.print(f"there is no checkpoint in {recipe.output} yet: the run starts from its beginning")
    return snapshot


def _check_nothing_is_lost(recipe: Recipe) -> None:
    """Refuse to begin anew where a run got further than its first checkpoint, which somebody has removed."""
    metrics = recipe.folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if len(lines) > 1 or (recipe.folder / "report.json").exists():
        raise FileExistsError(
            f"{recipe.output} holds a run without checkpoints, which cannot be resumed; replace it by --overwrite=true "
            "or choose another folder with --output"
        )


def prepare(recipe: Recipe, accelerator: Accelerator, console: Console) -> Run:
    """Read the data, build the model from the seed, and hand both to the devices."""
    progress, device = accelerator.is_main_process, accelerator.device
    data, held_out = recipe.data.build(seed=recipe.seed, progress=progress)
    extra = recipe.data.build_extra(data.classes, data.image_size, progress=progress)
    _check_test_split(recipe, data)
    steps_per_epoch = _steps_per_epoch(recipe, len(data), len(held_out), accelerator.num_processes)
    torch.manual_seed(recipe.seed)
    timm_model: Any = recipe.model.build(num_classes=data.num_classes, image_size=data.image_size)
    timm_model.pretrained_cfg["label_names"] = list(data.classes)
    if recipe.gradient_checkpointing:
        _checkpoint_gradients(timm_model)
    if recipe.channels_last:
        timm_model = timm_model.to(memory_format=torch.channels_last)
    if recipe.batch_norm == "sync":
        timm_model = reattach(convert_sync_batchnorm(timm_model))
    timm_model.to(device)
    optimizer = recipe.optim.build(timm_model)
    options = recipe.optim
    ema = ModelEmaV3(timm_model, options.ema_decay, use_warmup=options.ema_warmup) if options.ema_decay else None
    objective = recipe.objective.build().begin(PixelModel(timm_model).to(device))
    whole = copy.deepcopy(timm_model) if accelerator.distributed_type == DistributedType.FSDP else None
    if recipe.compile is not None:
        timm_model.compile(backend=recipe.compile)
    prepared, optimizer = accelerator.prepare(PixelModel(timm_model).to(device), optimizer)
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        timm_model=timm_model,
        prepared=prepared,
        optimizer=optimizer,
        schedule=recipe.optim.build_schedule(optimizer, steps_per_epoch),
        ema=ema,
        whole=whole,
        objective=objective,
        attack=recipe.attack.build(),
        folding=Folding()
        if whole is not None
        else find_folding(unwrapped(prepared), torch.zeros(1, *data.image_size, device=device)),
        data=data.to(device),
        extra=None if extra is None else extra.to(device),
        held_out=held_out.to(device),
        console=console,
        steps_per_epoch=steps_per_epoch,
    )


def _check_test_split(recipe: Recipe, data: Images) -> None:
    """Open the test images that are wanted at the end; ValueError if they are not there or of another kind."""
    if not recipe.evaluation.attacks:
        return
    one = dataclasses.replace(recipe.data, limit_test=1).build_test(data.classes, progress=False)
    if one.image_size[0] != data.image_size[0]:
        raise ValueError(
            f"the test images have {one.image_size[0]} channels but the training images {data.image_size[0]}; set "
            "data.channels"
        )


def _steps_per_epoch(recipe: Recipe, images: int, held_out: int, processes: int) -> int:
    """Steps of an epoch; ValueError if images or batches do not divide among the processes."""
    batch_size, parts = recipe.optim.batch_size, processes * recipe.optim.accumulate
    if batch_size % parts:
        raise ValueError(
            f"optim.batch_size={batch_size} does not divide among {processes} processes with "
            f"optim.accumulate={recipe.optim.accumulate}; make it a multiple of {parts}"
        )
    if held_out < processes:
        raise ValueError(
            f"{held_out} held-out image(s) do not give each of {processes} processes one; raise data.held_out"
        )
    steps = epoch_steps(images, batch_size // processes, world_size=processes)
    if steps == 0:
        raise ValueError(f"{images} training images do not fill a batch of {batch_size}; lower optim.batch_size")
    return steps


def _checkpoint_gradients(timm_model: Any) -> None:
    """Switch timm's gradient checkpointing on; ValueError for a model that has none."""
    try:
        timm_model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"{type(timm_model).__name__} has no gradient checkpointing in timm; leave out gradient_checkpointing and "
            "raise optim.accumulate to save memory"
        ) from error


def _begin(run: Run, *, anew: bool) -> None:
    """Make the output folder ready: cleared for a new run, and with the recipe in it."""
    if run.accelerator.is_main_process:
        folder = run.recipe.folder
        for path in (folder / name for name in reversed(_RESULTS) if anew):  # what names it a run goes last
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_text(folder / "recipe.yaml", dataclasses.replace(run.recipe, resume=False, overwrite=False).to_yaml())
    begin_tracking(run)


def _train_epoch(run: Run, stop_asked: Callable[[], bool]) -> None:
    """What is left of the current epoch's pass over the training images."""
    recipe, accelerator, progress = run.recipe, run.accelerator, run.progress
    done = progress.step - progress.epoch * run.steps_per_epoch
    batches = training_batches(
        run.data,
        batch_size=recipe.optim.batch_size // accelerator.num_processes,
        seed=recipe.seed,
        epoch=progress.epoch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=done,
        augmentation=recipe.data.augmentation(),
        extra=run.extra,
        extra_fraction=recipe.data.extra_fraction,
    )
    run.prepared.train()
    since, started = progress.seconds, time.perf_counter()
    with bar(run.console, f"epoch {progress.epoch + 1}/{recipe.optim.epochs}", run.steps_per_epoch) as show:
        for step, (images, labels) in enumerate(batches, start=done + 1):
            if recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            take_step(run, images, labels, stop_asked=stop_asked)
            progress.seconds = since + time.perf_counter() - started
            if step % _SHOW_EVERY == 0 or step == run.steps_per_epoch:
                show(step, describe(_means(run)))
            every = recipe.checkpoint.every_steps
            if every and progress.step % every == 0 and step < run.steps_per_epoch:  # the epoch's end saves too
                save_checkpoint(run)


def _end_epoch(run: Run) -> None:
    """Validate, keep the best and the last model, log, and save a checkpoint."""
    recipe, accelerator, progress = run.recipe, run.accelerator, run.progress
    started = time.perf_counter()
    metrics = _means(run, reduced=True)
    due = progress.epoch + 1 == recipe.optim.epochs or (progress.epoch + 1) % recipe.evaluation.validate_every == 0
    if due:
        save_checkpoint(run)  # the validation may take long, or find that the model returns NaN
    metrics["lr"] = max(group["lr"] for group in run.optimizer.param_groups)
    if recipe.attack.warmup_epochs:
        metrics["eps"] = recipe.attack.eps_at(progress.epoch + 1)
    progress.epoch += 1
    best = False
    refresh_whole(run)
    if due:
        metrics |= validate(run)
        best = judge(run, metrics)
    if accelerator.is_main_process:
        for name in ("best", "last") if best else ("last",):
            save_pretrained(run.judged, recipe.folder / name)
    if progress.skipped:
        metrics["skipped_steps"] = float(progress.skipped)
    metrics["seconds"] = progress.seconds + time.perf_counter() - started
    log_epoch(run, metrics)
    run.sums.clear()
    progress.counted = progress.skipped = 0
    progress.seconds = 0.0
    save_checkpoint(run)


def _check_stop(run: Run, stop_asked: Callable[[], bool]) -> None:
    """Raise InterruptedRunError if SIGTERM came while the epoch was ended, which is saved by now."""
    _, stop = agreed(run, torch.zeros((), device=run.accelerator.device), stop_asked())
    if stop:
        raise InterruptedRunError(
            f"stopped by SIGTERM after epoch {run.progress.epoch}; the run is saved, go on with --resume=true"
        )


def _means(run: Run, *, reduced: bool = False) -> dict[str, float]:
    """The mean of each metric over the steps counted so far: of this process, or of all."""
    sums = {k: run.accelerator.reduce(v, "mean") for k, v in run.sums.items()} if reduced else run.sums
    return {name: float(value) / run.progress.counted for name, value in sums.items()}


@contextlib.contextmanager
def _compilation(run: Run) -> Iterator[None]:
    """Compile as asked for, or fail: torch.compile by itself falls back to uncompiled code in silence."""
    if run.recipe.compile is None:
        yield
        return
    import torch._dynamo

    if torch._dynamo.config.disable:
        raise ValueError(
            f"compile={run.recipe.compile} was asked for, but torch.compile is switched off; unset "
            "TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, or leave out compile"
        )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=_COMPILED_VARIANTS):
        yield


def _headline(run: Run) -> str:
    parameters = sum(parameter.numel() for parameter in run.timm_model.parameters())
    precision = {"no": "float32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision)
    where = f"{run.accelerator.num_processes} process(es) on {run.accelerator.device.type}, {precision}"
    begun = f", resumed after step {run.progress.step}" if run.progress.step else ""
    return (
        f"{model_label(run)} ({parameters / 1e6:.2f} M parameters) on {len(run.data)} images of {run.data.name}, "
        f"{where}{begun}"
    )
