"""The names that `import timm_fsr` offers."""

from __future__ import annotations

import timm_fsr


def test_dir_lists_the_public_names_and_nothing_else():
    assert dir(timm_fsr) == sorted(timm_fsr.__all__)
    assert [name for name in dir(timm_fsr) if name.startswith("_")] == ["__version__"]
    assert {"PGD", "FMN", "DDN", "attach", "predict", "train"} <= set(dir(timm_fsr))


def test_every_public_name_is_there():
    for name in dir(timm_fsr):
        assert getattr(timm_fsr, name) is not None
