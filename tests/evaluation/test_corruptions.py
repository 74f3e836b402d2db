"""Common corruptions: repeatable whatever the batches, in range, and counted like by hand.

Most tests put a small library in the place of imagecorruptions; the last class takes the real one if it is installed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support.tiny import images, labels, tiny_resnet
from torch import Tensor, nn

from timm_fsr.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    corruption_accuracy,
)
from timm_fsr.models.pixel import PixelModel


def noisy(image: Any, severity: int, corruption_name: str, seed: int | None = None) -> Any:
    """Noise from where imagecorruptions draws it; refuses what it refuses."""
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert min(image.shape[:2]) >= 32
    assert (seed is not None) == (corruption_name in ("impulse_noise", "glass_blur"))
    noise = np.random.default_rng(seed) if seed is not None else np.random
    return np.uint8(np.clip(image + severity * 8 * noise.normal(size=image.shape), 0, 255))


def darken(image: Any, severity: int, corruption_name: str, seed: int | None = None) -> Any:
    """Darker by 51 levels, 0.2, per severity; frost does nothing."""
    step = 0 if corruption_name == "frost" else 51 * severity
    return np.uint8(np.maximum(image.astype(int) - step, 0))


def invert(image: Any, severity: int, corruption_name: str, seed: int | None = None) -> Any:
    return 255 - image


def fake_library(function: Callable[..., Any]) -> Any:
    def glass_blur(x: Any, severity: int = 1, seed: int | None = None) -> None: ...

    return SimpleNamespace(corrupt=function, corruptions=SimpleNamespace(glass_blur=glass_blur))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Installs the library whose `corrupt` is the function given; to begin with, the noisy one."""

    def install(function: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, "imagecorruptions", fake_library(function))

    install(noisy)
    return install


def random_images(channels: int = 3, height: int = 32, width: int = 32, count: int = 4) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(3))


