"""How recipes are written: what YAML and flags may say, and how mistakes in them are answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from timm_fsr.training.objectives.at import AT
from timm_fsr.training.options import DataOptions
from timm_fsr.training.parsing import parse_number, write_options
from timm_fsr.training.recipe import Recipe, parse_arguments


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a recipe file and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestReading:
    def test_yaml_then_flags(self, write):
        path = write("seed: 3\noptim: {epochs: 7, lr: 0.5}\nmodel: {layer: null}\n")
        recipe = Recipe.load(path, ["--optim.epochs=5", "--attack.steps", "2", "--evaluation.attacks=[pgd7]"])
        assert (recipe.seed, recipe.optim.epochs, recipe.optim.lr) == (3, 5, 0.5)
        assert recipe.model.layer is None
        assert recipe.attack.steps == 2
        assert recipe.evaluation.attacks == ["pgd7"]
        assert recipe.data == DataOptions()

    def test_the_command_line_reads_the_same(self, write):
        path = write("seed: 3\noptim: {epochs: 7}\n")
        arguments = ["--config", str(path), "--seed=4"]
        assert parse_arguments(arguments) == Recipe.load(path, ["--seed=4"])
        assert parse_arguments([f"--config={path}"]).seed == 3

    def test_no_file_gives_the_defaults(self):
        assert Recipe.load() == Recipe()
        assert Recipe.load(overrides=["--seed=1"]) == Recipe(seed=1)

    @pytest.mark.parametrize(
        ("text", "value"),
        [("8/255", 8 / 255), ("'8 / 255'", 8 / 255), ("1e-3", 1e-3), ("0.1", 0.1), ("0", 0.0), ("1", 1.0)],
    )
    def test_numbers_may_be_written_as_the_field_writes_them(self, write, text, value):
        """YAML itself takes 8/255 and 1e-3 for strings."""
        recipe = Recipe.load(write(f"attack: {{eps: {text}}}\noptim: {{weight_decay: {text}}}\n"))
        assert (recipe.attack.eps, recipe.optim.weight_decay) == (value, value)
        flag = text.strip("'")
        assert Recipe.load(overrides=[f"--attack.eps={flag}"]).attack.eps == value

    def test_numbers_in_lists_and_optional_numbers(self, write):
        recipe = Recipe.load(write("optim: {milestones: [1e1, 15/2]}\nattack: {step_size: 2/255}\n"))
        assert recipe.optim.milestones == [10.0, 7.5]
        assert recipe.attack.step_size == 2 / 255
        assert Recipe.load(overrides=["--attack.step_size=null"]).attack.step_size is None

    def test_places_may_be_numbers_or_names(self, write):
        recipe = Recipe.load(write("model: {at: [-1, 'blocks:-1', layer2]}\n"))
        assert recipe.model.at == [-1, "blocks:-1", "layer2"]

    @pytest.mark.parametrize(
        ("text", "at"),
        [
            ("-1", -1),
            ("stages", "stages"),
            ("blocks:-1", "blocks:-1"),
            ("[layer3, -1]", ["layer3", -1]),
            ("null", None),
        ],
    )
    def test_a_single_place_does_without_brackets(self, write, text, at):
        recipe = Recipe.load(overrides=[f"--model.at={text}"])
        assert recipe.model.at == at
        assert Recipe.load(write(write_options(recipe))) == recipe

    def test_dictionaries_take_keys_of_their_own(self, write):
        recipe = Recipe.load(
            write("model: {layer_args: {fsr: {tau: 0.2}}, args: {drop_rate: 0.5}}\n"),
            ["--objective.args.at.label_smoothing=0.1"],
        )
        assert recipe.model.layer_args == {"fsr": {"tau": 0.2}}
        assert recipe.model.args == {"drop_rate": 0.5}
        assert recipe.objective.build() == AT(label_smoothing=0.1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sede: 1", "unknown recipe key in .*recipe.yaml 'sede'; did you mean 'seed'"),
            ("optim: {epoch: 1}", "unknown recipe key in .* 'optim.epoch'; did you mean 'optim.epochs'"),
            ("attack: {epsilon: 1}", "unknown recipe key .* 'attack.epsilon'; did you mean 'attack.eps'"),
            ("modle: {name: x}", "'modle'; did you mean 'model'"),
            ("evaluation: {attack: []}", "'evaluation.attack'; did you mean 'evaluation.attacks'"),
            ("1: 2", "unknown recipe key in .* '1'"),
        ],
    )
    def test_unknown_keys_in_yaml_name_the_nearest(self, write, text, message):
        with pytest.raises(ValueError, match=message):
            Recipe.load(write(text))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--sede=1"], "unknown recipe key 'sede'; did you mean 'seed'"),
            (["--optim.epoch=5"], "unknown recipe key 'optim.epoch'; did you mean 'optim.epochs'"),
            (["--optim.epoch", "5"], "did you mean 'optim.epochs'"),
            (["--seed=1", "--modle.name=x"], "did you mean 'model'"),
            (["--optim.lr.x=5"], "optim.lr"),
            (["--model={nmae: x}"], "'model.nmae'; did you mean 'model.name'"),
            (["stray"], "stray"),
            (["-x"], "-x"),
        ],
    )
    def test_unknown_flags_name_the_nearest(self, flags, message):
        with pytest.raises(ValueError, match=message):
            parse_arguments(flags)

    @pytest.mark.parametrize(
        "text",
        [
            "optim: {lr: fast}",
            "optim: {lr: 1/0}",
            "optim: {lr: true}",
            "optim: {lr: [0.1]}",
            "optim: {lr: nan}",
            "optim: {lr: .nan}",
            "optim: {lr: null}",
            "attack: {eps: .inf}",
            "attack: {eps: 8/255/2}",
            "attack: {eps: 8//255}",
            "optim: {epochs: 1.5}",
            "optim: {epochs: ten}",
            "optim: {schedule: linear}",
            "optim: 5",
            "optim: [epochs]",
            "model: {layer_args: [tau]}",
            "model: {layer_args: {fsr: 3}}",
            "model: {at: 1.5}",
            "data: {flip: perhaps}",
            "mixed_precision: fp8",
            "seed: [1]",
            "evaluation: {attacks: pgd20}",
        ],
    )
    def test_values_of_another_type_name_the_key(self, write, text):
        key = re.findall(r"\w+", text)[1 if "{" in text else 0]
        with pytest.raises(ValueError, match=key) as caught:
            Recipe.load(write(text)).check()
        assert "\n" not in str(caught.value)

    def test_the_same_goes_for_flags(self):
        for flag in ("--optim.lr=fast", "--optim.epochs=1.5", "--overwrite=perhaps", "--optim.schedule=linear"):
            key = flag[2:].partition("=")[0]
            with pytest.raises(ValueError, match=key) as caught:
                parse_arguments([flag])
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "holds no recipe; write keys and values"),
            ("- a\n- b\n", "holds no recipe"),
            ("just text", "holds no recipe"),
            ("seed: [1\n", "is no YAML"),
            ("seed: 1\n\tx: 2", "is no YAML"),
            ("a: !!python/object/apply:os.getcwd []", "is no YAML"),
        ],
    )
    def test_files_that_hold_no_recipe(self, write, text, message):
        with pytest.raises(ValueError, match=message) as caught:
            Recipe.load(write(text))
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_no_text(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00seed")
        with pytest.raises(ValueError, match=r"x\.yaml is no YAML"):
            Recipe.load(tmp_path / "x.yaml")

    @pytest.mark.parametrize("path", ["missing.yaml", "."])
    def test_a_file_that_is_not_there(self, tmp_path, path):
        with pytest.raises(FileNotFoundError, match=r"there is no recipe .*; give the path of a YAML file"):
            Recipe.load(tmp_path / path)
        with pytest.raises(FileNotFoundError, match="there is no recipe"):
            parse_arguments([f"--config={tmp_path / path}"])

    @pytest.mark.parametrize("value", ["fast", "", "1/0", "nan", "inf", "-inf", True, None, [], float("nan")])
    def test_what_is_no_number(self, value):
        with pytest.raises(ValueError, match=r"is no number; write 0\.03, 1e-3 or 8/255"):
            parse_number(value)
