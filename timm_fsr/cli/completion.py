"""timm-fsr completion: a script that completes commands and flags, with all words in it."""

from __future__ import annotations

import argparse
import sys

from timm_fsr.cli.commands import COMMANDS, make_parser
from timm_fsr.cli.help import CommandParser
from timm_fsr.cli.parsers.train import TrainParser
from timm_fsr.training.catalog import list_recipes

# "=" splits words in bash, so that a flag and its value come as three. After --config come recipes and files.
_BASH = """# bash completion of timm-fsr
_timm_fsr() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [[ $current == "=" ]]; then current=""
  elif [[ $previous == "=" ]]; then previous="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  if [[ $COMP_CWORD -eq 1 ]]; then words="{commands} --help --version"
  elif [[ $previous == "--config" && ${{COMP_WORDS[1]}} == "train" ]]; then words="{recipes}"
  elif [[ $current == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  else
    case "${{COMP_WORDS[1]}}" in
      recipes) words="{recipes}" ;;
      completion) words="bash zsh" ;;
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _timm_fsr timm-fsr
"""

_ZSH = """#compdef timm-fsr
autoload -U +X bashcompinit && bashcompinit
{bash}"""


def completion_command(options: argparse.Namespace) -> None:
    """`timm-fsr completion bash|zsh`: print the script."""
    bash = bash_script()
    sys.stdout.write(bash if options.shell == "bash" else _ZSH.format(bash=bash))


def bash_script() -> str:
    """The script for bash, which zsh understands too."""
    cases = [f'      {name}) words="{" ".join(_flags(name))}" ;;' for name in COMMANDS]
    return _BASH.format(
        commands=" ".join(COMMANDS),
        recipes=" ".join(entry.name for entry in list_recipes()),
        cases="\n".join(cases),
    )


def _flags(command: str) -> list[str]:
    parser: CommandParser = TrainParser(full=True) if command == "train" else make_parser(command)
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
