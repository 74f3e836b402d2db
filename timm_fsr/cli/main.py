"""The command line: timm-fsr COMMAND."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from timm_fsr.cli.commands import COMMANDS, make_parser, start
from timm_fsr.cli.extensions import import_given
from timm_fsr.cli.failures import DEBUG_HELP, reported, without_debug
from timm_fsr.utils.errors import unknown
from timm_fsr.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status, as `timm_fsr.cli.failures.reported` describes it.
    """
    given, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
    name = _command_name(given)
    return reported(name, lambda: _run(name, given[1:]), given[1:], debug=debug)


def _run(name: str, arguments: Sequence[str]) -> None:
    """Read the flags, which refuses wrong ones before anything heavy is imported, and start the command."""
    others = import_given(arguments)
    start(name, make_parser(name).read(arguments if COMMANDS[name].has_recipe else others))


def _command_name(given: Sequence[str]) -> str:
    """The command that was named; exits after --help, --version and what is no command."""
    first = given[0] if given else ""
    if first in COMMANDS:
        return first
    if first in ("-h", "--help"):
        sys.stdout.write("\n".join(_help()) + "\n")
        raise SystemExit(0)
    if first == "--version":
        sys.stdout.write(f"timm_fsr {__version__}\n")
        raise SystemExit(0)
    problem = "flag" if first.startswith("-") else "command"
    known = ["--help", "--version"] if problem == "flag" else list(COMMANDS)
    message = unknown(problem, first, known) if first else "no command was given"
    _say(f"usage: timm-fsr COMMAND ...; `timm-fsr --help` lists the commands\ntimm-fsr: error: {message}")
    raise SystemExit(2)


def _help() -> Iterator[str]:
    """The lines of `timm-fsr --help`."""
    yield "usage: timm-fsr COMMAND ..."
    yield "\nFeature layers on timm models: adversarial training and robust evaluation."
    for group, entries in groupby(COMMANDS.items(), key=lambda entry: entry[1].group):
        yield f"\n{group}:"
        for name, command in entries:
            yield f"  {name:12}{command.about}"
    yield "\n`timm-fsr COMMAND --help` says more. With any command, `--import FILE_OR_MODULE`"
    yield "imports code of your own that registers layers, objectives, attacks or suites."
    yield DEBUG_HELP
    yield "\nexamples:"
    yield "  timm-fsr demo"
    yield "  timm-fsr train --config fashion_mnist_quickstart --optim.epochs 5"
    yield "  timm-fsr evaluate runs/fashion_mnist_fsr/best --attacks standard adaptive"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
