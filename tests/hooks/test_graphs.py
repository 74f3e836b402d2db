"""Models with feature layers under torch.compile, torch.export, ONNX and TorchScript."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support.tiny import assert_same_gradients, images, labels, tiny_resnet, tiny_vit, with_fsr
from torch import nn

import timm_fsr


def shallow_vit(**kwargs: Any) -> nn.Module:
    return tiny_vit(depth=1, **kwargs)


NETWORKS = [tiny_resnet, shallow_vit]


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def still_a_model(model: nn.Module) -> None:
    """Nothing symbolic has stuck to the modules: they copy, pickle and run."""
    copy.deepcopy(model)
    pickle.dumps(model)
    with timm_fsr.record(model, labels(2)) as tape, torch.no_grad():
        tape.losses(model(images(2)))


# torch.compile; the backends compute as eager mode does, so that only the tracing is at stake.


def test_autograd_of_a_compiled_model() -> None:
    model = with_fsr(tiny_resnet(), noise=False).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for runner in (compiled, eager):
        F.cross_entropy(runner(images()), labels()).backward()
    assert_same_gradients(model, eager)
    still_a_model(model)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_recorded_under_compile(network: Any, training: bool) -> None:
    model = with_fsr(network(), noise=False).train(training)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for attempt in range(2):  # the second one runs the code that the first compiled
        found = []
        for runner in (compiled, eager):
            runner.zero_grad()
            with timm_fsr.record(runner, labels()) as tape:
                logits = runner(images() / (attempt + 1))
            losses = tape.losses(logits)
            (F.cross_entropy(logits, labels()) + sum(losses.values())).backward()
            (aux,) = tape.values()
            found.append({"logits": logits, "mask": aux.mask, **losses})
        for key, value in found[1].items():
            torch.testing.assert_close(found[0][key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert_same_gradients(model, eager)
    torch.testing.assert_close(compiled(images()), eager(images()), rtol=1e-4, atol=1e-5)  # nobody records now
    still_a_model(model)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_recording_for_each_step_compiles_nothing_anew(network: Any) -> None:
    model = with_fsr(network()).train()
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counts = []
    for _ in range(6):
        with timm_fsr.record(compiled, labels()) as tape:
            tape.losses(compiled(images()))
        compiled(images())
        counts.append(len(compilations))
    assert counts[-1] == counts[1], counts
    assert counts[1] <= 4, counts


def test_the_noise_is_fresh_in_each_compiled_pass() -> None:
    model = with_fsr(tiny_resnet()).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    masks = []
    for _ in range(2):
        with timm_fsr.record(compiled) as tape:
            compiled(images())
        masks.append(tape["layer4"].mask)
    assert not torch.equal(*masks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_checkpointed_and_compiled() -> None:
    model = with_fsr(tiny_resnet(), noise=False).train()
    eager = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, backend="eager")  # timm's checkpointing breaks the graph
    for runner in (compiled, eager):
        with timm_fsr.record(runner, labels()) as tape:
            logits = runner(images())
        (F.cross_entropy(logits, labels()) + sum(tape.losses(logits).values())).backward()
    assert_same_gradients(model, eager)


def test_compiled_code_notices_layers_that_come_and_go() -> None:
    model = shallow_vit().eval()
    plain = model(images())
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(images()), plain)
    with_fsr(model)
    layered = compiled(images())
    assert not torch.equal(layered, plain)
    with timm_fsr.record(compiled, labels()) as tape:
        tape.losses(compiled(images()))
    timm_fsr.detach(model)
    assert torch.equal(compiled(images()), plain)


def test_compiled_for_any_image_size() -> None:
    model = with_fsr(shallow_vit(dynamic_img_size=True)).eval()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        for height, width in ((32, 48), (48, 32)):
            x = images(2, height, width)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(type(size) is int for size in model.fsr.image_size)
    still_a_model(model)


# Exports, in eval mode.


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("strict", [True, False])
def test_exported(network: Any, strict: bool) -> None:
    model = with_fsr(network()).eval()
    expected = model(images())
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},), strict=strict)
    torch.testing.assert_close(program.module()(images()), expected)
    assert program.state_dict.keys() == model.state_dict().keys()
    still_a_model(model)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("network", [tiny_resnet, shallow_vit])
def test_exported_for_any_image_size(network: Callable[[], nn.Module]) -> None:
    model = with_fsr(network(**({} if network is tiny_resnet else {"dynamic_img_size": True}))).eval()
    height, width = (torch.export.Dim(name, min=2, max=8) * 8 for name in ("rows", "columns"))
    with torch.no_grad():
        program = torch.export.export(
            model, (images(2, 32, 48),), dynamic_shapes=({2: height, 3: width},), strict=False
        )
    torch.testing.assert_close(program.module()(images(2, 48, 24)), model(images(2, 48, 24)))
    still_a_model(model)


@pytest.mark.parametrize("network", NETWORKS)
def test_exported_to_onnx(network: Any, tmp_path: Path) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model = with_fsr(network()).eval()
    file = tmp_path / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        torch.onnx.export(model, (images(2),), file, dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(file))
    (logits,) = session.run(None, {session.input_names[0]: images(2).numpy()})
    np.testing.assert_allclose(logits, model(images(2)).detach().numpy(), rtol=1e-3, atol=1e-4)
    still_a_model(model)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced(network: Any) -> None:
    model = with_fsr(network()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images() / 2), model(images() / 2))
    still_a_model(model)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_scripting_is_refused(network: Any) -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.script does not support; use torch\.export"):
        torch.jit.script(with_fsr(network()))
    with pytest.raises(ValueError, match=r"torch\.jit\.script does not support; use torch\.export"):
        timm.create_model("resnet_tiny_cifar_fsr", scriptable=True)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_that_would_leave_a_layer_out_is_refused(fullgraph: bool) -> None:
    model = with_fsr(tiny_resnet()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    expected = compiled(images())
    site = model.fsr.sites[0]
    parent, _, name = site.path.rpartition(".")
    new = copy.deepcopy(with_fsr(tiny_resnet()).eval().get_submodule(site.path))
    new._forward_hooks.clear()
    del new._timm_fsr_sites
    model.get_submodule(parent)._modules[name] = new
    with pytest.raises(Exception, match=rf"'{site.path}' was left out of the forward pass"):
        compiled(images())
    torch.testing.assert_close(torch.compile(timm_fsr.reattach(model), backend="eager")(images()), expected)
