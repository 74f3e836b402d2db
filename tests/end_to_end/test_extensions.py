"""A layer, an objective and an attack from a file outside the package, by command line alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

MINE = '''
"""A layer, an objective and an attack of somebody's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import timm_fsr
from timm_fsr.training.objectives import LossTerms


@timm_fsr.register_layer
class Tint(timm_fsr.FeatureLayer):
    name = "tint"

    def __init__(self, channels, num_classes, *, start=1.0):
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, feature, labels=None):
        return feature * self.scale, {"scale": self.scale.expand(len(feature), -1, 1, 1)} if self.wants_aux else {}

    def aux_losses(self, aux, logits, labels):
        return {"size": aux["scale"].square().mean()}


@timm_fsr.register_objective
@dataclass(frozen=True, kw_only=True)
class Calm(timm_fsr.Objective):
    """Adversarial training with small logits."""

    name: ClassVar[str] = "calm"
    weight: float = 0.01

    def terms(self, model, attack, images, adversarial, labels):
        with timm_fsr.record(model, labels) as tape:
            logits = model(adversarial).float()
        size = self.weight * logits.square().mean()
        terms = LossTerms(adversarial=F.cross_entropy(logits, labels), size=size, **tape.losses(logits, labels))
        terms.logits = {"adversarial": logits.detach()}
        return terms


@timm_fsr.register_attack
@dataclass(frozen=True, kw_only=True)
class Walk:
    """Random steps, of which the best is kept."""

    name: ClassVar[str] = "walk"
    eps: float = 8 / 255
    steps: int = 3
    shrink: float = 1.0

    def with_eps(self, eps):
        return Walk(eps=eps, steps=self.steps, shrink=self.shrink)

    def __call__(self, loss_fn, images, *, generator=None):
        best, highest = images, torch.full((len(images),), -torch.inf)
        for _ in range(self.steps):
            noise = torch.empty_like(images).uniform_(-1, 1, generator=generator)
            tried = (images + self.shrink * self.eps * noise).clamp(0, 1)
            with torch.no_grad():
                found = loss_fn(tried)
            loss = getattr(found, "loss", found)
            better = (loss > highest).view(-1, 1, 1, 1)
            best, highest = torch.where(better, tried, best), torch.maximum(loss, highest)
        return best.detach()
