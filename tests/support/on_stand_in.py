"""Trains, resumes and attacks on the CPU and on the device of stand_in.py, and prints as JSON what came out of each.

python tests/support/on_stand_in.py FOLDER
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import stand_in  # before everything that could keep a torch.Generator
import timm
import torch
from accelerate.state import PartialState

import timm_fsr
from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.autoattack import Component
from timm_fsr.attacks.pgd import PGD
from timm_fsr.evaluation import gradient_masking as evidence
from timm_fsr.evaluation.benchmark import assess
from timm_fsr.evaluation.gradient_masking import gather_evidence
from timm_fsr.evaluation.suites import adaptive
from timm_fsr.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
TRAINING = (
    "--data.limit_train=60",
    "--data.limit_test=10",
    "--data.held_out=20",
    "--data.extra_source=fashion_mnist",
    "--data.extra_limit=40",
    "--data.extra_fraction=0.25",
    "--attack.steps=1",
    "--optim.epochs=1",
    "--optim.batch_size=20",
    "--optim.awp_gamma=0.01",
    "--optim.ema_decay=0.9",
    "--evaluation.attacks=[]",
    "--evaluation.validation_steps=1",
)


def trained(output: Path, *flags: str) -> list[float]:
    """The weights of the last layer that a brief training leaves."""
    path = ROOT / "recipes" / "fashion_mnist_quickstart.yaml"
    model = timm_fsr.train(Recipe.load(path, [*TRAINING, f"--output={output}", *flags]))
    return model.get_submodule("fc").weight.flatten().tolist()


def be_brief() -> None:
    """Fewer steps, queries and draws in attacks and evidence."""
    build = Component._build

    def brief(self: Component, *args: Any) -> Any:
        attack = build(self, *args)
        attack.n_iter, attack.n_queries = 2, 2
        return attack

    Component._build = brief  # type: ignore[method-assign]
    adaptive.STEPS, adaptive._DRAWS = 1, 2
    evidence.PGD = lambda **given: PGD(**{**given, "steps": 2})  # type: ignore[misc]
    evidence.APGD = lambda **given: APGD(**given, steps=5)  # type: ignore[misc]
    evidence.EPS_FACTORS, evidence._NOISE_DRAWS, evidence._SLICES, evidence._SLICE_POINTS = (1.0, 64.0), 2, 1, 3


def attacked(device: torch.device, output: Path) -> dict[str, Any]:
    """What brief attacks of every kind find."""
    model = timm.create_model("resnet_tiny_cifar_fsr.at_fashion_mnist", pretrained=True).eval()
    torch.manual_seed(0)
    other = timm.create_model("resnet_tiny_cifar", num_classes=10, in_chans=1).eval()
    other.pretrained_cfg |= {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    data = timm_fsr.load_data("fashion_mnist", "test", limit=4)
    report = assess(
        model.to(device),
        data,
        output,
        eps=0.05,
        attacks=["pgd2", "standard", "adaptive"],
        transfer_from={"other": other.to(device)},
        save_images=True,
    )
    some = next(data.batches(2))
    gathered = gather_evidence(model, *some, eps=0.05, steps=(1, 2), restarts=(1, 2))
    correct = {name: outcome.tolist() for name, outcome in report.correct.items()}
    return {"correct": correct, "findings": [finding["text"] for finding in gathered["findings"]]}


def refusals() -> dict[str, str]:
    """What the device says to mistakes that an accelerator refuses."""
    there = torch.ones(2, device=stand_in.NAME)
    mistakes = {
        "mixture": lambda: there + torch.ones(2),
        "generator": lambda: there.uniform_(generator=torch.Generator().manual_seed(0)),
        "numpy": there.numpy,
    }
    said = {}
    for name, mistake in mistakes.items():
        try:
            said[name] = f"nothing: {mistake()}"
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def main(folder: Path) -> None:
    """All of it, on each device in turn."""
    be_brief()
    PartialState(cpu=True)
    found: dict[str, Any] = {}
    for device, mode in (torch.device("cpu"), nullcontext()), (torch.device(*stand_in.DEVICE), stand_in.StandIn()):
        PartialState._shared_state["device"] = device
        with mode:
            output = folder / device.type
            found[device.type] = {
                "trained": trained(output / "trained"),
                "attacked": attacked(device, output / "attacked"),
            }
    with stand_in.StandIn():  # where the device is still the one of the training
        found["resumed"] = trained(folder / stand_in.NAME / "trained", "--resume=true", "--evaluation.attacks=[fgsm]")
        found["refused"] = refusals()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
