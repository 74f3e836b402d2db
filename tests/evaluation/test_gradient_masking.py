"""Evidence of honest gradients: a sound model gives none to doubt it, and a masked one is found out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.tiny import tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr.evaluation.gradient_masking
import timm_fsr.evaluation.suites.adaptive
from timm_fsr.evaluation.gradient_masking import Subject, gather_evidence

pytest.importorskip("pyautoattack")

EPS = 0.1
PARTS = {"eps", "steps", "restarts", "noise", "square", "surface", "zero_gradients", "repeatable"}


class Brightness(nn.Module):
    """Three classes by the mean pixel; its gradient tells the truth."""

    def forward(self, given: Tensor) -> Tensor:
        level = 10 * (given.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-level, level, -5 - level.abs()], dim=1)


class Rounded(Brightness):
    """The same on pixels rounded to steps of 1/50: no gradient, and no robustness."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward((given * 50).round() / 50)


class Jittered(Brightness):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given + 0.02 * torch.rand_like(given))


LEVELS = torch.linspace(0.12, 0.88, 12)
IMAGES = LEVELS.view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
LABELS = (LEVELS > 0.5).long()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For networks that take longer than the toys: few radii, and a Square that does nothing."""
    monkeypatch.setattr(timm_fsr.evaluation.gradient_masking, "EPS_FACTORS", (0.0, 1.0))
    monkeypatch.setattr(
        timm_fsr.evaluation.gradient_masking, "Component", lambda *_: lambda model, images, labels, classes: images
    )


def gather(model: nn.Module, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"eps": EPS, "steps": (2, 5, 10), "restarts": (1, 2)}
    return gather_evidence(model, IMAGES, LABELS, **{**arguments, **changes})


def texts(evidence: dict[str, Any], level: str) -> str:
    return "; ".join(finding["text"] for finding in evidence["findings"] if finding["level"] == level)


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    return gather(Brightness().eval())


@pytest.fixture(scope="module")
def masked() -> dict[str, Any]:
    return gather(Rounded().eval())


class TestSoundModel:
    def test_nothing_is_doubted(self, sound):
        assert texts(sound, "warning") == ""
        assert set(sound) == {*PARTS, "images", "findings"}

    def test_the_numbers_are_those_counted_by_hand(self, sound):
        """An attack moves the mean by eps: what is nearer to 0.5 than that is lost."""
        margin = (LEVELS - 0.5).abs()
        for eps, share in zip(sound["eps"]["eps"], sound["eps"]["accuracy"], strict=True):
            assert share == pytest.approx(float((margin > eps).float().mean()))
        robust = int((margin > EPS).sum()) / len(margin)
        assert sound["steps"]["accuracy"] == [robust] * 3
        assert sound["noise"]["clean"] == 1
        assert sound["noise"]["pgd"] == robust
        assert sound["noise"]["uniform"] >= sound["noise"]["corners"] >= robust
        assert sound["square"] == {"white_box": robust, "after_square": robust, "broken_by_square_only": 0}
        assert sound["zero_gradients"] == {"images": 0}
        assert sound["repeatable"] == {"logits": True, "attack": True}

    def test_the_surface_rises_along_the_gradient(self, sound):
        for found in sound["surface"]:
            grid = torch.tensor(found["margin"])
            assert grid.shape == (21, 21)
            assert bool((grid[1:] >= grid[:-1] - 1e-4).all())

    def test_it_is_plain_json(self, sound):
        assert json.loads(json.dumps(sound)) == sound


class TestMaskedModel:
    def test_it_is_found_out(self, masked):
        doubts = texts(masked, "warning")
        for doubt in (
            "does not reach 0 % accuracy even at eps 255/255",
            "Square broke 2 of 12 images (16.7 %) that every white-box attack of this evidence missed: suspect masking",
            "100.0 % of the images have a gradient of exactly zero",
        ):
            assert doubt in doubts
        assert masked["square"]["broken_by_square_only"] > 0.05

    def test_a_random_model_is_not_repeatable(self):
        found = gather(Jittered().eval())
        assert found["repeatable"]["logits"] is False
        assert "not repeatable" in texts(found, "warning")


@pytest.mark.parametrize(
    ("broken", "level", "follows"),
    [(0, "ok", ""), (1, "ok", ""), (3, "note", "a single run overstates"), (5, "warning", "a rugged loss surface")],
)
def test_restarts_that_help_are_not_called_fine(monkeypatch, broken, level, follows):
    """One image of 200 proves nothing; three are a figure to act upon, and five are masking."""
    flags = torch.arange(200) >= 0
    outcomes = iter([flags, torch.arange(200) >= broken])
    monkeypatch.setattr(Subject, "robust_to", lambda *_: next(outcomes))
    finding = timm_fsr.evaluation.gradient_masking._restarts_sweep(subject(), (1, 10))["findings"][0]
    assert finding["level"] == level
    assert follows in finding["text"]
    assert (f"{broken} of 200 images ({broken / 2:.1f} %) more" if broken else "no more images") in finding["text"]


class Rooted(Brightness):
    """A root of zero for images darker than a border: the same logits, and gradients of NaN."""

    def forward(self, given: Tensor) -> Tensor:
        level = given.mean(dim=(1, 2, 3))
        return (
            super().forward(given) + (torch.where(level < 0.3, 0 * level, torch.ones_like(level)).sqrt() - 1)[:, None]
        )


@pytest.mark.parametrize(("batch_size", "message"), [(12, "NaN or infinite for 3 of 12"), (1, "'eps 0.25' gave NaN")])
def test_gradients_that_are_no_numbers_are_named_as_the_fault(batch_size, message):
    order = torch.arange(11, -1, -1)  # dark ones last: the first batch does not show it
    with pytest.raises(ValueError, match=message):
        gather_evidence(Rooted().eval(), IMAGES[order], LABELS[order], eps=EPS, batch_size=batch_size)


def subject(count: int = 30) -> Subject:
    levels = torch.linspace(0.6, 0.9, count)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Subject(Brightness().eval(), images, torch.ones(count).long(), "linf", 0.01, 0, 250)


class TestSquare:
    """An attack that turns images black takes the place of Square."""

    @staticmethod
    def gap(broken: int, survivors: Tensor | None = None, count: int = 30) -> dict[str, Any]:
        def square(model: nn.Module, images: Tensor, labels: Tensor, classes: int) -> Tensor:
            images = images.clone()
            images[:broken] = 0
            return images

        withstood = torch.ones(count).bool() if survivors is None else survivors
        return timm_fsr.evaluation.gradient_masking._square_gap(subject(count), square, withstood)

    def test_what_any_white_box_attack_broke_is_not_squares(self):
        survivors = torch.arange(30) >= 5
        found = self.gap(0, survivors)
        assert (found["white_box"], found["after_square"]) == (25 / 30, 25 / 30)
        assert found["findings"][0]["level"] == "ok"

    @pytest.mark.parametrize(("broken", "count", "level"), [(1, 30, "ok"), (2, 30, "warning"), (2, 200, "note")])
    def test_one_image_proves_nothing(self, broken, count, level):
        (finding,) = self.gap(broken, count=count)["findings"]
        assert f"Square broke {broken} of {count} images ({100 * broken / count:.1f} %)" in finding["text"]
        assert finding["level"] == level

    def test_the_sweeps_tell_what_they_broke(self, monkeypatch):
        """Images that PGD's restarts broke in the same evidence were once called missed by white-box attacks."""
        flags = torch.arange(12) >= 7
        monkeypatch.setattr(
            timm_fsr.evaluation.gradient_masking, "_restarts_sweep", lambda *_: {"robust": flags.tolist()}
        )
        monkeypatch.setattr(
            timm_fsr.evaluation.gradient_masking, "_noise", lambda *_: {"robust": flags.flip(0).tolist()}
        )
        found = gather(Rounded().eval())
        assert found["square"]["white_box"] == 0
        assert "robust" not in found["eps"]


