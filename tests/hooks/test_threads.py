"""Threads and tasks: what one opens around its passes is its own, and a pass is nobody else's business."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import images, labels, tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode, eval_mode
from timm_fsr.attacks.bn_folding import find_folding
from timm_fsr.hooks.site import layer_groups
from timm_fsr.hooks.surrogates import noisy, plain, surrogate

SIZES = ((32, 48), (48, 32), (32, 32), (64, 16), (16, 64))  # several of them give equally many tokens


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each run in a thread of its own, all at once; the first error is raised."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(index: int) -> None:
        try:
            start.wait(timeout=60)
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    if errors:
        raise errors[0]
    return results


def vit() -> nn.Module:
    return with_fsr(tiny_vit(dynamic_img_size=True)).eval()


# Passes.


@pytest.mark.parametrize("how", ["forward", "forward_features"])
def test_images_of_different_sizes_in_threads(how: str) -> None:
    model = vit()
    run = getattr(model, how)
    given = [images(2, *size) for size in SIZES]
    with torch.no_grad():
        expected = [run(x) for x in given]

        def worker(index: int) -> list[Tensor]:
            with torch.no_grad():
                return [run(given[index]) for _ in range(150)]

        for wanted, found in zip(
            expected, in_threads(*[lambda i=i: worker(i) for i in range(len(SIZES))]), strict=True
        ):
            assert sum(not torch.equal(one, wanted) for one in found) == 0


@pytest.mark.parametrize("network", [tiny_resnet, vit])
def test_recordings_surrogates_and_plain_passes_in_threads(network: Any) -> None:
    """Each of the threads does another thing with the same model, and gets what it gets alone."""
    model = network() if network is vit else with_fsr(network()).eval()
    name = next(iter(model.fsr)).replace("_", ".")

    def plainly(scale: float) -> list[Tensor]:
        return [model(images() / scale)]

    def recorded(scale: float) -> list[Tensor]:
        with timm_fsr.record(model, labels()) as tape:
            logits = model(images() / scale)
        return [logits, tape[name].mask, *tape.losses(logits).values()]

    def worked_around(how: str, scale: float) -> list[Tensor]:
        given = (images() / scale).requires_grad_()
        with surrogate(model, how):
            logits = model(given)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), given)]

    tasks: list[Callable[[], list[Tensor]]] = [
        lambda: plainly(1),
        lambda: recorded(1),
        lambda: recorded(2),
        lambda: worked_around("bypass", 1),
        lambda: worked_around("robust_part", 1),
        lambda: worked_around("straight_through", 2),
    ]
    expected = [task() for task in tasks]
    found = in_threads(*[lambda task=task: [task() for _ in range(40)] for task in tasks])
    for wanted, several in zip(expected, found, strict=True):
        for got in several:
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert model.fsr.tape is None


def test_a_tape_hears_its_own_thread_alone() -> None:
    model = with_fsr(tiny_resnet()).eval()
    with timm_fsr.record(model) as tape:
        in_threads(lambda: model(images()))
        assert dict(tape) == {}
        assert in_threads(lambda: model.fsr.tape) == [None]
        model(images())
        assert len(tape) == 1


def test_tasks_have_tapes_of_their_own() -> None:
    model = with_fsr(tiny_resnet()).eval()
    expected = []
    for scale in (1, 2):
        with timm_fsr.record(model) as tape:
            model(images() / scale)
        expected.append(tape["layer4"].mask)

    async def task(scale: int) -> Tensor:
        with timm_fsr.record(model) as tape:
            await asyncio.sleep(0)
            model(images() / scale)
            await asyncio.sleep(0)
        return tape["layer4"].mask

    async def both() -> list[Tensor]:
        return await asyncio.gather(task(1), task(2))

    for found, wanted in zip(asyncio.run(both()), expected, strict=True):
        assert torch.equal(found, wanted)


# Exits.


def test_exits_that_cross_leave_no_tape_behind() -> None:
    model = with_fsr(tiny_resnet()).eval()
    first, second = timm_fsr.record(model), timm_fsr.record(model)
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(images())
    assert (len(one), len(two)) == (0, 1)
    second.__exit__(None, None, None)
    assert model.fsr.tape is None
    kept = weakref.ref(two)
    del one, two, first, second
    gc.collect()
    assert kept() is None


def test_a_recording_that_ends_in_another_thread_has_ended() -> None:
    model = with_fsr(tiny_resnet()).eval()
    recording = timm_fsr.record(model)
    tape = recording.__enter__()
    in_threads(lambda: recording.__exit__(None, None, None))
    model(images())
    assert dict(tape) == {}
    assert model.fsr.tape is None
    inherited = contextvars.copy_context()
    assert inherited.run(lambda: model.fsr.tape) is None


BLOCKS = {
    "bypass": lambda model: surrogate(model, "bypass"),
    "robust_part": lambda model: surrogate(model, "robust_part"),
    "noisy": noisy,
    "plain": plain,
    "attack_mode": attack_mode,
    "eval_mode": eval_mode,
}


@pytest.mark.parametrize("one", BLOCKS)
@pytest.mark.parametrize("two", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_exits_that_cross_leave_nothing_behind(one: str, two: str, training: bool) -> None:
    model = with_fsr(tiny_resnet()).train(training)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    first, second = BLOCKS[one](model), BLOCKS[two](model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    if two in ("attack_mode", "eval_mode"):
        assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(group.surrogate is None for group in layer_groups(model))
    assert all(site.layer.surrogate is None for group in layer_groups(model) for site in group.sites)


# What changes the model itself.


def test_attack_modes_of_threads_get_on() -> None:
    """The first to end leaves the model as the other needs it; the last one restores it."""
    model = with_fsr(tiny_resnet()).train()
    ended, going = threading.Event(), threading.Event()

    def short() -> None:
        going.wait(timeout=60)
        with attack_mode(model):
            pass
        ended.set()

    def long() -> bool:
        with attack_mode(model):
            going.set()
            ended.wait(timeout=60)
            return any(m.training for m in model.modules()) or any(p.requires_grad for p in model.parameters())

    assert in_threads(short, long) == [None, False]
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modes_of_threads_that_contradict_each_other_are_refused() -> None:
    model = with_fsr(tiny_resnet()).eval()

    def disturb() -> None:
        with noisy(model):
            pass

    with attack_mode(model):
        with pytest.raises(RuntimeError, match=r"another thread .* copy\.deepcopy\(model\)"):
            in_threads(disturb)
        in_threads(lambda: contextlib.ExitStack().enter_context(noisy(copy.deepcopy(model))))
    in_threads(disturb)
    assert not any(module.training for module in model.modules())


def test_folding_holds_in_its_own_thread() -> None:
    """Others run the plain model at any moment, and several threads may fold it."""
    model = with_fsr(tiny_resnet()).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
        folding = find_folding(model, images())
        assert folding.pairs
        expected = model(images())
        with folding.applied():
            folded = model(images())
        assert not torch.equal(folded, expected), "rounding tells them apart"

    def plainly() -> list[Tensor]:
        with torch.no_grad():
            return [model(images()) for _ in range(60)]

    def fold() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for _ in range(60):
                with folding.applied():
                    found.append(model(images()))
        return found

    plain_ones, *folded_ones = in_threads(plainly, fold, fold)
    assert all(torch.equal(one, expected) for one in plain_ones)
    assert all(torch.equal(one, folded) for several in folded_ones for one in several)
    assert not any("forward" in vars(module) for module in model.modules())
