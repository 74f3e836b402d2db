from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

import timm_fsr
from timm_fsr.hub.bundle import Bundle, read_bundle
from timm_fsr.hub.card import CardOptions, check_card, render_card
from timm_fsr.models.pretrained import embedded_pretrained
from timm_fsr.reports.report import Report
from timm_fsr.training.options import ModelOptions
from timm_fsr.training.recipe import Recipe

CARDS = Path(__file__).parents[2] / "hub_cards"
REPO = "somebody/tiny"


def flags(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


CONDITIONS = {
    "data": "uoft-cs/cifar10[test] limited to 4",
    "data_fingerprint": "abc",
    "training": "AT(...)",
    "training_seed": 5,
}


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "correct": {"clean": flags("1110"), "pgd20": flags("1100"), "autoattack": flags("1000")},
        "stages": {"autoattack": {"apgd-ce": flags("1010"), "square": flags("1000")}},
        "attacks": {"pgd20": "PGD(...)", "autoattack": "apgd-ce: ...; square: ..."},
        "norm": "linf",
        "eps": 8 / 255,
        "seed": 3,
        "labels": torch.arange(4),
        "conditions": dict(CONDITIONS),
    }
    return Report(**{**values, **changes})


RECIPE = {
    "seed": 5,
    "mixed_precision": "bf16",
    "model": {"name": "resnet_tiny_cifar", "layer": "fsr"},
    "data": {"source": "uoft-cs/cifar10"},
    "objective": {"name": "trades"},
}


def full_recipe(layer: str | None) -> dict[str, Any]:
    """What training writes down of its recipe."""
    return yaml.safe_load(dataclasses.replace(Recipe(), seed=5, model=ModelOptions(layer=layer)).to_yaml())


def trained_by(recipe: dict[str, Any]) -> Report:
    """A baseline's report that carries the recipe."""
    return report(conditions={**CONDITIONS, "recipe": recipe})


def bundle(tmp_path: Path, found: Report | None = None, recipe: dict[str, Any] | None = None, **kwargs: Any) -> Bundle:
    name = kwargs.pop("name", "resnet_tiny_cifar_fsr")
    model = timm.create_model(name, **kwargs)
    timm_fsr.save_pretrained(model, tmp_path, report=found or report(), recipe=recipe or RECIPE, license="apache-2.0")
    return read_bundle(tmp_path)