def test_no_negative_share_is_told(monkeypatch):
    """More steps may break fewer images by chance."""
    broken = iter([3, 2, 1])
    monkeypatch.setattr(Subject, "robust_to", lambda self, *_: torch.arange(30) >= next(broken))
    (finding,) = timm_fsr.evaluation.gradient_masking._steps_sweep(subject(), (10, 100, 1000))["findings"]
    assert finding == {"level": "ok", "text": "1000 PGD steps instead of 100 break no more images: converged"}


def test_parts_that_are_kept_are_not_gathered_again():
    kept: dict[str, Any] = {}

    def once(name: str, make: Any) -> Any:
        if name not in kept:
            kept[name] = make()
        return json.loads(json.dumps(kept[name]))

    first = gather(Brightness().eval(), once=once)
    assert set(kept) >= PARTS
    kept["noise"]["clean"] = 0.123
    kept.pop("square")
    again = gather(Brightness().eval(), once=once)
    assert again["noise"]["clean"] == 0.123
    assert again["square"] == first["square"]
    assert again["findings"] == first["findings"]


def test_the_defaults_are_strong():
    """1,000 steps and ten restarts; weaker ones would call masked gradients honest."""
    assert timm_fsr.evaluation.gradient_masking.STEPS == (10, 50, 100, 1000)
    assert timm_fsr.evaluation.gradient_masking.RESTARTS == (1, 5, 10)
    factors = timm_fsr.evaluation.gradient_masking.EPS_FACTORS
    assert (factors[0], factors[-1]) == (0.0, 64.0)
    assert factors[-1] * 8 / 255 > 1, "the sweep has to reach a grey image"
    assert timm_fsr.evaluation.suites.adaptive.STEPS == 100


class TestFeatureLayers:
    def test_masks_and_noise_are_looked_at(self, quick):
        model = with_fsr(tiny_resnet(in_chans=1)).eval()
        given = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            labels = model(given).argmax(1)
        found = gather_evidence(model, given, labels, eps=0.02, steps=(1, 2), restarts=(1, 2), batch_size=4)
        (masks,) = found["masks"]
        assert masks["site"] == "layer4"
        assert sum(masks["clean"]) == pytest.approx(1, abs=1e-4)
        assert sum(masks["attacked"]) == pytest.approx(1, abs=1e-4)
        assert 0 <= masks["saturated"] <= 1
        assert set(found["noise_on"]) == {"clean", "pgd_eot"}
        assert 0 <= found["zero_gradients"]["mask_elements"] <= 1
        assert "with the noise on" in texts(found, "note")


class TestManners:
    def test_modes_and_randomness_are_as_before(self, quick):
        model = with_fsr(tiny_resnet(in_chans=1)).train()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        given = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        announced: list[str] = []
        gather_evidence(
            model, given, torch.tensor([0, 1]), eps=0.01, steps=(1, 2), restarts=(1, 2), announce=announced.append
        )
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert announced[0] == "eps"
        assert len(announced) == 10

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"eps": -1}, "must be 0 or more"),
            ({"norm": "l0"}, "not part of AutoAttack"),
            ({"steps": (0,)}, "at least 1"),
        ],
    )
    def test_bad_input(self, changes, message):
        with pytest.raises(ValueError, match=message):
            gather(Brightness().eval(), **changes)
