"""What the tests of publishing and downloading share: a client in a process of its own, and a small model to move."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch

import timm_fsr
from support.hub_server import HubServer
from timm_fsr.models.saving import weights_digest
from timm_fsr.reports.report import Report

FILES = ("README.md", "config.json", "modeling_timm_fsr.py", "model.safetensors", "recipe.yaml", "report.json")
CLIENT = Path(__file__).with_name("hub_client.py")
RECIPE = {"seed": 0, "output": "runs/x", "model": {"name": "resnet_tiny_cifar", "layer": "fsr"}}


class Client:
    """A process of its own with a cache of its own, which does what tests/support/hub_client.py knows."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = "hf_owner", **environment: str) -> None:
        settings = {**hub.environment(home, token), **environment}
        command = [sys.executable, str(CLIENT)]
        self.process = subprocess.Popen(
            command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, name: str, *positional: Any, **named: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps([name, positional, named]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def do(self, name: str, *positional: Any, **named: Any) -> Any:
        """What came of it, which has to be no error."""
        answer = self.ask(name, *positional, **named)
        assert "value" in answer, answer
        return answer["value"]

    def fails(self, kind: str, text: str, name: str, *positional: Any, **named: Any) -> None:
        answer = self.ask(name, *positional, **named)
        assert answer.get("kind") == kind, answer
        assert text in answer["message"]

    @contextmanager
    def using(self, token: str | None) -> Iterator[None]:
        """Within it the process has another token, or none."""
        self.do("setenv", "HF_TOKEN", token)
        try:
            yield
        finally:
            self.do("setenv", "HF_TOKEN", "hf_owner")

    def close(self) -> None:
        self.process.communicate(timeout=60)


def network(seed: int = 0, **arguments: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet_tiny_cifar_fsr", num_classes=4, fsr_hidden=4, **arguments).eval()


def report_on(network: torch.nn.Module, **conditions: Any) -> Report:
    right = torch.tensor([True, True, False, True])
    return Report(
        correct={"clean": right, "pgd20": right & torch.tensor([True, False, True, False])},
        attacks={"pgd20": "PGD(...)"},
        norm="linf",
        eps=8 / 255,
        seed=0,
        labels=torch.arange(4),
        conditions={"model": "x", "data": "toys[test]", "weights_sha256": weights_digest(network), **conditions},
    )


def save(folder: Path, seed: int = 0, **conditions: Any) -> Path:
    model = network(seed)
    report = report_on(model, **conditions)
    return timm_fsr.save_pretrained(model, folder, report=report, recipe=RECIPE, license="apache-2.0")


def logits(model: torch.nn.Module) -> list[float]:
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(model.eval()(given).flatten().tolist())