class TestText:
    def test_it_says_how_robust_by_the_worst_case(self, tmp_path):
        text = render_card(bundle(tmp_path), REPO)
        assert "Of 4 test images, **25.0 %** stay correctly" in text
        assert "| clean | 75.0 % | 19.4 % to 99.4 % |" in text  # Clopper-Pearson of 3 in 4
        assert "| **worst case** | **25.0 %** |" in text
        assert "by adversarial training (TRADES)" in text
        assert "upper bounds, not evidence" not in text

    def test_how_to_use_it(self, tmp_path):
        text = render_card(bundle(tmp_path, in_chans=1), REPO, tag="resnet_tiny_cifar_fsr.x")
        assert text.index("import timm, timm_fsr") < text.index("timm.create_model(")
        assert 'timm.create_model("hf-hub:somebody/tiny", pretrained=True).eval()' in text
        assert "(N, 1, 32, 32), pixels in [0, 1] as they are\n```\n" in text
        assert 'timm.create_model("resnet_tiny_cifar_fsr.x", pretrained=True)` builds the same model' in text

    def test_the_code_in_it_runs(self, tmp_path):
        """But for the name: the folder takes the place of the repository."""
        text = render_card(bundle(tmp_path), REPO)
        code = text.split("```python\n")[1].split("```")[0].replace(f"hf-hub:{REPO}", f"local-dir:{tmp_path}")
        images = torch.rand(2, 3, 32, 32)
        values: dict[str, Any] = {"images": images}
        exec(compile(code, "card", "exec"), values)
        assert values["logits"].shape == (2, 10)

    def test_normalised_images(self, tmp_path):
        found = bundle(tmp_path, name="test_resnet_fsr")
        assert "normalised by mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5" in render_card(found, REPO)

    def test_weak_attacks_are_called_weak(self, tmp_path):
        weak = report(correct={"clean": flags("11"), "fgsm": flags("11")}, stages={}, attacks={"fgsm": ""}, labels=None)
        assert "upper bounds, not evidence of robustness" in render_card(bundle(tmp_path, weak), REPO)

    def test_evidence_and_stages(self, tmp_path):
        evidence = {
            "images": 200,
            "eps": {"eps": [0.01, 8 / 255, 0.1, 0.2], "accuracy": [0.7, 0.5, 0.25, 0.1]},
            "findings": [{"level": "warning", "text": "Square broke more"}, {"level": "ok", "text": "all well"}],
        }
        correct = {"clean": flags("1110"), "adaptive": flags("1000")}
        stages = {"adaptive": {"apgd-ce": flags("1100"), "mask forcing": flags("1000")}}
        corruptions = {"fog": {"1": 0.5, "2": 0.25}}
        found = report(
            correct=correct, stages=stages, evidence=evidence, corruptions=corruptions, notes=("beware",), attacks={}
        )
        text = render_card(bundle(tmp_path, found), REPO)
        assert "- **Warning**: Square broke more." in text
        assert "- Fine: all well." in text
        assert "| mask forcing | 1 |" in text
        assert "within 0.1 it keeps 25.0 % of 200 images" in text
        assert "10.0 %" not in text, "one larger radius is enough"
        assert "37.5 % mean accuracy" in text
        assert "Note: beware." in text

    def test_a_model_that_does_not_work_is_called_so(self, tmp_path):
        labels = torch.arange(200) % 4
        broken, works = (
            report(correct={"clean": right, "autoattack": right}, stages={}, labels=labels, attacks={"autoattack": "x"})
            for right in (labels == 1, torch.arange(200) < 150)
        )
        broken = dataclasses.replace(broken, notes=(broken.collapsed, "another"))
        found = bundle(tmp_path / "a", broken)
        text = render_card(found, REPO)
        said = "the model does not work: it answers the class 1 for nearly all images"
        assert f"**Robust accuracy says nothing here: {said}" in text
        assert text.count(said) == 1
        assert "Note: another." in text
        check_card(text, found, REPO)
        with pytest.raises(ValueError, match=r"the model's report says that the model does not work.*leave it out"):
            render_card(found, REPO, CardOptions(baseline=works))
        with pytest.raises(ValueError, match=r"the baseline's report says that the model does not work"):
            render_card(bundle(tmp_path / "b", works), REPO, CardOptions(baseline=broken))

    def test_a_baseline_is_set_beside_it(self, tmp_path):
        correct = {"clean": flags("1110"), "pgd20": flags("0110"), "autoattack": flags("0110")}
        text = render_card(bundle(tmp_path), REPO, CardOptions(baseline=report(correct=correct)))
        assert "| worst case | 25.0 % | 50.0 % |" in text
        assert "1 images are gained and 2 lost, which is no more than chance explains" in text

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"eps": 4 / 255}, "threat model"),
            ({"seed": 4}, "seed of the evaluation"),
            ({"conditions": {**CONDITIONS, "data_fingerprint": "other"}}, "data fingerprint"),
            ({"conditions": {**CONDITIONS, "training": "AT(...), 5 epochs"}}, "training"),
            ({"conditions": {**CONDITIONS, "training_data": "cifar10[train]"}}, "training data"),
            ({"conditions": {**CONDITIONS, "training_seed": 1}}, "training seed"),
            ({"conditions": {**CONDITIONS, "checkpoint_rule": "last epoch"}}, "checkpoint rule"),
            ({"correct": {"clean": flags("1110")}}, "attacks"),
        ],
    )
    def test_a_baseline_that_cannot_be_compared(self, tmp_path, changes, what):
        with pytest.raises(ValueError, match=f"the {what} of the baseline's report is .* evaluate both alike"):
            render_card(bundle(tmp_path), REPO, CardOptions(baseline=report(**changes)))

    def test_it_says_no_more_of_the_baseline_than_the_reports_do(self, tmp_path):
        text = render_card(bundle(tmp_path), REPO, CardOptions(baseline=report()))
        assert "\nSame epochs, attack, seed and images.\n" in text
        found, bare = tmp_path / "bare", report(conditions={})
        assert "\nSame " not in render_card(bundle(found, bare), REPO, CardOptions(baseline=bare))

    @pytest.mark.parametrize(
        ("section", "change", "message"),
        [
            ("optim", {"ema_decay": 0.999}, r"layer: optim\.ema_decay \(0\.0 and 0\.999\); train both alike"),
            ("optim", {"awp_gamma": 0.01}, r"optim\.awp_gamma \(0\.0 and 0\.01\)"),
            ("optim", {"lr": 0.5}, r"optim\.lr \(0\.1 and 0\.5\)"),
            ("optim", {"batch_size": 4096}, r"optim\.batch_size \(128 and 4096\)"),
            ("data", {"flip": False}, r"data\.flip \(True and False\)"),
            ("model", {"name": "wrn34_10_cifar"}, r"model\.name \(resnet_tiny_cifar and wrn34_10_cifar\)"),
            ("model", {"args": {"stem_width": 4}}, r"model\.args \(\{\} and \{'stem_width': 4\}\)"),
            ("model", {"layer": "cas"}, "the baseline was trained with the layer 'cas'"),
            ("model", {"name": "resnet_tiny_cifar_cas"}, "the baseline was trained with the layer 'cas'"),
        ],
    )
    def test_a_baseline_of_another_budget_is_refused(self, tmp_path, section, change, message):
        ours, theirs = full_recipe("fsr"), full_recipe(None)
        theirs[section] |= change
        with pytest.raises(ValueError, match=message):
            render_card(bundle(tmp_path, recipe=ours), REPO, CardOptions(baseline=trained_by(theirs)))

    def test_a_baseline_of_the_same_recipe_says_so(self, tmp_path):
        ours, theirs = full_recipe("fsr"), full_recipe(None)
        ours["model"] |= {"name": "resnet_tiny_cifar_fsr", "at": [-1], "layer_args": {"fsr": {"hidden": 4}}}
        theirs["data"]["workers"] = 3
        text = render_card(bundle(tmp_path, recipe=ours), REPO, CardOptions(baseline=trained_by(theirs)))
        assert "; the recipes differ in the layer alone.\n" in text
        assert "has not been checked" not in text

    def test_what_is_unknown_of_a_baseline_is_not_called_the_same(self, tmp_path):
        for number, baseline in enumerate((report(), trained_by({"model": {"name": "resnet_tiny_cifar"}}))):
            found = bundle(tmp_path / str(number), recipe=full_recipe("fsr"))
            text = render_card(found, REPO, CardOptions(baseline=baseline))
            assert "in the layer alone" not in text
            assert "does not carry a whole recipe" in text

    def test_a_model_is_not_its_own_baseline(self, tmp_path):
        own = report(conditions={**CONDITIONS, "weights_sha256": "abc"})
        with pytest.raises(ValueError, match="about the model's own weights; give the report of the training without"):
            render_card(bundle(tmp_path, own), REPO, CardOptions(baseline=own))

    def test_a_baseline_from_another_folder_of_the_same_data(self, tmp_path):
        """Where the data lay is cut from both, or neither."""
        here, there = (
            report(conditions={"training_data": f"/{place}/my toys[train]", "data": f"/{place}/my toys[test]"})
            for place in ("here", "over there")
        )
        assert "Same data." in render_card(bundle(tmp_path, here), REPO, CardOptions(baseline=there))

    def test_a_plain_network(self, tmp_path):
        recipe = {**RECIPE, "model": {"name": "resnet_tiny_cifar", "layer": None}}
        text = render_card(bundle(tmp_path, recipe=recipe, name="resnet_tiny_cifar"), REPO)
        assert "2303.13846" not in text
        assert "bibtex" not in text
        assert "mask" not in text