'''

BRIEF = [
    "--data.limit_train=60",
    "--data.limit_test=10",
    "--data.held_out=20",
    "--optim.epochs=1",
    "--optim.batch_size=20",
    "--optim.schedule=constant",
    "--evaluation.validation_steps=1",
]


DRIVER = """
import contextlib, io, json, sys
from timm_fsr.attacks.autoattack import Component
from timm_fsr.cli.main import main
from timm_fsr.evaluation.suites import adaptive

build, adaptive.STEPS = Component._build, 2
def brief(self, *args):
    attack = build(self, *args)
    attack.n_iter, attack.n_queries = 2, 2
    return attack
Component._build = brief

found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as done:
            code = done.code
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def outputs(folder: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit code and both outputs of commands, in one process since each takes seconds to start; attacks are brief."""
    driver = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(driver, cwd=folder, capture_output=True, text=True, check=True)
    return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]


OWN = ["--import", "mine.py"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """A folder with `mine.py` and what was made with it, and what the commands said."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(MINE)
    flags = ["--model.layer=tint", "--model.layer_args.tint.start=0.5", "--objective.name=calm", "--attack.name=walk"]
    more = ["--attack.args.walk.shrink=0.9", "--objective.args.calm.weight=0.02", "--evaluation.attacks=[walk4,fgsm]"]
    found = outputs(
        folder,
        ["train", *OWN, *flags, *more, *BRIEF, "--output=run"],
        [
            "evaluate",
            *OWN,
            "run/best",
            "--limit=10",
            "--eps=0.01",
            "--attacks",
            "walk2",
            "adaptive",
            "--output=results",
        ],
        ["evaluate", *OWN, "--help"],
        ["train", *OWN, "--help"],
        ["train", *OWN, "--objective.name=clam", *BRIEF],
        ["evaluate", *OWN, "run/best", "--attacks", "wakl4"],
    )
    return folder, found


@pytest.fixture(scope="module")
def folder(told: tuple[Path, list[tuple[int, str, str]]]) -> Path:
    """With `mine.py`, and a model that was trained by it."""
    path, (trained, *_) = told
    assert trained[0] == 0, trained[2]
    return path


@pytest.fixture(scope="module")
def without_import(folder: Path) -> list[tuple[int, str, str]]:
    """What two commands say that import nothing, in a process that has imported nothing: the recipe does, later."""
    again = ["train", "--config=run/recipe.yaml", "--output=again", "--evaluation.attacks=[]"]
    return outputs(folder, ["evaluate", "run/best", "--limit=10"], again)


def test_it_is_trained_by_all_three(folder: Path) -> None:
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"loss.adversarial", "loss.size", "loss.tint.size"} <= json.loads(line).keys()
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["attacks"]["walk4"] == "Walk(eps=0.03137254901960784, steps=4, shrink=1.0)"
    assert "Calm(" in report["conditions"]["training"]
    assert "Walk(eps=0.03137254901960784, steps=3, shrink=0.9)" in report["conditions"]["training"]


def test_the_recipe_remembers_what_to_import(folder: Path, without_import: list[tuple[int, str, str]]) -> None:
    recipe = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert recipe["imports"] == [str((folder / "mine.py").resolve())]  # a resumed run may start elsewhere
    published = yaml.safe_load((folder / "run" / "best" / "recipe.yaml").read_text())
    assert published["imports"] == ["mine.py"]
    code, _, error = without_import[1]
    assert code == 0, error
    weights = [(folder / run / "last" / "model.safetensors").read_bytes() for run in ("run", "again")]
    assert weights[0] == weights[1]


def test_it_is_evaluated_and_reloaded(folder: Path, told: tuple[Path, list[tuple[int, str, str]]]) -> None:
    code, _, error = told[1][1]
    assert code == 0, error
    stages = json.loads((folder / "results" / "report.json").read_text())["stages"]["adaptive"]
    assert {"identity", "bypass", "joint 1"} <= stages.keys()
    script = """
import mine, timm
model = timm.create_model("local-dir:run/best", pretrained=True)
assert model.tint["layer4"].start == 0.5
assert timm.is_model("resnet50_tint")
"""
    (folder / "reload.py").write_text(script)
    subprocess.run([sys.executable, "reload.py"], cwd=folder, check=True)


def test_the_saved_model_names_what_to_import(folder: Path, without_import: list[tuple[int, str, str]]) -> None:
    assert json.loads((folder / "run" / "best" / "config.json").read_text())["timm_fsr"]["imports"] == ["mine.py"]
    code, _, error = without_import[0]
    assert code == 2
    assert "a layer that mine.py registers: import that first (on the command line add --import mine.py)" in error


def test_names_are_in_help_and_hints(told: tuple[Path, list[tuple[int, str, str]]]) -> None:
    help_of_evaluate, help_of_train, objective, attack = told[1][2:]
    assert "walk20" in help_of_evaluate[1]
    assert "tint" in help_of_train[1]
    assert "did you mean 'calm'" in objective[2]
    assert "did you mean 'walk20'" in attack[2]


def test_what_cannot_be_imported_is_refused_in_a_sentence(folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    taken = "import timm_fsr\n\n@timm_fsr.register_layer\nclass Mine(timm_fsr.FeatureLayer):\n    name = 'fsr'\n"
    (folder / "taken.py").write_text(taken)
    (folder / "exits.py").write_text("import sys\n\nsys.exit(0)\n")
    messages = {
        "nowhere.py": "there is no file nowhere.py to import",
        "no_such_module": "there is no module no_such_module to import",
        "broken.py": "broken.py cannot be imported: ZeroDivisionError: division by zero",
        "taken.py": "the feature layer name 'fsr' is taken by FSR in timm_fsr.layers.fsr",
        "exits.py": "exits.py cannot be imported: SystemExit: 0",
        ".": ". is a folder; give the path of a Python file in it",
        "a b": "'a b' is neither a Python file nor a module",
    }
    commands = [
        given
        for source in messages
        for given in (["train", f"--import={source}", *BRIEF], ["evaluate", "run/best", "--import", source])
    ]
    for given, (code, _, error) in zip(commands, outputs(folder, *commands), strict=True):
        source = given[1].removeprefix("--import=") if given[0] == "train" else given[-1]
        assert code == 2, source
        assert messages[source] in error
        assert "Traceback" not in error
