"""timm-fsr demo: adversarial training with and without FSR at equal budget, on data inside the package."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from timm_fsr.attacks.base import Attack
from timm_fsr.data.dataset import Images
from timm_fsr.evaluation.examples import attack_picture
from timm_fsr.models.pixel import as_pixel_model
from timm_fsr.reports.comparison import mcnemar
from timm_fsr.reports.report import WORST_CASE, Report
from timm_fsr.training.options import AttackOptions, DataOptions, EvaluationOptions, ModelOptions, OptimOptions
from timm_fsr.training.output import check_output
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train
from timm_fsr.utils.files import staged

_PICTURED = 6
_CAUTION = "One seed and a weak attack: this is a demonstration, not a result."


def quickstart_recipe(layer: str | None = "fsr") -> Recipe:
    """The recipe of the demonstration, also in `recipes/fashion_mnist_quickstart.yaml`.

    Args:
        layer: the feature layer to train with; None trains the same network without one.
    """
    return Recipe(
        output=f"runs/fashion_mnist_{layer or 'plain'}",
        model=ModelOptions(name="resnet_tiny_cifar", layer=layer, layer_args={"fsr": {"hidden": 16}}),
        data=DataOptions(source="fashion_mnist", held_out=500, crop_padding=2),
        attack=AttackOptions(eps=0.1, steps=5),
        optim=OptimOptions(lr=0.1, epochs=12, schedule="one_cycle", warmup=0.3, decay_all=False),
        evaluation=EvaluationOptions(attacks=["fgsm", "pgd20"], validation_steps=10, validate_every=3),
    )


def run_demo(output: str | Path, *, epochs: int | None = None, limit: int | None = None, seed: int = 0) -> None:
    """Train both networks, compare them on the test images, and show what FSR does to attacked images.

    Args:
        output: folder of the results; what an earlier demonstration left there is replaced, and nothing else.
        epochs: of each training; None takes the recipe's.
        limit: the largest number of training and of test images; None takes all.
        seed: of everything random.
    """
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(output)
    if (folder / "attack.png").exists() and not (folder / "with_fsr" / "recipe.yaml").exists():
        raise FileExistsError(f"{folder / 'attack.png'} is of no demonstration; choose another folder with --output")
    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    recipes = {
        title: _adapted(quickstart_recipe(layer), folder / title.replace(" ", "_").lower(), epochs, limit, seed)
        for title, layer in (("without FSR", None), ("with FSR", "fsr"))
    }
    for recipe in recipes.values():  # both, before the first one trains
        check_output(recipe)
    for title, recipe in recipes.items():
        console.rule(f"adversarial training {title}")
        started = time.perf_counter()
        train(recipe)
        seconds[title] = time.perf_counter() - started
        reports[title] = Report.load(recipe.folder / "report.json")
    console.rule("result")
    console.print(comparison_table(reports, seconds))
    console.print(verdict(reports["with FSR"], reports["without FSR"]))
    test = recipes["with FSR"].data.build_test()
    model_folder = folder / "with_fsr" / "best"
    picture = _draw(model_folder, test, recipes["with FSR"].attack.build(), seed)
    with staged(folder) as scratch:
        picture.save(scratch / "attack.png")
    console.print(
        f"The FSR model is saved in {model_folder}; load it anywhere with\n"
        f'    import timm, timm_fsr\n    model = timm.create_model("local-dir:{model_folder}", pretrained=True)\n'
        f"Clean and attacked images with FSR's mask: {folder / 'attack.png'}\n"
        f"Metrics and reports of both runs: {folder}/*/metrics.jsonl, {folder}/*/report.json"
    )


def comparison_table(reports: dict[str, Report], seconds: dict[str, float]) -> Table:
    """One row per model: accuracies in percent with their 95 % intervals, and the time it took."""
    first = next(iter(reports.values()))
    title = f"{first.conditions['data']}, {first.threat}, {first.count} test images, 95 % intervals"
    table = Table(title=escape(title))  # "[test]" would be taken for a colour
    table.add_column("trained", no_wrap=True)
    names = (*first.correct, WORST_CASE)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("time", justify="right")
    for title, report in reports.items():
        cells = []
        for name in names:
            low, high = report.interval(name)
            cells.append(
                f"{100 * report.accuracy_of(name):.1f} %\n{100 * low:.1f} - {100 * high:.1f}"
            )  # fits 80 columns
        table.add_row(title, *cells, f"{seconds[title]:.0f} s")
    return table


def verdict(with_layer: Report, without: Report) -> str:
    """What the numbers say about FSR, in a sentence, judged by the images on which the two models differ."""
    for name, report in (("with", with_layer), ("without", without)):
        if report.collapsed:
            return f"The network trained {name} FSR cannot be compared: {report.collapsed}. {_CAUTION}"
    gained, lost, distinguishable = mcnemar(without, with_layer, "pgd20")
    points = 100 * (gained - lost) / with_layer.count
    meaning = ("more" if distinguishable else "no more") + " than chance on these images explains"
    return (
        f"Under PGD-20, FSR is {points:+.1f} points against the same training without it ({gained} images gained, "
        f"{lost} lost): {meaning}. {_CAUTION}"
    )


def _adapted(recipe: Recipe, output: Path, epochs: int | None, limit: int | None, seed: int) -> Recipe:
    """The recipe with what the command line asked for."""
    data, optim = recipe.data, recipe.optim
    if limit is not None:
        held_out = min(data.held_out or limit, limit // 4)
        if limit - held_out < optim.batch_size:
            raise ValueError(
                f"limit={limit} leaves too few images for a training batch of {optim.batch_size}; use 200 or more"
            )
        data = dataclasses.replace(data, limit_train=limit, limit_test=limit, held_out=held_out)
    if epochs is not None:
        optim = dataclasses.replace(optim, epochs=epochs)
    return dataclasses.replace(recipe, output=str(output), overwrite=True, seed=seed, data=data, optim=optim)


def _draw(folder: Path, test: Images, attack: Attack, seed: int) -> Image.Image:
    """Reload the saved model by timm, as a user would, and picture the first correctly classified test images."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, labels = next(test.batches(200))
    with torch.no_grad():
        right = as_pixel_model(model)(images).argmax(dim=1) == labels
    chosen = right.nonzero().flatten()[:_PICTURED]
    if len(chosen) == 0:
        chosen = torch.arange(min(_PICTURED, len(labels)))
    return attack_picture(model, images[chosen], labels[chosen], test.classes, attack, seed=seed)


def demo_command(options: argparse.Namespace) -> None:
    """`timm-fsr demo`: train with and without FSR on embedded images, and compare."""
    run_demo(options.output, epochs=options.epochs, limit=options.limit, seed=options.seed)
