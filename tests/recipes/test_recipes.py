"""The recipes that come along: each is read, checked with every method, and trains for two steps of a few images."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler

from timm_fsr.attacks.pgd import NFGSM, PGD
from timm_fsr.hooks.site import layer_groups
from timm_fsr.training.catalog import list_recipes
from timm_fsr.training.objectives import OBJECTIVES
from timm_fsr.training.parsing import parse_number
from timm_fsr.training.recipe import Recipe, parse_arguments
from timm_fsr.training.state import checkpoints_of
from timm_fsr.training.trainer import Trainer, train

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# A recipe that says nothing of a network is given after one that does.
UNDER = {"cifar100": "cifar10_resnet18"}

# Two steps of four images and one held-out validation, whatever the recipe says of their number; nothing else changes.
SMALL = [
    "--data.limit_train=10",
    "--data.limit_test=2",
    "--data.held_out=2",
    "--optim.batch_size=4",
    "--optim.epochs=1",
    "--evaluation.attacks=[]",
    "--evaluation.validation_steps=1",
    "--model.pretrained=false",
]

# Images of 64 pixels in place of 224 cost a twelfth; ViT and Swin are built for one size.
SMALL_IMAGENET = ["--data.size=64", "--data.workers=0"]
SIZED = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")

# Two steps of Wide ResNet 34-10 and its 740 MB of files take 27 s on a slow core; so it gets one block per stage.
WIDE = ("wrn28_10_cifar", "wrn34_10_cifar")

OPTIMIZERS = {"momentum": torch.optim.SGD, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
SCHEDULES = {"step": MultiStepLRScheduler, "cosine": CosineLRScheduler, "one_cycle": PolyLRScheduler}
ATTACKS = {"pgd": PGD, "n_fgsm": NFGSM}

# Begins with a robust network of the user's own; tests/recipes/test_finetuning.py makes one and runs it.
NEEDS_MODEL = "finetune_robust"

every_recipe = pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem != NEEDS_MODEL], ids=lambda path: path.stem
)


def configs(path: Path) -> list[str]:
    """The flags that name a recipe, after the one it is made to follow."""
    under = UNDER.get(path.stem)
    return [f"--config={file}" for file in ([path.with_stem(under)] if under else []) + [path]]


def declared(path: Path) -> dict[str, dict[str, Any]]:
    """What the YAML says, read without the package's own reader; absent sections are empty."""
    under = UNDER.get(path.stem)
    said: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "attack": {}, "objective": {}, "optim": {}, "top": {}}
    for file in ([path.with_stem(under)] if under else []) + [path]:
        for key, value in yaml.safe_load(file.read_text()).items():
            said.setdefault(key, {}).update(value) if isinstance(value, dict) else said["top"].update({key: value})
    return said


def encoded(rng: np.random.Generator, side: int, mode: str = "RGB") -> bytes:
    """A picture of noise as PNG."""
    buffer = io.BytesIO()
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder: Path, splits: dict[str, int], side: int, columns: dict[str, int], image: str) -> None:
    """Parquet files named as the Hub names them; `columns` maps each label column to its number of classes."""
    rng = np.random.default_rng(0)
    labels = {name: datasets.ClassLabel(names=[f"{name} {i}" for i in range(count)]) for name, count in columns.items()}
    features = datasets.Features({image: datasets.Image(), **labels})
    for split, count in splits.items():
        rows: dict[str, list[Any]] = {name: [i % classes for i in range(count)] for name, classes in columns.items()}
        pictures = [encoded(rng, side, "L" if side == 64 and i == 3 else "RGB") for i in range(count)]  # one is grey
        rows[image] = [{"bytes": picture, "path": None} for picture in pictures]
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few images of noise in place of each data set, with the splits, columns and sizes that it has on the Hub."""
    root = tmp_path_factory.mktemp("sources")
    tables: dict[str, tuple[dict[str, int], int, dict[str, int], str]] = {
        "uoft-cs/cifar10": ({"train": 12, "test": 4}, 32, {"label": 10}, "img"),
        "uoft-cs/cifar100": ({"train": 12, "test": 4}, 32, {"fine_label": 100, "coarse_label": 20}, "img"),
        "ufldl-stanford/svhn": ({"train": 12, "test": 4}, 32, {"label": 10}, "image"),
        "zh-plus/tiny-imagenet": ({"train": 12, "valid": 4}, 64, {"label": 200}, "image"),
    }
    found = {"fashion_mnist": "fashion_mnist", "zalando-datasets/fashion_mnist": "fashion_mnist"}
    found["ILSVRC/imagenet-1k"] = str(root / "imagenet")
    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for name, (splits, side, columns, image) in tables.items():
        folder = root / name.replace("/", "_")
        folder.mkdir()
        write_table(folder, splits, side, columns, image)
        found[name] = str(folder)
    if progress:
        datasets.enable_progress_bars()
    rng = np.random.default_rng(1)
    for split in ("train", "validation"):
        for index in range(12):
            file = root / "imagenet" / split / f"n{index % 3:08d}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(rng, 70 + index))
    images, labels = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), np.arange(6)
    np.savez(root / "1m.npz", image=images, label=labels)
    found["data/1m.npz"] = str(root / "1m.npz")
    found["data/images"] = str(root / "own")
    for split in ("train", "test"):
        for index in range(12):
            file = root / "own" / split / f"class {index % 3}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(rng, 70 + index))
    return found


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A folder for a run, removed at once: the largest network leaves 700 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainer, once for each step it took."""
    seen: list[Trainer] = []
    take_step: Callable[..., None] = Trainer.take_step

    def spy(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        seen.append(trainer)
        take_step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "take_step", spy)
    return seen


