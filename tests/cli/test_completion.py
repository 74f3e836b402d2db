"""Completion, as bash itself does it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from timm_fsr.cli.commands import COMMANDS
from timm_fsr.cli.main import main
from timm_fsr.training.catalog import list_recipes


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("timm-fsr", *words))
    call = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _timm_fsr; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{call}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_commands_flags_keys_and_recipes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "") == [*COMMANDS, "--help", "--version"]
    assert completed(script, "ev") == ["evaluate"]
    assert completed(script, "train", "--optim.lr") == ["--optim.lr"]
    assert "--optim.freeze" in completed(script, "train", "--optim.")
    assert completed(script, "train", "--config", "=", "finetune_r") == ["finetune_robust"]
    assert completed(script, "train", "--config", "") == [entry.name for entry in list_recipes()]
    assert completed(script, "recipes", "cifar100") == ["cifar100"]
    assert completed(script, "evaluate", "x", "--atta") == ["--attacks", "--attacked"]
    assert completed(script, "evaluate", "runs/") == [], "files are bash's own business"


def test_zsh_takes_the_same(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef timm-fsr\n")
    assert "bashcompinit" in script
