"""CAS against its formula written out in loops, in training and in eval mode."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import images, tiny_resnet, tiny_vit
from torch import Tensor

import timm_fsr
from timm_fsr.layers.cas import CAS

CHANNELS, CLASSES = 6, 4


@pytest.fixture
def layer() -> CAS:
    torch.manual_seed(0)
    layer = CAS(CHANNELS, CLASSES)
    with torch.no_grad():
        layer.head.weight.mul_(4)  # so that images differ in their predicted class
    return layer


def features(batch: int = 8) -> Tensor:
    return torch.randn(batch, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1))


def labels(batch: int = 8) -> Tensor:
    return torch.arange(batch) % CLASSES


def by_hand(layer: CAS, feature: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scaled features and the auxiliary logits, image by image and channel by channel."""
    weight, bias = layer.head.weight.detach().double(), layer.head.bias.detach().double()
    out, logits = torch.zeros_like(feature, dtype=torch.float64), torch.zeros(len(feature), CLASSES).double()
    for n, image in enumerate(feature.double()):
        for k in range(CLASSES):
            logits[n, k] = bias[k] + sum(
                weight[k, c] * image[c].sum() / (image.shape[1] * image.shape[2]) for c in range(CHANNELS)
            )
        row = int(logits[n].argmax()) if classes is None else int(classes[n])
        for c in range(CHANNELS):
            out[n, c] = image[c] * weight[row, c]
    return out, logits


def entropy(row: Tensor, label: int) -> float:
    return math.log(sum(math.exp(value) for value in row.tolist())) - float(row[label])


@pytest.mark.parametrize(
    ("training", "given", "selected"),
    [(True, labels(), labels()), (True, None, None), (False, labels(), None), (False, None, None)],
    ids=["training", "training without labels", "eval with labels", "eval"],
)
def test_the_label_s_row_scales_in_training_and_the_predicted_one_in_eval(layer, training, given, selected):
    out, aux = layer.train(training)(features(), given)
    expected, logits = by_hand(layer, features(), selected)
    assert len(set(logits.argmax(1).tolist())) > 1, "the case shows nothing"
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux["logits"].double(), logits, rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_the_auxiliary_classifier(layer):
    layer = CAS(CHANNELS, CLASSES, weight=3.0, attack_weight=0.5)
    _, aux = layer(features(), labels())
    _, clean = layer(features() + 0.3, labels())
    model_logits = torch.zeros(8, CLASSES)
    entropies = [entropy(row, label) for row, label in zip(aux["logits"].detach(), labels().tolist(), strict=True)]
    assert layer.aux_losses(aux, model_logits, labels())["classification"].item() == pytest.approx(
        3 * sum(entropies) / 8, rel=1e-5
    )
    found = layer.attack_losses(aux, model_logits, labels())
    assert found.tolist() == pytest.approx([0.5 * value for value in entropies], rel=1e-5)
    diverged = layer.attack_losses(aux, model_logits, labels(), clean)
    p, q = clean["logits"].double().softmax(1), aux["logits"].double().softmax(1)
    assert diverged.tolist() == pytest.approx((0.5 * (p * (p / q).log()).sum(1)).tolist(), rel=1e-4, abs=1e-7)


def test_the_row_has_no_gradient_but_that_of_the_expected_one_under_its_surrogate(layer):
    layer.eval()
    along = torch.randn(8, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(2))
    found = {}
    for name in (None, "soft_rows"):
        layer.surrogate = name
        feature = features().requires_grad_()
        out, aux = layer(feature)
        found[name] = out.detach()
        (gradient,) = torch.autograd.grad((out * along).sum(), feature)
        direct = aux["scale"].detach()[:, :, None, None] * along
        if name is None:
            torch.testing.assert_close(gradient, direct)
            continue
        again = features().requires_grad_()
        expected = layer.head(again.mean((2, 3))).softmax(1) @ layer.head.weight
        (through,) = torch.autograd.grad((again.detach() * along).sum((2, 3)).mul(expected).sum(), again)
        assert through.abs().max() > 1e-3
        torch.testing.assert_close(gradient, direct + through, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[None], found["soft_rows"])


def test_main_gradients_train_the_selected_rows_alone(layer):
    out, _ = layer.train()(features(), torch.zeros(8, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(out.sum(), layer.head.weight)
    assert (gradient.abs().amax(1) > 0).tolist() == [True, False, False, False]


def test_it_sits_on_each_block_of_the_last_stage():
    model = timm_fsr.attach(tiny_resnet(layers=(1, 1, 1, 2)), "cas")
    with timm_fsr.record(model) as tape:
        model(images())
    assert list(tape) == ["layer4.0", "layer4.1"]


def test_where_there_are_no_blocks_it_sits_at_the_last_place_that_reaches_the_logits():
    for vit, place in ((tiny_vit(), "blocks.1"), (tiny_vit(class_token=True, global_pool="token"), "blocks.0")):
        model = timm_fsr.attach(vit, "cas")
        with timm_fsr.record(model) as tape:
            model(images())
        assert list(tape) == [place]


def test_a_reset_classifier_is_where_the_model_is():
    model = timm_fsr.attach(tiny_resnet(num_classes=0), "cas").double()
    model.reset_classifier(3)
    assert {parameter.dtype for parameter in model.cas.parameters()} == {torch.float64}
    with timm_fsr.record(model.double().train(), torch.tensor([0, 1, 2, 0])) as tape:
        logits = model(images().double())
    assert tape.losses(logits)["cas.classification"] > 0


def test_what_cannot_work_is_refused():
    for args in ({"weight": -1.0}, {"attack_weight": -1.0}):
        with pytest.raises(ValueError, match="loss weights must be 0 or more"):
            CAS(CHANNELS, CLASSES, **args)
    bare = CAS(CHANNELS, 0)
    _, aux = bare(features(), labels())
    with pytest.raises(ValueError, match=r"num_classes=0; call model\.reset_classifier"):
        bare.aux_losses(aux, torch.zeros(8, 0), labels())
    _, aux = CAS(CHANNELS, CLASSES)(features(), labels())
    with pytest.raises(ValueError, match=r"gives 7 logits but .* 4; .*reset_classifier"):
        bare.attack_losses(aux, torch.zeros(8, 7), labels())