class TestRandomness:
    @pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur"])
    def test_batches_and_processes_change_nothing(self, library, name):
        given = images(5)
        whole = corrupt(given, name, 3, seed=1)
        for size in (1, 2, 4):
            parts = [
                corrupt(part, name, 3, seed=1, first_index=start * size)
                for start, part in reversed(list(enumerate(given.split(size))))
            ]
            assert torch.equal(torch.cat(parts[::-1]), whole)

    def test_it_depends_on_seed_name_severity_and_position(self, library):
        given = images(1)
        results = [
            corrupt(given, "gaussian_noise", 3, seed=1),
            corrupt(given, "gaussian_noise", 3, seed=2),
            corrupt(given, "gaussian_noise", 3, seed=1, first_index=1),
            corrupt(given, "shot_noise", 3, seed=1),
            corrupt(given, "impulse_noise", 3, seed=1),
            corrupt(given, "impulse_noise", 3, seed=2),
        ]
        assert len({result.numpy().tobytes() for result in results}) == len(results)
        quieter = corrupt(given, "gaussian_noise", 2, seed=1)
        draws = [(part - given) / scale for part, scale in ((results[0], 3), (quieter, 2))]
        assert not torch.allclose(*draws, atol=0.01)

    @pytest.mark.parametrize("broken", [False, True], ids=["done", "failed"])
    def test_the_global_states_are_left_as_they_were(self, library, broken):
        def fail(*args: Any, **kwargs: Any) -> None:
            np.random.rand()
            raise RuntimeError

        if broken:
            library(fail)
        np.random.seed(1)
        states = [np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()]
        try:
            corrupt(images(), "gaussian_noise", 3, seed=1)
        except RuntimeError:
            assert broken
        assert [np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()] == states


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (5, 40), (28, 28), (31, 32), (33, 47)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_size_keeps_its_place(self, library, channels, size):
        """With an inversion for a corruption each pixel must come back from where it was."""
        library(invert)
        given = (random_images(channels, *size) * 255).round() / 255
        torch.testing.assert_close(corrupt(given, "contrast", 1, seed=0), 1 - given)

    def test_small_images_are_padded_by_reflection(self, library):
        seen: list[Any] = []

        def note(image: Any, **kwargs: Any) -> Any:
            seen.append(image)
            return image

        library(note)
        corrupt(torch.arange(30).div(255).expand(1, 3, 30, 30), "fog", 1, seed=0)
        assert seen[0].shape == (32, 32, 3)
        assert seen[0][5, :, 0].tolist() == [1, *range(30), 28]

    def test_grey_is_one_of_three_channels(self, library):
        given = random_images(1)
        three = corrupt(given.expand(-1, 3, -1, -1), "gaussian_noise", 2, seed=4)
        torch.testing.assert_close(corrupt(given, "gaussian_noise", 2, seed=4), three[:, :1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_shape_type_and_range_stay(self, library, dtype):
        for channels in (1, 3):
            given = random_images(channels).to(dtype)
            result = corrupt(given, "gaussian_noise", 5, seed=0)
            assert (result.shape, result.dtype, result.device) == (given.shape, dtype, given.device)
            assert result.min() >= 0
            assert result.max() <= 1
            assert result.is_contiguous()

    def test_the_given_images_are_not_touched(self, library):
        given = images().requires_grad_(True)
        before = given.detach().clone()
        assert not corrupt(given, "gaussian_noise", 5, seed=0).requires_grad
        assert torch.equal(given.detach(), before)

    @pytest.mark.parametrize(
        ("given", "name", "severity", "message"),
        [
            (images(), "gausian_noise", 1, "unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"),
            (images(), "spatter", 1, "unknown corruption 'spatter'"),
            (images(), "fog", 0, "severity=0 does not exist; use 1"),
            (images(), "fog", 6, "severity=6"),
            (images() * 255, "fog", 1, r"must lie in \[0, 1\]"),
            (images()[:, :2], "fog", 1, "2 channels"),
            (images()[0], "fog", 1, "batch"),
        ],
    )
    def test_refusals(self, library, given, name, severity, message):
        with pytest.raises(ValueError, match=message):
            corrupt(given, name, severity, seed=0)


class TestInstallation:
    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "imagecorruptions", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "timm-fsr\[corruptions\]"'):
            corrupt(images(), "fog", 1, seed=0)

    def test_a_package_that_does_not_import_says_why(self, monkeypatch, tmp_path: Path):
        """As the older package does, which needs pkg_resources."""
        (tmp_path / "imagecorruptions.py").write_text("import no_such_package\n")
        monkeypatch.delitem(sys.modules, "imagecorruptions", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match=r"No module named 'no_such_package'.*uninstall it.*timm-fsr\[corrup"):
            corrupt(images(), "fog", 1, seed=0)

    def test_a_package_without_seeds_is_refused(self, monkeypatch):
        older = fake_library(noisy)
        older.corruptions.glass_blur = lambda x, severity=1: x
        monkeypatch.setitem(sys.modules, "imagecorruptions", older)
        with pytest.raises(ImportError, match="takes no seed"):
            corruption_accuracy(tiny_resnet(), (images(), labels()))


class Brightness(nn.Module):
    """Two classes, dark (0) and bright (1), told apart by the mean pixel: 0.5 is the border."""

    def forward(self, given: Tensor) -> Tensor:
        excess = given.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-excess, excess], dim=1)