def small(path: Path, output: Path, sources: dict[str, str]) -> Recipe:
    """The recipe at a cost that a test can bear."""
    said = declared(path)
    flags = [f"--output={output}", f"--data.source={sources[said['data']['source']]}"]
    if "extra_source" in said["data"]:
        flags.append(f"--data.extra_source={sources[said['data']['extra_source']]}")
    if said["attack"].get("name", "pgd") == "pgd":
        flags.append("--attack.steps=1")
    if said["data"]["source"] in ("ILSVRC/imagenet-1k", "data/images"):
        flags += SMALL_IMAGENET
    if said["model"]["name"] in SIZED:
        flags.append("--model.args.img_size=64")
    if said["model"]["name"] in WIDE:
        flags.append("--model.args.layers=[1,1,1]")
    return parse_arguments([*configs(path), *SMALL, *flags])


@every_recipe
class TestEveryRecipe:
    def test_it_trains_as_it_says_and_leaves_a_model_that_timm_loads(self, path, output, sources, watched):
        recipe = small(path, output, sources)
        train(recipe)
        assert len(watched) == 2, "not two steps"
        trainer, said = watched[0], declared(path)
        check_method(trainer, said)
        check_optimizer(trainer, said)
        check_rest(trainer, said)
        assert Recipe.load(output / "recipe.yaml") == recipe
        (line,) = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(value) for value in line.values())
        assert {"loss.fsr.separation", "loss.fsr.recalibration"} <= set(line)
        model = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True).eval()
        assert [site.layer.name for group in layer_groups(model) for site in group.sites] == ["fsr"]
        with torch.no_grad():
            logits = model(torch.rand(1, *trainer.data.image_size))
        assert logits.shape == (1, trainer.data.num_classes)
        assert logits.isfinite().all()
        assert len(recipe.data.build_test(trainer.data.classes, progress=False)) == 2, "the test split is another one"

    @pytest.mark.parametrize("override", ["--objective.name=trades", "--objective.name=mart", "--model.layer=null"])
    def test_methods_are_compared_by_one_override(self, path, override):
        parse_arguments([*configs(path), override]).check()

    def test_its_first_lines_say_what_it_is(self, path):
        lines = path.read_text().splitlines()
        comment = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
        assert 1 <= len([line for line in comment if not re.match(r"# (purpose|cost|measured): ", line)]) <= 3
        assert max(map(len, lines)) <= 120


def check_method(trainer: Trainer, said: dict[str, dict[str, Any]]) -> None:
    name = said["objective"].get("name", "at")
    assert trainer.objective == OBJECTIVES[name](**said["objective"].get("args", {}).get(name, {}))
    attack = said["attack"]
    assert type(trainer.attack) is ATTACKS[attack.get("name", "pgd")]
    assert trainer.attack.eps == pytest.approx(parse_number(attack["eps"]))
    if "step_size" in attack:
        assert trainer.attack.step_size == pytest.approx(parse_number(attack["step_size"]))
    assert getattr(trainer.attack, "start_noise", None) == attack.get("start_noise")
    assert trainer.recipe.attack.eps_at(0) == (0 if attack.get("warmup_epochs") else trainer.attack.eps)


def check_optimizer(trainer: Trainer, said: dict[str, dict[str, Any]]) -> None:
    optim = said["optim"]
    optimizer = trainer.optimizer.optimizer
    name = optim.get("optimizer", "momentum")
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.defaults.get("nesterov", False) == (name == "sgd")
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {parse_number(optim["weight_decay"])} | (set() if optim.get("decay_all", True) else {0.0})
    peaks = {group["initial_lr"] for group in optimizer.param_groups}
    assert peaks == {parse_number(optim["lr"])}
    scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
    assert max(scales) == 1
    assert (len(scales) > 1) == ("layer_decay" in optim)
    assert type(trainer.schedule) is SCHEDULES[optim["schedule"]]
    assert (None if trainer.ema is None else trainer.ema.decay) == optim.get("ema_decay")


def check_rest(trainer: Trainer, said: dict[str, dict[str, Any]]) -> None:
    assert trainer.progress.step == 2
    assert trainer.accelerator.mixed_precision == said["top"].get("mixed_precision", "no")
    assert type(trainer.timm_model).__module__.startswith("timm.models.")
    assert trainer.recipe.model.name == said["model"]["name"]
    assert trainer.recipe.model.layer == said["model"]["layer"] == "fsr"
    assert (trainer.extra is not None) == ("extra_source" in said["data"])


