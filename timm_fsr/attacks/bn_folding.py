"""Folding: BatchNorm merged into the convolutions before it, for as long as an attack runs the model in eval mode."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_fsr.attacks.base import attack_mode
from timm_fsr.utils.random import own_randomness

_CONVOLUTIONS = (nn.Conv2d,)  # exactly: subclasses may compute their weight, or use it otherwise
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)

_Call = tuple[nn.Module, Tensor, Any]  # the last is the operation that made the tensor


@dataclass(frozen=True)
class Folding:
    """The pairs of a convolution and the BatchNorm that alone reads its output, in one model.

    In eval mode BatchNorm is a fixed affine map, so a convolution with scaled weights and a shifted bias does the work
    of both. That is the same function up to rounding; an attack, which passes the same weights many times, saves a read
    and a write of each feature map, forward and backward.

    Attributes:
        pairs: the modules; they must still be the model's own when the folding is applied.
    """

    pairs: tuple[tuple[nn.Conv2d, nn.BatchNorm2d], ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model computes what it computes in eval mode, whatever its mode, with the pairs folded.

        The folded weights are those of the moment of entry, and cannot be trained. Everything is restored at the end.
        It holds in this thread alone: others run the model as it is.
        """
        with ExitStack() as undo:
            for conv, norm in self.pairs:
                if _reads_alone(conv, norm):
                    undo.enter_context(_folded(conv, norm))
            yield


def find_folding(model: nn.Module, images: Tensor) -> Folding:
    """Look for what can be folded in `model`, by the graph of one forward pass in eval mode.

    A pair counts if the BatchNorm's input is the convolution's output itself, nothing else reads that, and each of
    the two runs once. Convolutions with hooks (a site, a parametrisation) are left alone.

    Args:
        model: in pixel space, on the images' device; as it will be attacked. In a compiled model nothing is folded: the
            compiler fuses BatchNorm with what comes after it, and would not notice the change.
        images: (N, C, H, W) in [0, 1]; one is enough.
    """
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return Folding()
    calls: list[_Call] = []  # of convolutions with their output, of norms with their input
    with ExitStack() as undo:
        for module in model.modules():
            if type(module) in _CONVOLUTIONS and not _has_hooks(module):
                undo.callback(module.register_forward_hook(partial(_note_output, calls)).remove)
            elif type(module) in _NORMS:
                undo.callback(module.register_forward_pre_hook(partial(_note_input, calls)).remove)
        with own_randomness(images.device), attack_mode(model), torch.enable_grad():
            logits = model(images[:1].detach().requires_grad_(True))
    runs = Counter(id(module) for module, _, _ in calls)
    readers = _readers(logits)
    made = {id(output): (module, node) for module, output, node in calls if isinstance(module, nn.Conv2d)}
    pairs = []
    for norm, feature, node in calls:
        conv, origin = made.get(id(feature), (None, None))
        if conv is None or not isinstance(norm, nn.BatchNorm2d) or node is None or node is not origin:
            continue  # also if the feature was changed in place between the two
        if runs[id(conv)] == runs[id(norm)] == 1 and readers[node] == 1 and _has_statistics(norm):
            pairs.append((conv, norm))
    return Folding(tuple(pairs))


@contextmanager
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Iterator[None]:
    """One pair folded for this thread; what is replaced stands in the modules' dictionaries, as nobody else sees it."""
    weight, bias = conv.weight, conv.bias
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        new_weight, new_bias = fuse_conv_bn_weights(
            weight.detach(),
            None if bias is None else bias.detach(),
            mean,
            variance,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    convolve = partial(_convolve, conv, new_weight.detach(), new_bias.detach())
    with _forward_of_this_thread(conv, convolve), _forward_of_this_thread(norm, _rest(norm)):
        yield


def _convolve(conv: nn.Conv2d, weight: Tensor, bias: Tensor, feature: Tensor) -> Tensor:
    return conv._conv_forward(feature, weight, bias)


class _ByThread:
    """A module's forward pass as each thread wants it; others get the module's own.

    The backward pass of a GPU has a thread of its own: what it recomputes (gradient checkpointing) is what was computed
    last.
    """

    def __init__(self, module: nn.Module) -> None:
        self.own: Callable[[Tensor], Tensor] = partial(type(module).forward, module)
        self.wanted: dict[int, Callable[[Tensor], Tensor]] = {}

    def __call__(self, feature: Tensor) -> Tensor:
        found = self.wanted.get(threading.get_ident())
        if found is None and torch._C._current_graph_task_id() != -1:
            found = next(reversed(list(self.wanted.values())), None)
        return (found or self.own)(feature)


_LOCK = threading.Lock()


@contextmanager
def _forward_of_this_thread(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    thread = threading.get_ident()
    with _LOCK:
        by_thread = module.__dict__.setdefault("forward", _ByThread(module))
        by_thread.wanted[thread] = forward
    try:
        yield
    finally:
        with _LOCK:
            by_thread.wanted.pop(thread, None)
            if not by_thread.wanted:
                module.__dict__.pop("forward", None)


def _rest(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What a norm does after normalising: timm's has an activation (its dropout does nothing in eval mode)."""
    if not isinstance(norm, BatchNormAct2d):
        return _unchanged
    activation: Any = norm.act
    return activation


def _unchanged(feature: Tensor) -> Tensor:
    return feature


def _reads_alone(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether a pair that was found can still be folded: sites may have come since, or this thread folded it."""
    return not _has_hooks(conv) and _has_statistics(norm) and _is_free(conv) and _is_free(norm)


def _is_free(module: nn.Module) -> bool:
    found = module.__dict__.get("forward")
    return found is None or (isinstance(found, _ByThread) and threading.get_ident() not in found.wanted)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None))


def _has_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None


def _readers(logits: Tensor) -> Counter[Any]:
    """How many operations of the graph behind `logits` read the result of each operation."""
    readers: Counter[Any] = Counter()
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for earlier, _ in node.next_functions:
            readers[earlier] += 1
            stack.append(earlier)
    return readers


def _note_output(calls: list[_Call], module: nn.Module, _: Any, output: Tensor) -> None:
    calls.append((module, output, output.grad_fn))


def _note_input(calls: list[_Call], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    calls.append((module, inputs[0], inputs[0].grad_fn))
