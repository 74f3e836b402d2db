"""Recipes: what is refused before anything starts, and what is built from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from tiny import label_scale_registered

from timm_fsr.attacks import PGD
from timm_fsr.demo import quickstart_recipe
from timm_fsr.hub import save_pretrained
from timm_fsr.objectives import AT, Natural
from timm_fsr.recipe import (
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimOptions,
    Recipe,
    parse_arguments,
)

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


class TestCheck:
    """Everything that can be known beforehand is refused before data is read and weights are made."""

    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("timm_fsr.recipe.load_data", lambda *_, **__: pytest.fail("data was read"))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--model.name=resnet_tiny_cifra"], "unknown model.* did you mean 'resnet_tiny_cifar'"),
            (["--model.name=local-dir:nowhere"], r"nowhere has no config\.json"),
            (["--model.name=runs/nowhere"], "there is no folder runs/nowhere"),
            (["--model.layer=frs"], "unknown feature layer 'frs'; did you mean 'fsr'"),
            (["--model.at=[99]"], "99"),
            (["--model.at=[layer9]"], "layer9"),
            (["--model.layer_args.fsr.tua=1"], "unknown argument of the feature layer 'fsr' 'tua'; did you mean 'tau'"),
            (["--model.layer_args.fsr.tau=-1"], "tau=-1 must be positive"),
            (["--model.layer_args.fsr.hidden=wide"], "hidden|arguments"),
            (["--model.layer_args.frs.tau=1"], "unknown feature layer 'frs'"),
            (["--model.layer_args.hidden=16"], "layer_args"),
            (["--model.args.depth_of_thought=3"], "depth_of_thought"),
            (["--model.name=resnet_tiny_cifar_fsr", "--model.layer_args.fsr.hidden=8"], "has the layer 'fsr' already"),
            (["--model.name=resnet_tiny_cifar_fsr", "--model.at=[layer3]"], "has the layer 'fsr' already"),
            (["--objective.name=ta"], "unknown objective.name 'ta'; did you mean 'at'"),
            (["--objective.args.label_smooting=0.1"], "did you mean 'label_smoothing'"),
            (["--objective.args.label_smoothing=2"], r"label_smoothing=2 must lie in \[0, 1\)"),
            (["--objective.args.label_smoothing=much"], "label_smoothing"),
            (["--attack.eps=-8/255"], "must be 0 or more"),
            (["--attack.norm=l3"], "norm='l3' is unknown"),
            (["--attack.steps=0"], "steps=0"),
            (["--attack.step_size=0"], "step_size=0.0 must be positive"),
            (["--optim.optimizer=sdg"], "unknown optim.optimizer 'sdg'; did you mean 'sgd'"),
            (["--optim.epochs=0"], "optim.epochs=0"),
            (["--optim.batch_size=0"], "optim.batch_size=0"),
            (["--optim.lr=0"], "optim.lr=0.0 must be positive"),
            (["--optim.lr=-1"], "optim.lr=-1.0"),
            (["--optim.weight_decay=-1"], "optim.weight_decay=-1.0 0 or more"),
            (["--optim.momentum=-1"], r"optim.momentum=-1.0 .*\[0, 1\)"),
            (["--optim.ema_decay=1"], "optim.ema_decay=1.0"),
            (["--optim.warmup=1"], "optim.warmup=1.0"),
            (["--data.held_out=0"], "data.held_out=0 must be at least 1"),
            (["--data.crop_padding=-1"], "data.crop_padding=-1 must be 0 or more"),
            (["--evaluation.attacks=[pdg20]"], "unknown attack 'pdg20'; did you mean 'pgd20'"),
            (["--evaluation.validation_steps=0"], "validation_steps=0"),
            (["--evaluation.validate_every=0"], "validate_every=0 must be at least 1"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_work_is_refused(self, flags, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            parse_arguments(flags).check()

    def test_a_place_that_cannot_reach_the_logits_is_refused(self):
        """The last block of a ViT that pools its class token; the remedy is in the message."""
        recipe = Recipe(model=ModelOptions(name="test_vit", at=[-1]))
        with pytest.raises(ValueError, match=r"cannot reach the logits.*use"):
            recipe.check()

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_the_recipes_that_come_along_pass(self, path):
        recipe = Recipe.load(path)
        recipe.check()
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layer=None)).check()
        assert set(yaml.safe_load(path.read_text())) <= {entry.name for entry in dataclasses.fields(Recipe)}

    def test_there_are_recipes(self):
        assert {"cifar10_resnet18_at", "fashion_mnist_quickstart"} <= {path.stem for path in RECIPES}

    def test_the_paper_recipe_is_the_papers(self):
        recipe = Recipe.load(RECIPES[0].with_stem("cifar10_resnet18_at"))
        assert recipe.attack.build() == PGD(eps=8 / 255, steps=10, step_size=2 / 255)
        optim = recipe.optim
        assert (optim.epochs, optim.batch_size, optim.lr, optim.weight_decay) == (100, 128, 0.1, 5e-4)
        assert [optim.lr * optim.lr_factor(e) for e in (0, 74.9, 75, 90)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
        model = recipe.model.build(num_classes=10)
        assert (model.fsr["layer4"].hidden, model.fsr["layer4"].tau) == (64, 0.1)
        optimizer = optim.build(model)
        assert type(optimizer) is torch.optim.SGD
        assert not optimizer.defaults["nesterov"]
        assert optimizer.defaults["momentum"] == 0.9
        assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}, "the paper decays everything"

    def test_the_quickstart_recipe_is_the_demos(self):
        assert Recipe.load(RECIPES[0].with_stem("fashion_mnist_quickstart")) == quickstart_recipe()

    def test_checking_leaves_no_trace(self):
        state = torch.get_rng_state()
        Recipe().check()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.empty(0).device.type == "cpu"


class TestSchedules:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"schedule": "constant"}, {0: 1, 5: 1, 9.99: 1}),
            (
                {"schedule": "step", "milestones": [4, 8], "gamma": 0.1},
                {0: 1, 3.99: 1, 4: 0.1, 7.99: 0.1, 8: 0.01, 9.9: 0.01},
            ),
            (
                {"schedule": "cosine"},
                {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5, 7.5: (1 - math.sqrt(0.5)) / 2, 10: 0},
            ),
            ({"schedule": "cosine", "warmup": 0.2}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
            ({"schedule": "one_cycle", "warmup": 0.4}, {0: 0, 1: 0.25, 4: 1, 7: 0.5, 10: 0}),
            ({"schedule": "one_cycle"}, {0: 1, 5: 0.5, 10: 0}),
        ],
    )
    def test_factors_are_those_by_hand(self, options, expected):
        optim = OptimOptions(epochs=10, **options)
        for epoch, factor in expected.items():
            assert optim.lr_factor(epoch) == pytest.approx(factor, abs=1e-12)


class TestBuilding:
    def test_objectives(self):
        assert ObjectiveOptions().build() == AT()
        assert ObjectiveOptions(name="natural", args={"label_smoothing": 0.1}).build() == Natural(label_smoothing=0.1)

    def test_norms_and_biases_are_decayed_on_demand(self):
        model = timm.create_model("resnet_tiny_cifar")
        decays = [
            {group["weight_decay"] for group in OptimOptions(decay_all=decay_all).build(model).param_groups}
            for decay_all in (True, False)
        ]
        assert decays == [{5e-4}, {0.0, 5e-4}]

    @pytest.mark.parametrize("layer", ["fsr", None])
    @pytest.mark.parametrize("image_size", [(1, 28, 28), (3, 32, 32), (3, 40, 24)], ids=str)
    def test_the_model_fits_the_images(self, layer, image_size):
        model: Any = ModelOptions(layer=layer, layer_args={"fsr": {"hidden": 4}}).build(
            num_classes=7, image_size=image_size
        )
        assert model(torch.rand(2, *image_size)).shape == (2, 7)
        assert hasattr(model, "fsr") is (layer is not None)
        assert tuple(model.pretrained_cfg["input_size"]) == image_size
        assert len(model.pretrained_cfg["mean"]) == len(model.pretrained_cfg["std"]) == image_size[0]

    def test_a_model_of_fixed_size_is_built_for_the_images(self):
        options = ModelOptions(name="vit_tiny_patch4_32", args={"depth": 2, "embed_dim": 16, "num_heads": 2})
        model = options.build(num_classes=3, image_size=(1, 28, 28))
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 3)

    def test_statistics_of_three_channels_are_averaged_for_grey_images(self):
        mean = torch.tensor(timm.create_model("test_resnet").pretrained_cfg["mean"])
        model: Any = ModelOptions(name="test_resnet").build(num_classes=3, image_size=(1, 32, 32))
        assert model.pretrained_cfg["mean"] == pytest.approx((float(mean.mean()),))

    def test_layer_arguments_reach_the_layer(self):
        options = ModelOptions(at=["layer2", "layer3"], layer_args={"fsr": {"hidden": 4, "tau": 0.3}})
        model: Any = options.build(num_classes=3)
        assert {name: (site.hidden, site.tau) for name, site in model.fsr.items()} == {
            "layer2": (4, 0.3),
            "layer3": (4, 0.3),
        }

    def test_one_changed_line_compares_layers(self):
        with label_scale_registered():
            options = ModelOptions(layer_args={"fsr": {"hidden": 4}, "label_scale": {"start": 2.0}})
            for layer in ("fsr", "label_scale", None):
                one = dataclasses.replace(options, layer=layer)
                one.check()
                names = {name for name, _ in one.build(num_classes=3).named_children()}
                assert names & {"fsr", "label_scale"} == ({layer} if layer else set())

    def test_a_saved_model_is_taken_up_again(self, tmp_path):
        torch.manual_seed(1)
        options = ModelOptions(layer_args={"fsr": {"hidden": 4}})
        first: Any = options.build(num_classes=10, image_size=(1, 28, 28))
        folder = save_pretrained(first, tmp_path / "saved")
        for name in (f"local-dir:{folder}", str(folder)):
            again = ModelOptions(name=name, layer_args={"fsr": {"hidden": 4}})
            again.check()
            second: Any = again.build(num_classes=10, image_size=(1, 28, 28))
            assert all(torch.equal(value, first.state_dict()[key]) for key, value in second.state_dict().items())
        other = dataclasses.replace(again, layer_args={"fsr": {"hidden": 8}})
        with pytest.raises(ValueError, match=r"has the layer 'fsr' already, built with .*'hidden': 4"):
            other.build(num_classes=10, image_size=(1, 28, 28))

    def test_a_saved_plain_model_gets_the_layer(self, tmp_path):
        folder = save_pretrained(timm.create_model("resnet_tiny_cifar"), tmp_path / "saved")
        options = ModelOptions(name=f"local-dir:{folder}", layer_args={"fsr": {"hidden": 4}})
        options.check()
        model: Any = options.build(num_classes=10, image_size=(3, 32, 32))
        assert model.fsr["layer4"].hidden == 4
        save_pretrained(model, tmp_path / "with layer")

    def test_augmentation(self):
        augmentation = DataOptions(crop_padding=2, flip=False).augmentation()
        assert (augmentation.padding, augmentation.flip) == (2, False)

    def test_the_split_is_disjoint_and_follows_the_seed(self):
        options = DataOptions(limit_train=60, limit_test=20, held_out=10)
        rest, held_out = options.build(seed=1, progress=False)
        assert (len(rest), len(held_out)) == (50, 10)
        assert options.build(seed=1, progress=False)[1].fingerprint == held_out.fingerprint
        assert options.build(seed=2, progress=False)[1].fingerprint != held_out.fingerprint
        assert len(options.build_test(rest.classes, progress=False)) == 20