def test_a_run_by_a_recipe_can_be_resumed(output, sources):
    recipe = small(FOLDER / "fashion_mnist_quickstart.yaml", output, sources)
    train(recipe)
    tensors, _ = checkpoints_of(recipe).load_newest(lambda problem: pytest.fail(problem))
    assert tensors["optimizer"]["param_groups"]


class TestSeveralConfigs:
    NETWORK, DATA = FOLDER / "cifar10_wrn34_10.yaml", FOLDER / "cifar100.yaml"

    def test_a_later_one_wins_key_by_key(self):
        recipe = parse_arguments([f"--config={self.NETWORK}", f"--config={self.DATA}"])
        network = Recipe.load(self.NETWORK)
        assert (recipe.data.source, recipe.data.label_column) == ("uoft-cs/cifar100", "fine_label")
        assert recipe.data.held_out == network.data.held_out == 1000
        assert (recipe.model, recipe.attack, recipe.optim) == (network.model, network.attack, network.optim)
        assert recipe.output == "runs/cifar100"

    def test_the_order_decides(self):
        recipe = parse_arguments([f"--config={self.DATA}", f"--config={self.NETWORK}"])
        assert recipe.data.source == "uoft-cs/cifar10"

    def test_a_flag_behind_them_wins_over_both(self):
        recipe = Recipe.load(self.NETWORK, [f"--config={self.DATA}", "--output=runs/other", "--optim.epochs=7"])
        assert (recipe.output, recipe.optim.epochs, recipe.data.source) == ("runs/other", 7, "uoft-cs/cifar100")


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script recipes/cost.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cost")


class TestCost:
    def test_the_table_has_what_the_script_counts(self, cost):
        rows = re.findall(r"^\| `([\w.]+)` \|.* (\S+) FLOP \|", TestDocumentation.TEXT, re.MULTILINE)
        counted = {name for name, _ in rows}
        uncounted = {
            path.name for path in RECIPES if path.name not in counted and "# cost: measured" not in path.read_text()
        }
        assert uncounted == {"cifar100.yaml", f"{NEEDS_MODEL}.yaml"}
        assert len(counted) > 15
        for name, flops in rows:
            counted = cost.training_flops(Recipe.load(FOLDER / name, ["--model.pretrained=false"]))
            assert float(flops) == float(f"{counted:.1e}"), name

    def test_what_only_changes_another_recipe_is_not_counted(self, cost, capsys):
        assert cost.main([str(FOLDER / f"{name}.yaml") for name in ("cifar100", NEEDS_MODEL, "cifar10_fast")]) == 0
        *others, counted = capsys.readouterr().out.splitlines()
        assert len(others) == 2
        assert not any("FLOP" in line for line in others)
        assert "FLOP" in counted

    @pytest.mark.parametrize(
        ("flags", "passes"),
        [
            ([], 23),
            (["--attack.steps=3"], 9),
            (["--attack.name=n_fgsm"], 5),
            (["--objective.name=trades"], 27),
            (["--objective.name=mart"], 26),
            (["--objective.name=natural"], 3),
        ],
    )
    def test_passes_follow_attack_and_objective(self, cost, flags, passes):
        assert cost.training_passes(parse_arguments(flags)) == passes


class TestDocumentation:
    TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")

    def test_the_tables_list_the_files_there_are(self):
        rows = re.findall(r"^\| `([\w.]+\.yaml)` \|", self.TEXT, re.MULTILINE)
        assert sorted(rows) == sorted(path.name for path in [*RECIPES, *FOLDER.glob("accelerate/*.yaml")])

    def test_they_say_what_the_recipes_say_of_themselves(self):
        """The comment on top of each file is the source; links alone are the table's own."""
        rows = re.findall(r"^\| `(\w+)\.yaml` \| (.*?) \| `.*?` \| (.*?) \| (.*?) \|$", self.TEXT, re.MULTILINE)
        plain = {name: [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell) for cell in cells] for name, *cells in rows}
        assert plain == {entry.name: [entry.purpose, entry.cost, entry.measured] for entry in list_recipes()}

    def test_every_file_it_names_exists(self):
        named = set(re.findall(r"recipes/([\w/.]+\.(?:yaml|sbatch|py))", self.TEXT))
        assert named
        assert not [name for name in named if not (FOLDER / name).is_file()]

    def test_its_commands_are_accepted(self):
        """What stands behind each `timm-fsr train`, `recipes/train.py` and `recipes/slurm.sbatch`."""
        scripts = r"(?:timm-fsr train|recipes/train\.py|recipes/slurm\.sbatch)"
        commands = [found for found in re.findall(scripts + r" (--config[^`\n]*)", self.TEXT) if "<" not in found]
        assert len(commands) > len(RECIPES)
        for command in commands:
            parse_arguments([flag.replace("recipes/", f"{FOLDER}/") for flag in command.split()])

    def test_no_two_recipes_share_an_output(self):
        outputs = [yaml.safe_load(path.read_text())["output"] for path in RECIPES]
        assert len(set(outputs)) == len(outputs)
        assert all(output.startswith("runs/") for output in outputs)
