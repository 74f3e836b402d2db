"""CIFS against its definition: the relevance by autograd, the mask in loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.tiny import images, tiny_resnet
from torch import Tensor

import timm_fsr
from timm_fsr.layers.cifs import CIFS

CHANNELS, CLASSES = 6, 5


def make(probe: str, **args: float) -> CIFS:
    torch.manual_seed(0)
    layer = CIFS(CHANNELS, CLASSES, probe=probe, hidden=7, **args)
    layer.take_place(0, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    return layer


@pytest.fixture(params=["linear", "mlp"])
def layer(request: pytest.FixtureRequest) -> CIFS:
    return make(request.param)


def features(batch: int = 8) -> Tensor:
    return torch.randn(batch, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1))


def labels(batch: int = 8) -> Tensor:
    return torch.arange(batch) % CLASSES


def probe(layer: CIFS, feature: Tensor) -> Tensor:
    """The probe's logits, as the paper's code computes them."""
    pooled = F.adaptive_avg_pool2d(feature, 1).flatten(1)
    return layer.head(pooled if layer.body is None else F.softplus(layer.body(pooled), beta=5))


def mask(layer: CIFS, feature: Tensor, classes: Tensor | None, *, differentiable: bool = False) -> Tensor:
    """The mask (N, C): relevances by autograd, image by image, and their softmax."""
    rows = []
    for n in range(len(feature)):
        image = feature[n : n + 1] if differentiable else feature[n : n + 1].detach().requires_grad_()
        logits = probe(layer, image)[0]
        first, second = logits.argsort(descending=True)[:2].tolist()
        chosen = logits[first if classes is None else int(classes[n])] + logits[second]
        (gradient,) = torch.autograd.grad(chosen, image, create_graph=True)
        relevance = gradient[0].sum(dim=(1, 2))
        powers = [value.exp() for value in relevance]
        rows.append(torch.stack([power / sum(powers) for power in powers]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("training", "given", "selected"),
    [(True, labels(), labels()), (True, None, None), (False, labels(), None), (False, None, None)],
    ids=["training", "training without labels", "eval with labels", "eval"],
)
def test_the_mask_is_the_softmax_of_the_spatially_summed_gradient(layer, training, given, selected):
    out, aux = layer.train(training)(features(), given)
    expected = mask(layer, features(), selected)
    assert (expected.amax(1) - expected.amin(1)).min() > 0.05, "the case shows nothing"
    torch.testing.assert_close(aux["scale"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out, features() * expected[:, :, None, None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(aux["logits"], probe(layer, features()))


def test_in_eval_mode_the_mask_has_its_true_gradient(layer):
    along = torch.randn(8, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(2))

    def gradient(surrogate: str | None) -> Tensor:
        layer.eval().surrogate = surrogate
        feature = features().requires_grad_()
        return torch.autograd.grad((layer(feature)[0] * along).sum(), feature)[0]

    feature = features().requires_grad_()
    true = mask(layer, feature, None, differentiable=True)
    (expected,) = torch.autograd.grad((feature * true[:, :, None, None] * along).sum(), feature)
    torch.testing.assert_close(gradient(None), expected, rtol=1e-4, atol=1e-6)
    detached = true.detach()[:, :, None, None] * along
    torch.testing.assert_close(gradient("detached_mask"), detached, rtol=1e-4, atol=1e-6)
    assert torch.allclose(expected, detached, atol=1e-4) == (layer.body is None)
    assert not torch.allclose(gradient("soft_rows"), expected, atol=1e-4)


def test_in_training_the_mask_teaches_the_probe_but_not_the_feature(layer):
    """As the released code, whose mask is that of a detached copy."""
    feature = features().requires_grad_()
    out, aux = layer.train()(feature, labels())
    wanted = [feature, *layer.parameters()]
    found = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
    torch.testing.assert_close(found[0], aux["scale"].detach()[:, :, None, None].expand_as(feature))
    again = mask(layer, features(), labels())[:, :, None, None]
    expected = torch.autograd.grad((features() * again).sum(), wanted[1:], allow_unused=True)
    for mine, other in zip(found[1:], expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found[1:])


def test_surrogates_leave_the_value_alone(layer):
    layer.eval()
    expected = layer(features())[0]
    for name in layer.surrogates:
        layer.surrogate = name
        torch.testing.assert_close(layer(features())[0], expected)


def test_losses_are_those_of_the_probe():
    layer = make("mlp", weight=3.0, attack_weight=0.5)
    _, aux = layer(features(), labels())
    _, clean = layer(features() + 0.3, labels())
    rows, classes = aux["logits"].tolist(), labels().tolist()
    entropies = [math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(rows, classes, strict=True)]
    loss = layer.aux_losses(aux, torch.zeros(8, CLASSES), labels())["classification"]
    assert loss.item() == pytest.approx(3 * sum(entropies) / 8, rel=1e-5)
    found = layer.attack_losses(aux, torch.zeros(8, CLASSES), labels())
    assert found.tolist() == pytest.approx([0.5 * value for value in entropies], rel=1e-5)
    diverged = layer.attack_losses(aux, torch.zeros(8, CLASSES), labels(), clean)
    p, q = clean["logits"].double().softmax(1), aux["logits"].double().softmax(1)
    assert diverged.tolist() == pytest.approx((0.5 * (p * (p / q).log()).sum(1)).tolist(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "hidden_layers"), [("mixed", [True, True, False]), ("mlp", [True] * 3), ("linear", [False] * 3)]
)
def test_mixed_probes_have_a_hidden_layer_at_all_sites_but_the_last(kind, hidden_layers):
    model = timm_fsr.attach(tiny_resnet(layers=(1, 1, 1, 3)), "cifs", layer_args={"probe": kind, "hidden": 9})
    layers = [site.layer for site in model.cifs.sites]
    assert [layer.body is not None for layer in layers] == hidden_layers
    assert all(layer.body is None or layer.body.out_features == 9 for layer in layers)
    assert all(layer.resolved_args()["probe"] == kind for layer in layers)
    again = timm_fsr.attach(tiny_resnet(layers=(1, 1, 1, 3)), "cifs", layer_args=layers[0].resolved_args())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images()), model.eval()(images()))
    model.reset_classifier(3)
    assert [layer.body is not None for layer in layers] == hidden_layers
    model.reset_classifier(0)
    assert not list(model.cifs.parameters())
    model.reset_classifier(4)
    assert [layer.body is not None for layer in layers] == hidden_layers


def test_one_class_has_no_second_logit():
    layer = CIFS(CHANNELS, 1).eval()
    out, aux = layer(features())
    torch.testing.assert_close(aux["scale"], layer.head.weight.softmax(1).expand(8, CHANNELS))
    assert out.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_layer_works_under_autocast_without_gradients_and_in_half_precision(training, dtype):
    layer = make("mlp").train(training)
    expected = layer(features(), labels())[1]["scale"]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        out, aux = layer(features().to(dtype), labels())
    assert out.dtype == dtype
    assert {value.dtype for value in aux.values()} == {torch.float32}
    torch.testing.assert_close(aux["scale"], expected, rtol=0.1, atol=0.02)
    assert layer.bfloat16()(features().bfloat16(), labels())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_a_hidden_layer_compiles_without_a_break(training):
    layer = make("mlp").train(training)
    torch.compiler.reset()
    found = []
    for runner in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        feature = features().requires_grad_()
        out, aux = runner(feature, labels())
        loss = out.square().sum() + aux["logits"].square().sum()
        found.append((out, *torch.autograd.grad(loss, [feature, *layer.parameters()])))
    torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="unknown probe 'linaer'; did you mean 'linear'"):
        CIFS(CHANNELS, CLASSES, probe="linaer")
    with pytest.raises(ValueError, match="hidden=0 must be at least 1"):
        CIFS(CHANNELS, CLASSES, hidden=0)
    for args in ({"weight": -1.0}, {"attack_weight": -1.0}):
        with pytest.raises(ValueError, match="loss weights must be 0 or more"):
            CIFS(CHANNELS, CLASSES, **args)
