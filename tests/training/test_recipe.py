"""Recipes: what is refused before anything starts, and what is built from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from support.tiny import label_scale_registered

from timm_fsr.attacks.pgd import PGD
from timm_fsr.cli.demo import quickstart_recipe
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.comparison import RECIPE_KEYS
from timm_fsr.training.objectives.at import AT
from timm_fsr.training.objectives.natural import Natural
from timm_fsr.training.objectives.trades import TRADES
from timm_fsr.training.options import (
    AttackOptions,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimOptions,
)
from timm_fsr.training.recipe import Recipe, parse_arguments
from timm_fsr.training.trainer import train

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


class TestCheck:
    """Everything that can be known beforehand is refused before data is read and weights are made."""

    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("timm_fsr.data.dataset.load_data", lambda *_, **__: pytest.fail("data was read"))

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
            (
                ["--model.name=resnet_tiny_cifar_fsr", "--model.layer_args.fsr.hidden=8"],
                r"--model\.layer_args=\{\}\), or",
            ),
            (["--model.name=resnet_tiny_cifar_fsr", "--model.at=[layer3]"], "has the layer 'fsr' already"),
            (["--objective.name=ta"], "unknown objective 'ta'; did you mean .*'at'"),
            (["--objective.args.at.label_smooting=0.1"], "did you mean 'label_smoothing'"),
            (["--objective.args.at.label_smoothing=2"], r"label_smoothing=2 must lie in \[0, 1\)"),
            (["--objective.args.at.label_smoothing=much"], "label_smoothing.* of another type"),
            (["--objective.args.label_smoothing=0.1"], r"objective\.args: 0\.1 in the recipe is no keys and values"),
            (["--objective.args.trades.betta=6"], "argument of the objective 'trades' 'betta'; did you mean 'beta'"),
            (["--objective.args.tardes.beta=6"], "unknown objective 'tardes'; did you mean 'trades'"),
            (["--objective.name=trades", "--attack.random_start=false"], "zero at the image itself.* random_start"),
            (["--objective.name=trades", "--attack.name=fgsm"], "zero at the image itself.* random_start"),
            (["--attack.name=bim"], "attack.name|invalid choice|Literal"),
            (["--attack.name=n_fgsm", "--attack.steps=10"], "attack.steps=10 has no meaning .*'n_fgsm'"),
            (["--attack.warmup_epochs=-1"], "attack.warmup_epochs=-1.0 must be 0 or more"),
            (["--attack.start_noise=0"], "start_noise=0.0 must be a positive"),
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
            (["--evaluation.patience=0"], "evaluation.patience=0 must be at least 1"),
            (["--checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
            (["--optim.accumulate=3"], "does not divide into optim.accumulate=3"),
            (["--optim.schedule=linear"], "schedule"),
            (["--resume=true", "--overwrite=true"], "resume and overwrite contradict each other"),
            (["--compile=inductr"], "unknown torch.compile backend 'inductr'; did you mean 'inductor'"),
            (["--compile=eager", "--objective.args.at.grad_align=0.2"], "differentiates twice, .* with compile"),
            (["--gradient_checkpointing=true", "--objective.args.at.grad_align=0.2"], "with gradient_checkpointing"),
            (["--optim.milestones=[-1]"], "are epochs and must be 0 or more"),
            (["--evaluation.validate_every=0"], "validate_every=0 must be at least 1"),
            # what would only be refused at the end
            (["--data.limit_test=0"], "data.limit_test=0 must be at least 1; null takes all"),
            (["--data.limit_train=-1"], "data.limit_train=-1 must be at least 1"),
            (["--data.size=0"], "data.size=0 must be at least 1"),
            (["--data.channels=4"], r"data.channels=4 is neither 1 \(grey\) nor 3"),
            (["--data.size=32", "--data.crop_padding=32"], "crop_padding=32 is no less than the side .* 32 pixels"),
            (["--model.args.num_classes=5"], "model.args.num_classes=5 cannot be set: the training images decide"),
            (["--model.args.pretrained=true"], "model.args.pretrained=True cannot be set: model.pretrained says so"),
            (["--model.args.features_only=true"], "features_only=True cannot be set: only a model that maps images"),
            (["--model.args.in_chans=5"], "in_chans=5 fits no images.* set data.channels"),
            (["--model.args.checkpoint_path=no.pth"], "there is no file no.pth; correct model.args.checkpoint_path"),
            (
                ["--model.args.checkpoint_path=a", "--model.pretrained=true"],
                "=a and model.pretrained both bring",
            ),
            (["--model.args.drop_rate=.nan"], "model.args.drop_rate=nan must be a finite number"),
            (["--model.layer_args.fsr.tau=.inf"], "tau=inf of the feature layer 'fsr' must be a finite number"),
            (["--model.layer_args.cas.weight=.nan"], "weight=nan of the feature layer 'cas' must be a finite number"),
            (["--objective.args.trades.beta=.nan"], "objective.args.trades.beta=nan must be a finite number"),
            (["--attack.args.n_fgsm.noise=.inf"], "attack.args.n_fgsm.noise=inf must be a finite number"),
            (["--model.layer_args.fsr.hidden=1000000"], "layers 'fsr' of this size need .* GiB .* this machine has"),
            (["--model.layer_args.fsr.hidden=100000000000"], "layers 'fsr' of this size cannot be built"),
            (["--optim.awp_gamma=0.01", "--optim.awp_start=100"], r"awp_start=100 lies beyond the end .*epochs=100\)"),
            # a key that another one leaves without meaning
            (
                ["--optim.schedule=cosine", "--optim.milestones=[5]"],
                r"with optim.schedule=cosine.*=\[75, 90\]",
            ),
            (["--optim.schedule=constant", "--optim.gamma=0.5"], "gamma=0.5 has no meaning with .*--optim.gamma=0.1"),
            (["--optim.awp_start=5"], "awp_start=5.0 has no meaning without .*awp_gamma.*--optim.awp_start=0.0"),
            (["--optim.optimizer=adamw", "--optim.momentum=0.5"], "momentum=0.5 has no meaning for .*adamw"),
            (["--optim.ema_warmup=true"], "ema_warmup has no meaning without an average"),
            (["--data.workers=2"], "data.workers=2 has no meaning for images held in memory.*--data.workers=4"),
            (["--data.extra_split=test"], "extra_split=test has no meaning without data.extra_source"),
            (["--data.extra_limit=5"], "about data.extra_source, which is not set"),
            (
                ["--data.streamed=true", "--data.size=8", "--data.crop_scale=[0.5, 1]", "--data.crop_padding=2"],
                "crop_padding=2 has no meaning with data.crop_scale",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_work_is_refused(self, flags, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            parse_arguments(flags).check()

    @pytest.mark.parametrize(
        "flags",
        [
            ["--compile=inductor"],
            ["--objective.args.at.grad_align=0.2", "--attack.name=fgsm"],
            ["--compile=eager", "--objective.name=trades", "--objective.args.at.grad_align=0.2"],
            ["--resume=true"],
            ["--objective.name=mart", "--attack.random_start=false"],
            ["--objective.name=trades", "--attack.start_noise=0.001"],
            ["--objective.name=trades", "--objective.args.trades.beta=0", "--attack.name=fgsm"],
            ["--objective.name=trades", "--attack.name=n_fgsm"],
            ["--optim.schedule=cosine", "--optim.milestones=[75, 90]", "--optim.gamma=0.1"],
            ["--optim.awp_gamma=0.01", "--optim.awp_start=99.5"],
            ["--optim.optimizer=adamw", "--optim.momentum=0.9"],
            ["--data.streamed=true", "--data.size=32", "--data.workers=2", "--data.crop_padding=31"],
            ["--model.args.in_chans=1", "--data.channels=1"],
            ["--data.limit_test=1", "--data.limit_train=2"],
        ],
        ids=" ".join,
    )
    def test_what_can_work_passes(self, flags):
        parse_arguments(flags).check()

    def test_a_place_that_cannot_reach_the_logits_is_refused(self):
        """The last block of a ViT that pools its class token; the remedy is in the message."""
        recipe = Recipe(model=ModelOptions(name="test_vit", at=[-1]))
        with pytest.raises(ValueError, match=r"cannot reach the logits.*use"):
            recipe.check()

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_the_recipes_that_come_along_pass(self, path):
        own = ["--model.name=resnet18", "--model.pretrained=true"]  # in place of a robust network of the user's
        recipe = Recipe.load(path, own if path.stem == "finetune_robust" else [])
        recipe.check()
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layer=None)).check()
        assert set(yaml.safe_load(path.read_text())) <= {entry.name for entry in dataclasses.fields(Recipe)}

    def test_there_are_recipes(self):
        assert {"cifar10_resnet18", "fashion_mnist_quickstart"} <= {path.stem for path in RECIPES}

    def test_the_paper_recipe_is_the_papers(self):
        recipe = Recipe.load(RECIPES[0].with_stem("cifar10_resnet18"))
        assert recipe.attack.build() == PGD(eps=8 / 255, steps=10, step_size=2 / 255)
        optim = recipe.optim
        assert (optim.epochs, optim.batch_size, optim.lr, optim.weight_decay) == (100, 128, 0.1, 5e-4)
        model = recipe.model.build(num_classes=10)
        assert (model.fsr["layer4"].hidden, model.fsr["layer4"].tau) == (64, 0.1)
        optimizer = optim.build(model)
        assert type(optimizer) is torch.optim.SGD
        assert not optimizer.defaults["nesterov"]
        assert optimizer.defaults["momentum"] == 0.9
        assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}, "the paper decays everything"
        schedule, found = optim.build_schedule(optimizer, 382), []
        for step in (0, 74 * 382 - 1, 74 * 382, 89 * 382 - 1, 89 * 382, 100 * 382 - 1):
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])

    @pytest.mark.parametrize(
        ("name", "lr", "step_size", "padding", "flip"),
        [
            ("cifar10_resnet18", 0.1, 2 / 255, 4, True),
            ("cifar10_vgg16_bn", 0.1, 2 / 255, 4, True),
            ("cifar10_wrn34_10", 0.1, 2 / 255, 4, True),
            ("svhn_resnet18", 0.01, 1 / 255, 0, False),
        ],
    )
    def test_the_papers_recipes_differ_where_the_paper_does(self, name, lr, step_size, padding, flip):
        recipe = Recipe.load(RECIPES[0].with_stem(name))
        assert recipe.attack.build() == PGD(eps=8 / 255, steps=10, step_size=step_size)
        data, optim = recipe.data, recipe.optim
        assert (data.crop_padding, data.flip) == (padding, flip)
        assert (optim.optimizer, optim.lr, optim.momentum, optim.decay_all) == ("momentum", lr, 0.9, True)
        assert (optim.schedule, optim.milestones, optim.gamma) == ("step", [74, 89], 0.1)
        assert (optim.epochs, optim.batch_size, optim.weight_decay) == (100, 128, 5e-4)
        assert (optim.ema_decay, optim.awp_gamma) == (0, 0)

    def test_the_recipe_with_generated_images_is_its_papers(self):
        recipe = Recipe.load(RECIPES[0].with_stem("cifar10_generated"))
        assert recipe.objective.build() == TRADES(beta=5, label_smoothing=0.1)
        assert (recipe.data.extra_fraction, recipe.optim.ema_decay) == (0.7, 0.995)
        assert (recipe.optim.batch_size, recipe.optim.lr, recipe.optim.weight_decay) == (512, 0.2, 5e-4)

    def test_the_quickstart_recipe_is_the_demos(self):
        assert Recipe.load(RECIPES[0].with_stem("fashion_mnist_quickstart")) == quickstart_recipe()

    def test_checking_leaves_no_trace(self):
        state = torch.get_rng_state()
        Recipe().check()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.empty(0).device.type == "cpu"


class TestYAML:
    # Every key of every section at another value than its default.
    CHANGED = Recipe(
        output="elsewhere",
        imports=["own.py"],
        overwrite=True,
        resume=True,
        seed=3,
        mixed_precision="bf16",
        channels_last=False,
        compile="inductor",
        gradient_checkpointing=True,
        batch_norm="sync",
        trackers=["tensorboard", "wandb"],
        model=ModelOptions(
            name="test_vit",
            layer=None,
            at=[-2, "blocks:-1"],
            layer_args={"fsr": {"tau": 0.3}},
            args={"img_size": 32},
            pretrained=True,
        ),
        data=DataOptions(
            source="a/b",
            config="c",
            train_split="t",
            test_split="u",
            image_column="i",
            label_column="l",
            size=32,
            channels=3,
            limit_train=100,
            limit_test=50,
            on_error="skip",
            held_out=10,
            crop_padding=2,
            flip=False,
            extra_source="d/e",
            extra_split="v",
            extra_fraction=0.7,
            extra_limit=20,
            streamed=True,
            workers=2,
            crop_scale=[0.25, 1.0],
            auto_augment="rand-m9-mstd0.5-inc1",
            random_erasing=0.25,
            erasing_mode="const",
            erasing_count=3,
            mixup=0.8,
            cutmix=1.0,
            cutmix_minmax=[0.2, 0.8],
            mixup_prob=0.5,
            mixup_switch_prob=0.25,
            mixup_mode="pair",
            mixup_off_epoch=5,
        ),
        attack=AttackOptions(
            name="fgsm_rs",
            args={"n_fgsm": {"noise": 1.5}},
            norm="l2",
            eps=4 / 255,
            steps=1,
            step_size=5 / 255,
            random_start=False,
            start_noise=0.001,
            warmup_epochs=2.5,
        ),
        objective=ObjectiveOptions(name="trades", args={"trades": {"beta": 3.5}, "at": {"grad_align": 0.2}}),
        optim=OptimOptions(
            optimizer="adamw",
            lr=1e-3,
            momentum=0.8,
            weight_decay=0.05,
            decay_all=False,
            layer_decay=0.75,
            epochs=7,
            batch_size=64,
            accumulate=4,
            schedule="cosine",
            milestones=[1, 2.5],
            gamma=0.2,
            warmup=0.1,
            freeze=2,
            clip_grad=1.0,
            ema_decay=0.99,
            ema_warmup=True,
            awp_gamma=0.005,
            awp_start=5,
            nonfinite="skip",
        ),
        evaluation=EvaluationOptions(
            attacks=["pgd7"],
            validation_attack="apgd",
            validation_steps=3,
            validate_every=2,
            patience=4,
            overfitting_alarm=False,
        ),
        checkpoint=CheckpointOptions(every_steps=100, keep=5),
    )

    def test_every_key_survives_it(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        for recipe in (self.CHANGED, Recipe()):
            path.write_text(recipe.to_yaml(), encoding="utf-8")
            assert Recipe.load(path) == recipe

    def test_the_test_above_leaves_no_key_at_its_default(self):
        def unchanged(found: Any, default: Any, prefix: str = "") -> list[str]:
            names = []
            for entry in dataclasses.fields(default):
                one, other = getattr(found, entry.name), getattr(default, entry.name)
                if dataclasses.is_dataclass(other):
                    names += unchanged(one, other, f"{prefix}{entry.name}.")
                elif one == other:
                    names.append(f"{prefix}{entry.name}")
            return names

        assert unchanged(self.CHANGED, Recipe()) == []


class TestFromValues:
    def test_keys_and_values_are_what_yaml_and_flags_are(self):
        values = {"seed": 3, "attack": {"eps": "8/255"}, "model": {"layer_args": {"fsr": {"hidden": 4}}}}
        flags = ["--seed=3", "--attack.eps=8/255", "--model.layer_args.fsr.hidden=4"]
        assert Recipe.from_dict(values) == Recipe.load(overrides=flags)
        whole = yaml.safe_load(Recipe.load(overrides=flags).to_yaml())
        assert Recipe.from_dict(whole) == Recipe.load(overrides=flags)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"optim": {"epoch": 1}}, r"unknown recipe key 'optim\.epoch'; did you mean 'optim\.epochs'"),
            ({"seed": "x"}, "seed"),
            ({"optim": 3}, "'optim' holds 3; write keys and values"),
            ({"seed": None}, "'seed' is null"),
        ],
    )
    def test_mistakes(self, values, message):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict(values)
        with pytest.raises(ValueError, match=message):
            train(values)

    def test_the_keys_of_a_recipe_are_known_to_those_who_only_read_it(self):
        """To tell a recipe from notes on a training by other code."""
        assert {field.name for field in dataclasses.fields(Recipe)} == RECIPE_KEYS

    def test_it_prints_as_one_line(self):
        assert str(Recipe.load(overrides=["--attack.eps=8/255", "--model.layer=null", "--output=x"])) == (
            "resnet_tiny_cifar on fashion_mnist by at against pgd (linf 8/255), 100 epochs, seed 0, in x"
        )


class TestBuilding:
    def test_objectives(self):
        assert ObjectiveOptions().build() == AT()
        args = {"natural": {"label_smoothing": 0.1}}
        assert ObjectiveOptions(name="natural", args=args).build() == Natural(label_smoothing=0.1)

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
