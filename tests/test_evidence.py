"""Evidence of honest gradients: a sound model gives none to doubt it, and a masked one is found out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr.evidence
from timm_fsr.evidence import gather_evidence

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
    monkeypatch.setattr(timm_fsr.evidence, "EPS_FACTORS", (0.0, 1.0))
    monkeypatch.setattr(timm_fsr.evidence, "Component", lambda *_: lambda model, images, labels, classes: images)


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
            "% that white-box attacks missed: suspect masking",
            "100.0 % of the images have a gradient of exactly zero",
        ):
            assert doubt in doubts
        assert masked["square"]["broken_by_square_only"] > 0.05

    def test_a_random_model_is_not_repeatable(self):
        found = gather(Jittered().eval())
        assert found["repeatable"]["logits"] is False
        assert "not repeatable" in texts(found, "warning")


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