class TestMetadata:
    @pytest.mark.parametrize("source", ["/usr/share/datasets/fashion-mnist", "zalando-datasets/fashion_mnist"])
    def test_a_copy_of_a_known_data_set_is_called_by_its_name(self, tmp_path, source):
        conditions = {**CONDITIONS, "data": f"{source}[test]", "training_data": f"{source}[train]"}
        found = bundle(tmp_path, report(conditions=conditions), {**RECIPE, "data": {"source": source}})
        text = render_card(found, REPO)
        assert "\ntrained on Fashion-MNIST " in text.replace("-MNIST\n", "-MNIST ")
        assert ModelCard(text).data.datasets == ["zalando-datasets/fashion_mnist"]
        assert "/usr/share" not in text

    def test_the_hub_reads_it_as_it_was_meant(self, tmp_path):
        data = ModelCard(render_card(bundle(tmp_path), REPO)).data
        assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
        assert data.datasets == ["uoft-cs/cifar10"]
        assert {"timm", "adversarial-robustness", "arxiv:2303.13846"} <= set(data.tags)
        found = {result.metric_name: result.metric_value for result in data.eval_results}
        assert found == {
            "Accuracy": 75.0,
            "Robust accuracy (AutoAttack, Linf 8/255)": 25.0,
            "Robust accuracy (worst case of all attacks, Linf 8/255)": 25.0,
        }
        robust = data.eval_results[1].metric_args
        assert robust == {
            "n_examples": 4,
            "seed": 3,
            "norm": "linf",
            "eps": pytest.approx(8 / 255),
            "attack": "apgd-ce, square",
        }

    def test_the_model_index_goes_there_and_back(self, tmp_path):
        text = render_card(bundle(tmp_path), REPO)
        data = ModelCard(text).data
        index = eval_results_to_model_index("tiny", data.eval_results)
        name, results = model_index_to_eval_results(index)
        assert name == data.model_name == "tiny"
        assert results == data.eval_results
        plain = yaml.safe_load(text.split("---")[1])  # which refuses values of NumPy and other objects
        assert plain["model-index"] == index

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ({"name": "hf-hub:owner/base@v2"}, "owner/base"),
            ({"name": "hf_hub:owner/base"}, "owner/base"),
            ({"name": "resnet_tiny_cifar_fsr.at_fashion_mnist"}, None),  # nothing says that it is on the Hub
            ({"name": "resnet18", "pretrained": True}, "timm/resnet18.a1_in1k"),
            ({"name": "resnet18"}, None),
        ],
    )
    def test_the_base_model_is_the_recipes(self, tmp_path, model, expected):
        found = bundle(tmp_path, recipe={**RECIPE, "model": {**model, "layer": "fsr"}})
        text = render_card(found, REPO)
        assert ModelCard(text).data.get("base_model") == expected
        shown = expected or (model["name"] if "." in model["name"] else None)
        assert ("| started from |" in text) == bool(shown)
        assert shown is None or f"| started from | {shown} |" in text
        assert ModelCard(render_card(found, REPO, CardOptions(base_model="a/b"))).data.base_model == "a/b"

    def test_what_was_loaded_counts_before_what_the_recipe_says(self, tmp_path):
        """A network of timm with a fresh layer: its backbone is in no recipe's name."""
        found = bundle(tmp_path, recipe={**RECIPE, "model": {"name": "resnet50_fsr", "pretrained": True}})
        found.config["timm_fsr"]["origin"] = {"name": "timm/resnet50.a1_in1k", "hub_id": "timm/resnet50.a1_in1k"}
        text = render_card(found, REPO)
        assert ModelCard(text).data.base_model == "timm/resnet50.a1_in1k"
        assert "| started from | timm/resnet50.a1_in1k |" in text
        found.config["timm_fsr"]["origin"] = {"name": "resnet_tiny_cifar_fsr.x"}
        assert ModelCard(render_card(found, REPO)).data.get("base_model") is None

    def test_the_data_is_what_training_loaded_and_all_of_it(self, tmp_path):
        conditions = {**CONDITIONS, "training_data": "uoft-cs/cifar100[train] without held-out (10 of 20, seed 0)"}
        recipe = {**RECIPE, "data": {"source": "uoft-cs/cifar10", "extra_source": "/data/generated.npz"}}
        text = render_card(bundle(tmp_path, report(conditions=conditions), recipe), REPO)
        assert ModelCard(text).data.datasets == ["uoft-cs/cifar100"]
        assert "trained on CIFAR-100" in text
        assert "`uoft-cs/cifar100`) and generated.npz (see the data set's own page)." in text
        assert "| further data | generated.npz |" in text

    def test_the_results_are_of_the_data_that_was_judged(self, tmp_path):
        judged = report(conditions={"data": "zalando/other[train] limited to 4"})
        text = render_card(bundle(tmp_path, judged), REPO)
        data = ModelCard(text).data
        assert data.datasets == ["uoft-cs/cifar10"]
        assert {result.dataset_name for result in data.eval_results} == {"zalando/other"}
        assert {result.dataset_split for result in data.eval_results} == {"train"}
        assert "Of 4 train images" in text
        unnamed = render_card(bundle(tmp_path / "b", report(conditions={})), REPO)
        assert {result.dataset_split for result in ModelCard(unnamed).data.eval_results} == {None}
        assert "test" not in unnamed.split("## How robust")[1].split("## What")[0]

    @pytest.mark.parametrize("name", ["noslash", "a/b/c", "a b/c", "owner/", "/name", "", "x" * 120 + "/y"])
    def test_names_that_no_repository_can_have(self, tmp_path, name):
        found = bundle(tmp_path)
        with pytest.raises(ValueError, match=r"is no name of a repository .*write user/name"):
            render_card(found, name)
        with pytest.raises(ValueError, match=r"is no name of a repository .*write user/name"):
            render_card(found, REPO, CardOptions(base_model=name))

    @pytest.mark.parametrize("license", ["My Own Licence!!", "", "apache 2.0"])
    def test_licences_that_are_none(self, tmp_path, license):
        with pytest.raises(ValueError, match=r"is no short name of a licence; write one of https.*apache-2\.0"):
            render_card(bundle(tmp_path), REPO, CardOptions(license=license))

    def test_a_licence_is_needed(self, tmp_path):
        """Nobody has said it: the architecture's own is of other weights, and of none here."""
        assert timm.get_pretrained_cfg("resnet_tiny_cifar").license == "apache-2.0"
        model = timm.create_model("resnet_tiny_cifar_fsr")
        found = read_bundle(timm_fsr.save_pretrained(model, tmp_path, report=report(), recipe=RECIPE))
        assert "license" not in found.config["pretrained_cfg"]
        with pytest.raises(ValueError, match="names no licence; give one"):
            render_card(found, REPO)
        assert "license: mit" in render_card(found, REPO, CardOptions(license="mit"))


