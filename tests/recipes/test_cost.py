"""What a training step costs, counted: operations, passes and memory, none of which a clock is needed for."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from support.runs import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.bn_folding import Folding
from timm_fsr.attacks.pgd import PGD
from timm_fsr.hooks.tape import record
from timm_fsr.models.pixel import PixelModel
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.trainer import Trainer

CONVOLUTIONS = 17  # of resnet_tiny_cifar: 11; of FSR: 6
NORMS = 15  # 11 and 4
STEPS = 4
BATCH = 8


class Operations(TorchDispatchMode):
    """Counts what is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def prepared(folder: Path, *flags: str) -> Trainer:
    recipe = tiny(folder, f"--attack.steps={STEPS}", "--evaluation.attacks=[]", "--channels_last=false", *flags)
    return Trainer.prepare(recipe, build_accelerator(recipe), Console(quiet=True))


def batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    return next(trainer.data.batches(BATCH))


def operations_of_a_step(trainer: Trainer) -> Counter[str]:
    images, labels = batch(trainer)
    trainer.prepared.train()
    trainer.take_step(images, labels)  # what is made once is made now
    with Operations() as operations:
        trainer.take_step(images, labels)
    return operations.counts


class TestPasses:
    def test_a_step_is_one_pass_there_and_back_for_each_attack_step_and_one_to_train(self, tmp_path):
        counts = operations_of_a_step(prepared(tmp_path))
        assert counts["convolution"] == CONVOLUTIONS * (STEPS + 1)
        assert counts["convolution_backward"] == CONVOLUTIONS * (STEPS + 1)

    def test_the_attack_is_without_batch_norm_and_auxiliary_heads(self, tmp_path):
        counts = operations_of_a_step(prepared(tmp_path))
        assert counts["native_batch_norm"] == NORMS
        assert counts["addmm"] == STEPS + 1 + 3, "three auxiliary heads, in the training pass alone"

    def test_without_folding_the_attack_has_them(self, tmp_path):
        """So that the test above can fail."""
        trainer = prepared(tmp_path)
        trainer.folding = Folding()
        assert operations_of_a_step(trainer)["native_batch_norm"] == NORMS * (STEPS + 1)

    def test_the_attack_asks_for_no_gradient_of_weights(self):
        model = timm.create_model("resnet_tiny_cifar_fsr", num_classes=10)
        images, labels = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH)
        wanted: list[list[bool]] = []

        class Masks(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.overloadpacket is torch.ops.aten.convolution_backward:
                    wanted.append(list(args[-1]))
                return func(*args, **(kwargs or {}))

        with Masks():
            AT().craft(PixelModel(model).train(), PGD(steps=STEPS), images, labels)
        assert len(wanted) == CONVOLUTIONS * STEPS
        assert all(mask == [True, False, False] for mask in wanted)

    @pytest.mark.parametrize(("objective", "passes"), [("at", 1), ("mart", 1), ("trades", 2)])
    def test_other_methods_add_a_pass_only_where_their_attack_needs_one(self, tmp_path, objective, passes):
        counts = operations_of_a_step(prepared(tmp_path, f"--objective.name={objective}"))
        assert counts["convolution"] == CONVOLUTIONS * (STEPS + passes)

    def test_the_plain_network_costs_what_it_would_without_this_package(self, tmp_path):
        counts = operations_of_a_step(prepared(tmp_path, "--model.layer=null"))
        assert counts["convolution"] == 11 * (STEPS + 1)


class TestArithmetic:
    def test_fsr_adds_what_its_convolutions_cost(self):
        flops = {}
        for name in ("resnet18_cifar", "resnet18_cifar_fsr"):
            model = timm.create_model(name, num_classes=10).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.rand(1, 3, 32, 32))
            flops[name] = counter.get_total_flops()
        hidden, channels, positions = 64, 512, 16
        expected = 2 * 2 * positions * 9 * (2 * channels * hidden + hidden**2)  # S and R, a multiply-add counted as two
        assert flops["resnet18_cifar_fsr"] - flops["resnet18_cifar"] == expected
        assert expected / flops["resnet18_cifar"] == pytest.approx(0.036, abs=0.001)  # the paper's networks: 3.6 %


class TestMemory:
    def test_nothing_of_a_step_s_graph_outlives_it(self, tmp_path):
        trainer = prepared(tmp_path)
        images, labels = batch(trainer)
        trainer.prepared.train()
        kept: list[weakref.ref[Tensor]] = []
        original = AT.terms

        def spy(self: AT, *args: Any) -> Any:
            terms = original(self, *args)
            kept.extend(weakref.ref(value) for value in terms.values())
            return terms

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AT, "terms", spy)
            for _ in range(3):
                trainer.take_step(images, labels)
        gc.collect()
        assert len(kept) == 3 * 3
        assert not [reference for reference in kept if reference() is not None]
        assert all(not value.requires_grad for value in trainer.sums.values())

    def test_a_tape_lets_go_when_it_is_gone(self):
        model = timm_fsr.attach(timm.create_model("resnet_tiny_cifar", num_classes=10)).train()
        with record(model) as tape:
            model(torch.rand(2, 3, 32, 32))
        mask = weakref.ref(tape["layer4"].mask)
        assert mask() is not None
        del tape
        gc.collect()
        assert mask() is None

    def test_memory_does_not_grow_from_step_to_step(self, tmp_path):
        trainer = prepared(tmp_path)
        images, labels = batch(trainer)
        trainer.prepared.train()
        counts = []
        for _ in range(5):
            trainer.take_step(images, labels)
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        assert counts[-1] <= counts[1], "after the first step, which makes momentum and sums"

    def test_attack_mode_keeps_no_graph(self):
        model = PixelModel(timm.create_model("resnet_tiny_cifar_fsr", num_classes=10))
        images, labels = torch.rand(2, 3, 32, 32), torch.arange(2)
        with attack_mode(model):
            adversarial = PGD(steps=2)(AT().attack_loss(model, images, labels), images)
        assert not adversarial.requires_grad
        assert adversarial.grad_fn is None
