"""The registry: names from the package, from installed plug-ins and from the user's own files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import timm_fsr
from timm_fsr.attacks.base import ATTACKS
from timm_fsr.evaluation.registry import SUITES, register_suite
from timm_fsr.utils import registry
from timm_fsr.utils.registry import import_extension, split_imports


def attack(**attributes: Any) -> type:
    """A dataclass that is an attack, but for `attributes`, of which None takes one away."""

    @dataclass(frozen=True, kw_only=True)
    class Own:
        name: ClassVar[str] = "own"
        eps: float = 0.1

        def with_eps(self, eps: float) -> Any:
            return Own(eps=eps)

        def __call__(self, loss_fn: Any, images: Any, *, generator: Any = None) -> Any:
            return images

    for key, value in attributes.items():
        if value is None:
            delattr(Own, key)
        else:
            setattr(Own, key, value)
    return Own


class TestAttacks:
    @pytest.mark.parametrize("name", ["adaptive", "standard", "official", "autoattack", "apgd-ce", "square"])
    def test_a_name_that_evaluations_know_is_refused(self, name):
        with pytest.raises(ValueError, match=r"already means something|is an identifier"):
            timm_fsr.register_attack(attack(name=name))
        assert name not in ATTACKS

    @pytest.mark.parametrize("name", ["pgd20", "own1", "pgd20x5"])
    def test_a_name_that_ends_in_a_number_is_refused(self, name):
        with pytest.raises(ValueError, match="a number at the end is that of its steps"):
            timm_fsr.register_attack(attack(name=name))
        assert name not in ATTACKS

    def test_what_is_no_attack_is_refused(self):
        class Plain:
            name = "own"

        @dataclass(frozen=True)
        class WithoutEps:
            name: ClassVar[str] = "own"
            steps: int = 3

        @dataclass(frozen=True)
        class Required:
            name: ClassVar[str] = "own"
            steps: int
            eps: float = 0.1

        for cls, message in (
            (Plain, "is no dataclass"),
            (WithoutEps, "has no field `eps`, so no threat model could bind it"),
            (Required, "has no default for 'steps'"),
            (attack(with_eps=None), "needs the methods"),
        ):
            with pytest.raises(ValueError, match=message):
                timm_fsr.register_attack(cls)
        assert "own" not in ATTACKS


@pytest.mark.parametrize("name", ["pgd", "pgd20", "cw20", "standard"])
def test_a_suite_cannot_take_an_attacks_name(name):
    with pytest.raises(ValueError, match="already means something"):
        register_suite(name, check=lambda norm, eps: None)(lambda target: [])
    assert name not in SUITES


@pytest.mark.parametrize("cls", [type("No", (), {"name": "no"}), type("No", (timm_fsr.Objective,), {"name": "no"})])
def test_what_is_no_objective_is_refused(cls):
    with pytest.raises(ValueError, match=r"derive from timm_fsr.Objective and be a dataclass"):
        timm_fsr.register_objective(cls)


class TestFiles:
    def test_files_of_like_names_are_two(self, tmp_path):
        for name in ("a-b", "a_b"):
            (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}\n")
        found = [import_extension(str(tmp_path / f"{name}.py")).NAME for name in ("a-b", "a_b")]
        assert found == ["a-b", "a_b"]

    def test_a_file_is_run_once(self, tmp_path):
        (tmp_path / "counts.py").write_text("import timm_fsr\ntimm_fsr.COUNT = getattr(timm_fsr, 'COUNT', 0) + 1\n")
        try:
            for path in (tmp_path / "counts.py", tmp_path / "." / "counts.py"):
                import_extension(str(path))
            assert timm_fsr.COUNT == 1
        finally:
            del timm_fsr.COUNT

    def test_code_that_exits_is_an_error_and_is_run_again(self, tmp_path):
        path = tmp_path / "exits.py"
        path.write_text("raise SystemExit(0)\n")
        for _ in range(2):
            with pytest.raises(ValueError, match="cannot be imported: SystemExit"):
                import_extension(str(path))

    def test_a_module_in_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "beside_me.py").write_text("HERE = True\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
        assert import_extension("beside_me").HERE
        del sys.modules["beside_me"]

    def test_a_name_taken_twice_names_both_places(self, tmp_path):
        code = "import timm_fsr\n\n\n@timm_fsr.register_layer\nclass Twice(timm_fsr.FeatureLayer):\n    name = 'fsr'\n"
        (tmp_path / "twice.py").write_text(code)
        with pytest.raises(ValueError, match=r"^the feature layer name 'fsr' is taken by FSR in timm_fsr.layers.fsr; "):
            import_extension(str(tmp_path / "twice.py"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--import", "x.py", "--b=1", "--import=y"], (["x.py", "y"], ["a", "--b=1"])),
        (["--imports=[z]"], ([], ["--imports=[z]"])),
    ],
)
def test_arguments_are_split(arguments, expected):
    assert split_imports(arguments) == expected


@pytest.mark.parametrize("arguments", [["--import"], ["--import="], ["--import", "--limit=3"]])
def test_a_flag_without_a_value(arguments):
    with pytest.raises(ValueError, match="--import has no value; write --import FILE_OR_MODULE"):
        split_imports(arguments)


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import timm_fsr
from timm_fsr.evaluation.registry import register_suite


@timm_fsr.register_layer
class Pass(timm_fsr.FeatureLayer):
    name = "plugin_layer"
    def __init__(self, channels, num_classes, *, start=1.0):
        super().__init__()
        self.start = start
    def forward(self, feature, labels=None):
        return feature * 1.0, {}
"""
POINTS = """
[timm_fsr.layers]
plugin_layer = a_plugin
[timm_fsr.objectives]
broken = no_such_module_anywhere
"""
CHECK = """
import sys, warnings, timm, timm_fsr
assert "a_plugin" not in sys.modules, "importing timm_fsr imports no plug-in"
model = timm.create_model("resnet_tiny_cifar_plugin_layer")
assert "a_plugin" in sys.modules
timm_fsr.save_pretrained(model, "saved")
assert "plugin_layer" in timm_fsr.list_layers()
from timm_fsr.training.objectives import OBJECTIVES
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert "at" in OBJECTIVES.names()
assert "no_such_module_anywhere" in str(caught[0].message), caught
"""
RELOAD = """
import timm, timm_fsr
assert timm_fsr.from_pretrained("saved").plugin_layer["layer4"].start == 1.0
timm.create_model("local-dir:saved", pretrained=True)
"""


def test_an_entry_point_is_found_by_name_alone(tmp_path: Path) -> None:
    """As of an installed package: by timm, by loading a saved model, and in lists; a broken one is left out aloud."""
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    for name, script in (("check.py", CHECK), ("reload.py", RELOAD)):
        (tmp_path / name).write_text(script)
        done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_package_that_fails_halfway_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own: registry.Registry[Any] = registry.Registry("thing", package="no_such_package_anywhere", group="none")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            own.names()
