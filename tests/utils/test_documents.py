"""YAML and JSON that their formats allow and nobody means: refused in one sentence, at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from timm_fsr.hub.bundle import read_bundle
from timm_fsr.models.weights import read_config
from timm_fsr.reports.report import Report
from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.documents import DEEPEST, DocumentError, read_json, read_yaml

_TEN = ",".join("1" * 10)
BOMB = f"a0: &a0 [{_TEN}]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)  # 10^10 values
INLINE_BOMB = "{" + ", ".join(BOMB.splitlines()) + "}"

YAML = {
    "a key twice": ("seed: 1\nother: 2\nseed: 3\n", "the key 'seed' is there twice, again in line 3; keep one"),
    "a key twice within": ("optim: {lr: 0.1, lr: 0.2}\n", "the key 'lr' is there twice"),
    "a key twice in quotes": ("seed: 1\n'seed': 2\n", "the key 'seed' is there twice"),
    "exploding aliases": (BOMB, "aliases up to line . stand for more than 100,000 values"),
    "an alias of its own list": ("seed: &s [*s]\n", "the alias in line 1 refers to something that holds it"),
    "an alias of its own mapping": ("model: &m\n  args: {x: *m}\n", "the alias in line 2 refers to something"),
    "a mapping merged into itself": ("optim: &o {<<: *o}\n", "refers to something that holds it"),
    "5,000 brackets": ("seed: " + "[" * 5000, f"line 1 has more than {DEEPEST} lists and mappings inside each other"),
    "5,000 closed brackets": ("seed: " + "[" * 5000 + "]" * 5000, "inside each other"),
    "5,000 braces": ("{a: " * 5000, "inside each other"),
    "5,000 dashes": ("- " * 5000, "inside each other"),
}

JSON = {
    "a key twice": ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice; keep one"),
    "a key twice within": ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' is there twice"),
    "100,000 brackets": ("[" * 100_000, "too many lists and mappings inside each other"),
    "100,000 braces": ('{"a":' * 100_000, "too many lists and mappings inside each other"),
}


def refused(read: Callable[[], Any], message: str, kind: type[ValueError] = ValueError) -> None:
    """`read` raises an error of one sentence, soon."""
    started = time.perf_counter()
    with pytest.raises(kind, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - started < 10  # an alias bomb would take hours


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
class TestYaml:
    def test_the_reader(self, text, message):
        refused(lambda: read_yaml(text), message, DocumentError)

    def test_a_recipe_file(self, tmp_path, text, message):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        refused(lambda: Recipe.load(path), rf"recipe\.yaml cannot be read: .*{message}")

    def test_the_recipe_of_a_model_to_be_published(self, tmp_path, text, message):
        for name, content in (("config.json", "{}"), ("model.safetensors", ""), ("report.json", "{}")):
            (tmp_path / name).write_text(content)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        refused(lambda: read_bundle(tmp_path), rf"recipe\.yaml is damaged \(.*{message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a: 1, a: 2}", "the key 'a' is there twice"),
        (INLINE_BOMB, "stand for more than 100,000 values"),
        ("&a {x: *a}", "refers to something that holds it"),
        ("[" * 5000, "inside each other"),
    ],
)
def test_a_flag(value, message):
    refused(lambda: Recipe.load(overrides=[f"--model.args={value}"]), f"--model.args cannot be read: .*{message}")


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
class TestJson:
    def test_the_reader(self, text, message):
        refused(lambda: read_json(text), message, DocumentError)

    def test_the_configuration_of_a_model(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        refused(lambda: read_config(tmp_path), rf"config\.json is damaged \(.*{message}.*\); download or save")

    def test_a_report(self, tmp_path, text, message):
        (tmp_path / "report.json").write_text(text)
        refused(lambda: Report.load(tmp_path), rf"report\.json is damaged \(.*{message}.*\); evaluate the model again")


def test_what_yaml_allows_and_people_mean_is_read(tmp_path: Path):
    text = "optim: &plain {lr: 0.1, epochs: 3}\nother: {<<: *plain, lr: 0.2}\nlist: [*plain, *plain]\n1: x\n'1': y\n"
    plain = {"lr": 0.1, "epochs": 3}
    expected = {"optim": plain, "other": {"lr": 0.2, "epochs": 3}, "list": [plain, plain], 1: "x", "1": "y"}
    assert read_yaml(text) == expected
    assert read_yaml("") is None
    deep = DEEPEST - 2
    assert read_yaml("[" * deep + "1" + "]" * deep) == json.loads("[" * deep + "1" + "]" * deep)


@pytest.mark.parametrize(
    "text", ["{a: 1", "a: !!python/object/apply:os.getcwd []", "2020-13-45", "\0", "a: 1\n---\nb: 2"]
)
def test_what_is_no_yaml_is_another_error(text):
    with pytest.raises(ValueError, match=r".") as caught:
        read_yaml(text)
    assert not isinstance(caught.value, DocumentError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", '{"a": 1} x'])
def test_what_is_no_json_is_another_error(text):
    with pytest.raises(ValueError, match=r".") as caught:
        read_json(text)
    assert not isinstance(caught.value, DocumentError)
