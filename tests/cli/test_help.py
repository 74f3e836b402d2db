"""Help: each option says its default, everything fits 80 columns, examples work, and nothing heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from timm_fsr.cli.commands import COMMANDS, make_parser
from timm_fsr.cli.help import CommandParser
from timm_fsr.cli.main import main
from timm_fsr.cli.names import attack_names, layer_names, objective_names, training_attack_names
from timm_fsr.cli.parsers.train import USUAL, TrainParser, train_parser
from timm_fsr.evaluation.names import spelled
from timm_fsr.evaluation.registry import list_attacks
from timm_fsr.layers import list_layers
from timm_fsr.models.conversion import PLAIN
from timm_fsr.training.objectives import OBJECTIVES
from timm_fsr.training.recipe import recipe_parser
from timm_fsr.utils.announced import announced
from timm_fsr.utils.defaults import CONVERTIBLE

every_command = pytest.mark.parametrize("command", COMMANDS)

# What only starts the door: each list is a command line, and none of them may need torch.
LIGHT = [
    ["--help"],
    ["--version"],
    ["tarin"],
    ["train"],
    ["train", "--help-all"],
    ["train", "--optim.epoch=3"],
    ["train", "--optim.epochs=x"],
    ["train", "--config=no_such_recipe"],
    ["evaluate", "x", "--atacks", "fgsm"],
    ["recipes"],
    ["completion", "bash"],
    *([name, "--help"] for name in COMMANDS),
]
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "PIL",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "rich",
)
DRIVER = """
import contextlib, io, json, sys
from timm_fsr.cli.main import main
heavy = {}
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit:
            pass
    heavy[" ".join(arguments)] = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
print(json.dumps(heavy))
"""


def test_help_and_errors_in_flags_import_nothing_heavy():
    driver = [sys.executable, "-c", DRIVER, json.dumps(LIGHT), json.dumps(HEAVY)]
    done = subprocess.run(driver, capture_output=True, text=True, check=True)
    heavy = json.loads(done.stdout)
    assert len(heavy) == len(LIGHT)
    assert {arguments: found for arguments, found in heavy.items() if found} == {}


@every_command
def test_every_option_shows_its_default(command):
    parser = TrainParser(full=True) if command == "train" else make_parser(command)
    optional = [a for a in parser._actions if "--help" not in a.option_strings and a.option_strings and not a.required]
    formatter = parser._get_formatter()
    shown = {action.dest: formatter._expand_help(action) for action in optional}
    assert [action.dest for action in optional if not action.help] == [], "without a help text no default is shown"
    assert {name: text for name, text in shown.items() if "default" not in text and "several times" not in text} == {}


@every_command
def test_help_fits_eighty_columns_and_has_three_examples_that_are_accepted(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    examples = re.findall(r"^  timm-fsr (.*)$", text.partition("\nexamples:\n")[2], re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        name, *arguments = example.partition(" >")[0].split()
        assert name == command
        if command == "train":
            arguments = [argument for argument in arguments if argument not in ("--config", "my_recipe.yaml")]
            arguments = [
                f"--config={a}" if a in ("fashion_mnist_quickstart", "cifar10_resnet18") else a for a in arguments
            ]
        make_parser(command).read(arguments)


def test_the_list_of_commands(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (\w+) {2,}[a-z]", text, re.MULTILINE) == list(COMMANDS)
    assert max(map(len, text.splitlines())) <= 80


class TestTraining:
    def test_help_shows_the_keys_people_use_and_help_all_every_one(self, capsys):
        keys = [action.dest for action in recipe_parser()._actions if "." in action.dest or action.dest == "seed"]
        sections = {key.partition(".")[0] for key in keys if "." in key}
        assert {key for key in keys if "." in key} > set(USUAL[5:])
        for flag, shown in (("--help", {*USUAL}), ("--help-all", {*keys})):
            with pytest.raises(SystemExit) as caught:
                main(["train", flag])
            assert caught.value.code == 0
            printed = set(re.findall(r"^  --([\w.]+) ", capsys.readouterr().out, re.MULTILINE)) - sections
            assert printed >= shown
            assert flag == "--help-all" or printed == {*shown, "config", "import"}
        assert len(USUAL) == 20

    def test_without_arguments_it_shows_help_and_trains_nothing(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train"])
        assert caught.value.code == 2
        assert capsys.readouterr().out == train_parser().format_help()

    def test_defaults_are_written_as_in_yaml(self):
        text = " ".join(TrainParser(full=True).format_help().split())
        for shown in (
            r"--attack\.eps NUMBER .*?default: 8/255\)",
            r"--model\.layer TEXT .*?Known: .*?fsr.*?default: fsr\)",
            r"--optim\.milestones \[VALUE, \.\.\.\] .*?default: \[75, 90\]\)",
            r"--compile TEXT .*?default: null\)",
            r"--optim\.schedule \{step,cosine,one_cycle,constant\}",
        ):
            assert re.search(shown, text), shown


class TestNames:
    def test_names_read_from_source_are_those_that_are_registered(self):
        """Help texts read them, so a new file of a family has to be found by its text."""
        single = announced("timm_fsr.attacks", "register_attack")
        suites = announced("timm_fsr.evaluation.suites", "register_suite")
        attacks = {name: "steps" in known for name, known in single.items() if "only_trains" not in known}
        assert spelled(attacks, {name: "numbered" in known for name, known in suites.items()}) == list_attacks()
        assert list(announced("timm_fsr.layers", "register_layer")) == list_layers()
        assert list(announced("timm_fsr.training.objectives", "register_objective")) == OBJECTIVES.names()

    def test_with_torch_loaded_the_registries_are_asked(self, monkeypatch):
        monkeypatch.setattr("timm_fsr.cli.names.announced", lambda *_: pytest.fail("read from source"))
        assert (layer_names(), objective_names()) == (list_layers(), OBJECTIVES.names())
        assert "n_fgsm" in training_attack_names()
        assert attack_names() == list_attacks()

    def test_networks_to_convert_to(self):
        assert [name for name in CONVERTIBLE if not name.endswith("_fsr")] == list(PLAIN)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["tarin"], "unknown command 'tarin'; did you mean 'train'"),
            (["--verison"], "unknown flag '--verison'; did you mean '--version'"),
            ([], "no command was given"),
            (["evaluate", "x", "--atacks", "fgsm"], "unknown flag '--atacks'; did you mean '--attacks'"),
            (["report", "x", "--nmaes=a"], "unknown flag '--nmaes'; did you mean '--names'"),
            (["models", "mine"], "'mine' is one argument too many"),
            (["completion", "fish"], "invalid choice: 'fish'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_the_nearest_is_named(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("usage: timm-fsr")
        assert message in printed


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"default": 0, "help": "a"}, "a (default: 0)"),
        ({"default": "50 %", "help": "a"}, "a (default: 50 %)"),
        ({"help": "a"}, "a (default: none)"),
        ({"action": "store_true", "help": "a"}, "a (default: off)"),
        ({"default": ["x", "y"], "nargs": "*", "help": "a"}, "a (default: x y)"),
        ({"help": "a (default: the usual)"}, "a (default: the usual)"),
    ],
)
def test_a_default_is_shown_once(arguments, shown):
    parser = CommandParser("x", description="")
    parser.add_argument("--x", **arguments)
    line = " ".join(parser.format_help().split("show this help message and exit")[1].split())
    assert line.endswith(shown)
    assert line.count("default") == 1