class TestAccuracy:
    LEVELS = torch.tensor([0.2, 0.6, 0.8, 1.0]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    CLASSES = torch.tensor([0, 1, 1, 1])

    def test_it_is_what_one_counts_by_hand(self, library):
        """Severities 1 to 3 take 0.2, 0.4 and 0.6 away; frost takes nothing."""
        library(darken)
        found = corruption_accuracy(
            Brightness(), (self.LEVELS, self.CLASSES), names=("fog", "frost"), severities=(1, 2, 3)
        )
        assert found == {"fog": {1: 3 / 4, 2: 2 / 4, 3: 1 / 4}, "frost": {1: 1.0, 2: 1.0, 3: 1.0}}

    def test_all_kinds_and_severities_are_the_default(self, library):
        found = corruption_accuracy(Brightness(), (self.LEVELS, self.CLASSES))
        assert tuple(found) == CORRUPTIONS
        assert all(tuple(by_severity) == SEVERITIES for by_severity in found.values())

    def test_positions_go_on_over_batches(self, library, monkeypatch):
        seen: list[bytes] = []

        class Note(Brightness):
            def forward(self, given: Tensor) -> Tensor:
                seen.extend(image.numpy().tobytes() for image in given)
                return super().forward(given)

        pair = (self.LEVELS, self.CLASSES)
        parts = list(zip(self.LEVELS.split(3), self.CLASSES.split(3), strict=True))
        counts: list[tuple[int, int]] = []
        runs = []
        for data in (pair, iter(parts)):
            seen.clear()
            corruption_accuracy(Note(), data, names=("fog",), severities=(2,), progress=lambda *c: counts.append(c))
            runs.append(list(seen))
        monkeypatch.setattr("timm_fsr.evaluation.inference.BATCH_SIZE", 1)
        seen.clear()
        corruption_accuracy(Note(), pair, names=("fog",), severities=(2,))
        assert runs[0] == runs[1] == seen
        assert [done for done, _ in counts] == [4, 3, 4]

    def test_progress_counts_images_right_under_all(self, library):
        library(darken)
        seen: list[tuple[int, int]] = []
        corruption_accuracy(
            Brightness(),
            [(self.LEVELS, self.CLASSES)] * 2,
            names=("fog", "frost"),
            severities=(1, 2),
            progress=lambda *counts: seen.append(counts),
        )
        assert seen == [(4, 2), (8, 4)]

    def test_a_timm_model_gets_its_normalisation_and_its_modes_back(self, library):
        library(darken)
        model = timm.create_model("test_resnet", num_classes=10)
        with torch.no_grad():
            given = (images() * 255).round() / 255
            classes = PixelModel(model.eval())(given).argmax(1)
        model.train()
        model.bn1.eval()
        modes = [module.training for module in model.modules()]
        for each in (model, PixelModel(model)):
            assert corruption_accuracy(each, (given, classes), names=("frost",), severities=(1,)) == {"frost": {1: 1.0}}
        with pytest.raises(ValueError, match="labels run"):
            corruption_accuracy(model, (given, classes + 100), names=("frost",))
        assert [module.training for module in model.modules()] == modes

    @pytest.mark.parametrize(
        ("data", "arguments", "message"),
        [
            ([], {}, "no image to corrupt"),
            ((images(), labels(3)), {}, "4 images have 3 labels"),
            ((images(), labels()), {"names": ["fogg"]}, "did you mean 'fog'"),
            ((images(), labels()), {"severities": [7]}, "severity=7"),
            ((images() * 2, labels()), {}, r"must lie in \[0, 1\]"),
        ],
    )
    def test_refusals(self, library, data, arguments, message):
        with pytest.raises(ValueError, match=message):
            corruption_accuracy(tiny_resnet(), data, **arguments)

    def test_logits_that_are_no_numbers(self, library):
        model = tiny_resnet()
        with torch.no_grad():
            model.fc.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN or infinite logits for corrupted"):
            corruption_accuracy(model, (images(), labels()), names=("fog",), severities=(1,))


class TestRealLibrary:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("imagecorruptions", exc_type=ImportError)

    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_each_kind_is_repeatable_and_changes_the_image(self, name):
        for channels, size in ((3, 32), (1, 28)):
            given = random_images(channels, size, size, count=2)
            first = corrupt(given, name, 4, seed=5)
            torch.rand(3)
            np.random.rand()
            alone = corrupt(given[1:], name, 4, seed=5, first_index=1)
            assert torch.equal(first[1:], alone)
            assert first.shape == given.shape
            assert first.min() >= 0
            assert first.max() <= 1
            assert (first - given).abs().mean() > 0.01

    @pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "snow"])
    def test_seeds_matter_where_something_is_random(self, name):
        given = random_images(count=1)
        assert not torch.equal(corrupt(given, name, 3, seed=0), corrupt(given, name, 3, seed=1))

    def test_severities_are_those_of_imagenet_c(self):
        """gaussian_noise has standard deviations .08 to .38 there, .04 to .10 in CIFAR-10-C."""
        given = torch.full((1, 3, 128, 128), 128 / 255)
        for severity, scale in ((1, 0.08), (3, 0.18)):
            noise = corrupt(given, "gaussian_noise", severity, seed=0) - given
            assert float(noise.std()) == pytest.approx(scale, rel=0.03)

    def test_images_need_not_be_square(self):
        given = random_images(3, 20, 48, count=1)
        for name in CORRUPTIONS:
            assert corrupt(given, name, 1, seed=0).shape == given.shape
