"""Mixed labels: every method's and layer's formula written out, what has none refused, and runs that resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from support.objectives import Brighten, brighter, cross_entropy
from support.runs import Killed, before_step, equal, metrics, tiny, weights, without_seconds
from support.tiny import images, labels, tiny_resnet, with_fsr
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.base import attack_mode
from timm_fsr.attacks.pgd import PGD
from timm_fsr.layers.base import LAYERS
from timm_fsr.layers.common import wrong_class_loss
from timm_fsr.reports.comparison import IMPLICIT
from timm_fsr.training.objectives import AFD, AT, MART, OBJECTIVES, TRADES, Natural, Objective
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import fixed_keys
from timm_fsr.training.trainer import train

SOFT = [name for name in OBJECTIVES.names() if OBJECTIVES[name].soft_labels]
SHARES = torch.tensor([0.7, 0.7, 0.4, 0.4])


def soft() -> Tensor:
    """Image i has its own class and that of image 3 - i, as after mixup."""
    one_hot = torch.eye(10)[labels()]
    return SHARES[:, None] * one_hot + (1 - SHARES[:, None]) * one_hot.flip(0)


def mixed_cross_entropy(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mixup's loss (N,): the losses of both labels, weighed by their shares."""
    both = cross_entropy(logits, labels(), smoothing), cross_entropy(logits, labels().flip(0), smoothing)
    return SHARES * both[0] + (1 - SHARES) * both[1]


def begun(name: str, **arguments: float) -> tuple[Objective, nn.Module]:
    """A method and the model that it begins with: with FSR, or with the layer that the method needs."""
    model = tiny_resnet()
    layer = OBJECTIVES[name].layer
    model = (with_fsr(model, noise=False) if layer is None else timm_fsr.attach(model, layer)).train()
    return OBJECTIVES[name](**arguments).begin(model), model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=1e-5, atol=1e-6)


class TestFormulas:
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    @pytest.mark.parametrize(
        ("method", "term", "shown"),
        [
            (Natural, "natural", lambda given: given),
            (AT, "adversarial", brighter),
            (AFD, "adversarial", brighter),
        ],
    )
    def test_the_main_loss_is_both_labels_losses_by_their_shares(self, method, term, shown, smoothing):
        objective, model = begun(method.name, label_smoothing=smoothing)
        terms = objective(model, Brighten(model), images(), soft())
        close(terms[term], mixed_cross_entropy(model(shown(images())), smoothing).mean())

    def test_trades(self):
        objective, model = begun("trades", beta=2.0, label_smoothing=0.1)
        hard = objective(model, Brighten(model), images(), labels())
        terms = objective(model, Brighten(model), images(), soft())
        clean = model(torch.cat([images(), brighter(images())]))[: len(images())]
        close(terms["natural"], mixed_cross_entropy(clean, 0.1).mean())
        close(terms["consistency"], hard["consistency"])

    @pytest.mark.parametrize("name", ["at", "afd"])
    def test_the_attack_maximises_the_mixed_loss(self, name):
        objective, model = begun(name, label_smoothing=0.3)
        with attack_mode(model), torch.no_grad():
            expected = mixed_cross_entropy(model(brighter(images())))
        attack = Brighten(model)
        objective(model, attack, images(), soft())
        close(attack.losses, expected)

    def test_smoothing_is_that_of_timms_mixup(self):
        """timm smooths the two labels before it mixes them, the objective the mixed ones."""
        objective, model = begun("at", label_smoothing=0.1)
        found = objective(model, Brighten(model), images(), soft())["adversarial"]
        target = mixup_target(labels(), 10, SHARES[:, None], smoothing=0.1)
        close(found, SoftTargetCrossEntropy()(model(brighter(images())), target))

    def test_fsr_terms(self):
        objective, model = begun("at")
        terms = objective(model, Brighten(model), images(), soft())
        with timm_fsr.record(model) as tape, torch.no_grad():
            logits = model(brighter(images()))
        aux = tape["layer4"]
        wrong = logits.masked_fill(soft() > 0, float("-inf")).argmax(dim=1)
        separation = mixed_cross_entropy(aux.robust_logits).mean() + cross_entropy(aux.nonrobust_logits, wrong).mean()
        close(terms["fsr.separation"], separation)
        close(terms["fsr.recalibration"], mixed_cross_entropy(aux.recalibrated_logits).mean())

    def test_an_image_of_both_of_two_classes_has_no_wrong_one(self):
        found, logits = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
        shares = torch.tensor([[0.6, 0.4], [1.0, 0.0]])
        expected = cross_entropy(found[1:], torch.tensor([1])).sum() / 2
        close(wrong_class_loss(found, logits, shares), expected)

    @pytest.mark.parametrize("name", SOFT)
    def test_shares_of_one_are_plain_labels(self, name):
        objective, model = begun(name)
        plain = objective(model, Brighten(model), images(), labels())
        shares = objective(model, Brighten(model), images(), torch.eye(10)[labels()])
        assert plain.keys() == shares.keys()
        for key, value in plain.items():
            close(shares[key], value)

    @pytest.mark.parametrize("layer", [name for name in LAYERS.names() if LAYERS[name].soft_labels])
    def test_shares_of_one_are_plain_labels_to_layers(self, layer):
        torch.manual_seed(0)
        model = timm_fsr.attach(tiny_resnet(), layer).train()
        found = []
        for given in (labels(), torch.eye(10)[labels()]):
            torch.manual_seed(1)  # of masks
            found.append(AT()(model, Brighten(model), images(), given).total())
        close(*found)

    def test_gradients_are_finite_with_an_attack(self):
        objective, model = begun("at", grad_align=0.2)
        objective(model, PGD(steps=2), images(), soft()).total().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestRefused:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["mixup=0.8", "--objective.name=mart"], "'mart' .* one of at, natural, trades, or leave out data.mixup"),
            (["cutmix=1", "--model.layer=cas"], "layer 'cas' .* take another layer, or leave out data.mixup"),
            (["cutmix_minmax=[0.2,0.8]", "--model.layer=cifs"], "the feature layer 'cifs'"),
            (["cutmix=1", "--optim.batch_size=33"], "optim.batch_size=33 is odd"),
        ],
    )
    def test_before_anything_starts(self, tmp_path, flags, message):
        recipe = tiny(tmp_path, f"--data.{flags[0]}", *flags[1:])
        with pytest.raises(ValueError, match=message):
            recipe.check()
        quiet = dataclasses.replace(recipe.data, mixup=0.0, cutmix=0.0, cutmix_minmax=None)
        dataclasses.replace(recipe, data=quiet).check()

    def test_a_saved_model_that_came_with_such_a_layer(self, tmp_path):
        timm_fsr.save_pretrained(timm.create_model("resnet_tiny_cifar_cas", num_classes=10, in_chans=1), tmp_path / "m")
        recipe = tiny(tmp_path / "run", f"--model.name={tmp_path / 'm'}", "--model.layer=null", "--data.cutmix=1")
        with pytest.raises(ValueError, match="the feature layer 'cas'"):
            train(recipe)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (soft()[:, :9], "give the share of each class of each image, shape \\(4, 10\\)"),
            (soft()[:3], "shape \\(4, 10\\)"),
            (soft() * 0.9, "1 together for each image"),
            (soft() - 0.1, "must be 0 or more"),
            (soft() * float("nan"), "must be 0 or more"),
        ],
    )
    def test_what_is_no_shares(self, given, message):
        model = tiny_resnet().train()
        with pytest.raises(ValueError, match=message):
            AT()(model, Brighten(model), images(), given)

    def test_in_python(self):
        model = tiny_resnet().train()
        with pytest.raises(ValueError, match=r"'mart' is about .* or give one class for each image"):
            MART()(model, Brighten(model), images(), soft())
        assert not TRADES(beta=1)(model, Brighten(model), images(), soft()).total().isnan()