class TestCheck:
    def test_a_generated_card_passes_also_when_words_are_added(self, tmp_path):
        found = bundle(tmp_path)
        check_card(render_card(found, REPO) + "\nMore words.\n", found, REPO)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("value: 25.0", "value: 35.0", "the card belongs to another evaluation"),
            ("library_name: timm", "library_name: transformers", "library_name"),
            ("license: apache-2.0\n", "", "license"),
            ("model-index:\n- name: tiny\n", "model-index:\n- name: [\n", "not valid"),
        ],
    )
    def test_others_do_not(self, tmp_path, old, new, message):
        found = bundle(tmp_path)
        with pytest.raises(ValueError, match=message):
            check_card(render_card(found, REPO).replace(old, new), found, REPO)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("n_examples: 4", "n_examples: 4000"),
            ("eps: 0.03", "eps: 0.3"),
            ("type: uoft-cs/cifar10", "type: ILSVRC/imagenet-1k"),
            ("split: test", "split: train"),
        ],
    )
    def test_results_are_more_than_their_values(self, tmp_path, old, new):
        found = bundle(tmp_path)
        with pytest.raises(ValueError, match="the card belongs to another evaluation"):
            check_card(render_card(found, REPO).replace(old, new), found, REPO)

    @pytest.mark.parametrize("old", ["**25.0 %** stay", "| clean | 75.0 %", "75.0 % of the test images"])
    def test_figures_in_the_text(self, tmp_path, old):
        found = bundle(tmp_path)
        text = render_card(found, REPO)
        assert old in text
        with pytest.raises(ValueError, match="or has other figures in it"):
            check_card(text.replace(old, old.replace("5.0 %", "9.0 %")), found, REPO)

    def test_the_card_of_other_weights_with_the_same_figures(self, tmp_path):
        text = render_card(bundle(tmp_path / "a", fsr_hidden=4), REPO)
        other = bundle(tmp_path / "b", fsr_hidden=8)
        with pytest.raises(ValueError, match="does not name the SHA-256 of these weights"):
            check_card(text, other, REPO)

    def test_the_card_of_another_repository(self, tmp_path):
        found = bundle(tmp_path)
        for other in ("somebody/tin", "somebody/tiny.2", "someone/tiny"):
            with pytest.raises(ValueError, match=f"nowhere names hf-hub:{other}"):
                check_card(render_card(found, REPO), found, other)


@pytest.mark.skipif(not CARDS.is_dir(), reason="an installed package has no hub_cards/")
def test_each_published_card_is_the_generated_one():
    """Reviewed, committed, pushed unchanged: a card that differs from its report is a false promise."""
    entries = list(embedded_pretrained())
    assert {path.stem for path in CARDS.glob("*.md")} - {"README"} == {entry.name for entry in entries}
    for entry in entries:
        baseline = CARDS / f"{entry.name}.baseline.json"
        text = render_card(
            read_bundle(entry.folder),
            f"timm-fsr/{entry.name}",
            CardOptions(baseline=Report.load(baseline) if baseline.is_file() else None),
            tag=entry.name,
        )
        assert (CARDS / f"{entry.name}.md").read_text() == text
