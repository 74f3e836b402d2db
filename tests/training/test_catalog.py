"""Recipes by name: found in the package or the checkout, described by themselves, printed and copied."""

from __future__ import annotations

import json

import pytest

from timm_fsr.cli.main import main
from timm_fsr.training import catalog
from timm_fsr.training.catalog import RecipeEntry, find_recipe, list_recipes
from timm_fsr.training.recipe import Recipe

QUICK = "fashion_mnist_quickstart"


def test_a_recipe_is_found_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_recipe(QUICK)
    assert path.is_file()
    assert find_recipe(f"{QUICK}.yaml") == path
    assert Recipe.load(QUICK) == Recipe.load(path)
    assert Recipe.load(overrides=["--config", "cifar10_wrn34_10", "--config=cifar100"]).output == "runs/cifar100"


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100").write_text("seed: 7\n")
    assert Recipe.load("cifar100").seed == 7


def test_an_installed_package_holds_them_itself(tmp_path, monkeypatch):
    (tmp_path / "one.yaml").write_text(find_recipe(QUICK).read_text())
    monkeypatch.setattr(catalog, "FOLDERS", (tmp_path, *catalog.FOLDERS))
    assert [entry.name for entry in list_recipes()] == ["one"]
    monkeypatch.setattr(catalog, "FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(FileNotFoundError, match="has no recipes"):
        list_recipes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fashion_mnist_quikstart", f"did you mean '{QUICK}'"),
        (f"recipes_elsewhere/{QUICK}.yaml", f"one of this name comes with the package: {QUICK}"),
        ("mine.yaml", "there is no recipe mine.yaml; give the path of a YAML file, or a name"),
        ("../secrets", "there is no recipe ../secrets"),
    ],
)
def test_mistakes(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={given}"]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_describes_itself(tmp_path):
    entry = RecipeEntry.read(find_recipe("cifar10_tiny_at"))
    assert (entry.data, entry.network) == ("uoft-cs/cifar10, 21,000 images", "resnet_tiny_cifar with fsr")
    assert "15 minutes" in entry.cost
    (tmp_path / "mine.yaml").write_text("# purpose: mine\n# cost: none\nseed: 0\n")
    with pytest.raises(ValueError, match="add '# measured: "):
        RecipeEntry.read(tmp_path / "mine.yaml")


class TestCommand:
    def test_the_list_fits_the_screen(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert [line for line in lines if line and not line.startswith((" ", "`"))] == [e.name for e in list_recipes()]
        assert main(["recipes", "--json"]) == 0
        assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {e.name for e in list_recipes()}

    def test_one_is_printed_or_copied_to_train_by(self, tmp_path, capsys):
        text = find_recipe(QUICK).read_text()
        assert main(["recipes", QUICK]) == 0
        assert capsys.readouterr().out == text
        target = tmp_path / "mine.yaml"
        assert main(["recipes", QUICK, "--output", str(target)]) == 0
        assert target.read_text() == text
        assert f"timm-fsr train --config {target}" in capsys.readouterr().out
        target.write_text("seed: 3\n")
        assert main(["recipes", QUICK, "--output", str(target)]) == 2
        assert "add --overwrite" in capsys.readouterr().err
        assert target.read_text() == "seed: 3\n"
        assert main(["recipes", QUICK, "--output", str(target), "--overwrite"]) == 0
        assert target.read_text() == text

    def test_flags_that_belong_to_one_recipe(self, capsys):
        assert main(["recipes", "--output=x"]) == 2
        assert "are for one recipe" in capsys.readouterr().err


def test_recipes_of_comparisons_have_names_too():
    assert find_recipe("compare/cifar10").name == "cifar10.yaml"
    assert find_recipe("compare/cifar10").parent.name == "compare"
