"""What is done when another package is imported: at once, or when it is, and once."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from timm_fsr.utils.imports import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is not imported yet, and is forgotten afterwards."""
    (tmp_path / "a_host_package.py").write_text("READY = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "a_host_package"
    sys.modules.pop("a_host_package", None)


def test_the_action_follows_the_import_and_happens_once(package):
    seen: list[bool] = []
    when_imported(package, lambda: seen.append(sys.modules[package].READY))
    assert importlib.util.find_spec(package) is not None
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [True]
    importlib.reload(module)
    assert seen == [True]


def test_a_package_that_is_there_already(package):
    importlib.import_module(package)
    seen: list[int] = []
    when_imported(package, lambda: seen.append(1))
    assert seen == [1]


def test_an_error_of_the_action_is_that_of_the_import(package):
    def refuse() -> None:
        raise ValueError("no")

    when_imported(package, refuse)
    with pytest.raises(ValueError, match="no"):
        importlib.import_module(package)


CHECK = """
import sys
import timm_fsr
assert "torch" not in sys.modules, "importing timm_fsr imports torch"
{first}
import timm
assert timm.is_model("resnet50_fsr"), "the variants are not registered"
assert timm.is_model("resnet_tiny_cifar_fsr.at_fashion_mnist".split(".")[0])
assert set(timm_fsr.__all__) == {{name for name in dir(timm_fsr) if getattr(timm_fsr, name, None) is not None}}
"""


@pytest.mark.parametrize(
    "first", ["", "from timm_fsr.hooks.attach import attach", "import timm_fsr.training.trainer", "timm_fsr.FSR(8, 2)"]
)
def test_whatever_is_imported_first_timm_has_the_variants(first):
    subprocess.run([sys.executable, "-c", CHECK.format(first=first)], check=True)
