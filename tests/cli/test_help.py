"""Help texts: each option of each command says its default."""

from __future__ import annotations

import argparse
import re

import pytest

from timm_fsr.cli.help import HelpFormatter
from timm_fsr.cli.main import main

COMMANDS = ("evaluate", "report", "runs", "sweep", "compare", "release", "models", "card", "push", "convert", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_shows_its_default(command, monkeypatch, capsys):
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: parsers.append(parser))
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    (parser,) = parsers
    optional = [action for action in parser._actions if action.option_strings[1:] != ["--help"] and not action.required]
    formatter = parser._get_formatter()
    shown = {action.dest: formatter._expand_help(action) for action in optional}
    assert shown
    assert [action.dest for action in optional if not action.help] == [], "without a help text no default is shown"
    assert {name: text for name, text in shown.items() if "default" not in text} == {}


def test_training_shows_the_default_of_every_key(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("--optim.epochs EPOCHS", "--attack.eps EPS", "--data.held_out HELD_OUT", "--seed SEED"):
        assert re.search(rf"{re.escape(shown)}.*?default: ", text), shown


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
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--x", **arguments)
    line = " ".join(parser.format_help().split("show this help message and exit")[1].split())
    assert line.endswith(shown)
    assert line.count("default") == 1
