"""The flags of timm-fsr completion."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser

SHELLS = ("bash", "zsh")


def completion_parser() -> CommandParser:
    """The flags of `timm-fsr completion`."""
    parser = CommandParser(
        "completion",
        description="Print a script that completes commands, flags, recipe keys and the names of recipes. It calls "
        "nothing of Python, so it answers at once; print it again after an upgrade.",
        examples=(
            "completion bash > ~/.local/share/bash-completion/completions/timm-fsr",
            'completion zsh > "${fpath[1]}/_timm-fsr"',
            "completion bash",
        ),
    )
    parser.add_argument("shell", choices=SHELLS, metavar="bash|zsh", help="the shell")
    return parser
