"""Runs in a process of its own: does on the Hub what it reads from standard input, line by line.

The Hub's client reads its settings when it is imported, so a test cannot point the client of its own process elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.reports.report import Report

time.sleep = lambda _: None  # type: ignore[assignment]  # patience is not what is tested, ours nor the client's


def setenv(name: str, value: str | None) -> None:
    """Change the environment, which holds the token and the namespace of the tags."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def push(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    return dataclasses.asdict(timm_fsr.push_to_hub(folder, repo_id, **options))


def push_model(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    model = timm_fsr.from_pretrained(folder)
    report = Report.load(Path(folder) / "report.json")
    return dataclasses.asdict(timm_fsr.push_to_hub(model, repo_id, report=report, **options))


def create(name: str, **arguments: Any) -> list[float]:
    return _logits(timm.create_model(name, pretrained=True, **arguments))


def load(name: str, **arguments: Any) -> list[float]:
    return _logits(timm_fsr.from_pretrained(name, **arguments))


def validate(card: str) -> None:
    ModelCard(card).validate(repo_type="model")


def register(folder: str) -> str:
    return timm_fsr.register_pretrained(folder)


def command(*arguments: str) -> list[Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(arguments)
    return [code, out.getvalue()]


def _logits(model: torch.nn.Module) -> list[float]:
    given = torch.rand(2, model.in_chans, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(given).flatten().tolist()


def answer(line: str) -> dict[str, Any]:
    name, positional, named = json.loads(line)
    try:
        return {"value": globals()[name](*positional, **named)}
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    reply, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=reply, flush=True)