KINDS = {
    "policy": ["--data.auto_augment=rand-m9-mstd0.5-inc1"],
    "erasing": ["--data.random_erasing=0.5"],
    "mixup": ["--data.mixup=0.8"],
    "cutmix": ["--data.cutmix=1.0", "--data.mixup_mode=elem"],
    "crop": ["--data.crop_scale=[0.5,1]"],
    "all by TRADES": [
        "--data.auto_augment=augmix-m3-w2",
        "--data.random_erasing=0.25",
        "--data.mixup=0.8",
        "--data.cutmix=1.0",
        "--data.mixup_off_epoch=1",
        "--data.crop_scale=[0.5,1]",
        "--objective.name=trades",
        "--optim.accumulate=2",
        "--optim.epochs=2",
    ],
}
SMALL = ["--evaluation.attacks=[]", "--data.limit_train=40", "--data.held_out=8", "--data.size=16", "--optim.epochs=1"]
SMALL += ["--optim.batch_size=16", "--attack.steps=1"]


def test_runs_with_each_kind_end_to_end(tmp_path, monkeypatch):
    """Each differs from all others; the last, with everything on, is killed and goes on to the bit."""
    ends = {}
    for name, flags in {"none": [], **KINDS}.items():
        output = tmp_path / name.replace(" ", "_")
        train(tiny(output, *SMALL, *flags))
        ends[name] = weights(output / "last")
        last = metrics(output)[-1]
        assert all(value == value for value in last.values())
    names = list(ends)
    assert not any(equal(ends[one], ends[other]) for i, one in enumerate(names) for other in names[:i])
    killed, flags = tmp_path / "killed", [*SMALL, *KINDS["all by TRADES"]]

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        before_step(patch, 2, die)
        with pytest.raises(Killed):
            train(tiny(killed, "--checkpoint.every_steps=1", *flags))
    train(tiny(killed, "--checkpoint.every_steps=1", "--resume=true", *flags))
    assert equal(weights(killed / "last"), ends["all by TRADES"])
    assert without_seconds(metrics(killed)) == without_seconds(metrics(tmp_path / "all_by_TRADES"))


def test_runs_of_before_go_on_and_compare(tmp_path: Path):
    """A key that older recipes lack means what it means today by default."""
    today = fixed_keys(Recipe())
    assert {key: today[key] for key in IMPLICIT} == IMPLICIT
    new = {"data.auto_augment", "data.random_erasing", "data.mixup", "data.cutmix", "data.cutmix_minmax"}
    assert new <= IMPLICIT.keys()
    assert Recipe().data.timm_augmentation(num_classes=2, mean=(0.5,), std=(0.5,)) is None
