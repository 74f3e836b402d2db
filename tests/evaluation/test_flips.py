"""The smallest eps: exact on a linear model, and found also behind layers that hide gradients."""

from __future__ import annotations

import pytest
import torch
from support.toys import grey, plain_toy, toy_layers_registered, wrapped
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode, judged_loss
from timm_fsr.attacks.losses import margin
from timm_fsr.attacks.minimum_norm import FMN, distances
from timm_fsr.evaluation.flips import attacks_in_words, smallest_flips


class Linear(nn.Module):
    """Three classes by linear scores of images (N, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, given: Tensor) -> Tensor:
        return (given - 0.5).flatten(1) @ self.weight.T


def near_the_middle() -> Tensor:
    return 0.5 + 0.04 * (torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)


@pytest.fixture
def brief(monkeypatch):
    """Fewer steps, which toys do not need."""
    monkeypatch.setattr("timm_fsr.evaluation.flips.STEPS", 20)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_model_flips_at_the_nearest_of_its_planes(norm, dual):
    model, given = Linear(), near_the_middle()
    with attack_mode(model):
        found = smallest_flips(model, given, norm=norm)
        logits = model(given)
        after = model(found.images).argmax(1)
    gaps = logits.gather(1, found.before[:, None]) - logits
    apart = (model.weight[found.before][:, None] - model.weight[None]).norm(p=dual, dim=2)
    exact = (gaps / apart).scatter(1, found.before[:, None], torch.inf).min(dim=1)
    assert torch.equal(found.before, logits.argmax(1))
    assert torch.equal(found.after, after)
    assert torch.equal(found.after, exact.indices)
    assert bool((found.eps >= exact.values * (1 - 1e-4)).all())
    torch.testing.assert_close(found.eps, exact.values, rtol=0.03, atol=0)
    torch.testing.assert_close(found.eps, distances(found.images, given, norm))


@pytest.mark.usefixtures("brief")
def test_what_hides_its_gradient_is_flipped_by_the_surrogate():
    """The layer rounds features, so that neither FMN nor Auto-PGD can follow the model itself."""
    with toy_layers_registered():
        model = wrapped("toy_rounding")
        given = grey(0.45, 0.55)
        with attack_mode(model):
            found = smallest_flips(model, given)
        assert attacks_in_words(model, "linf").endswith("the surrogates identity, bypass")
    assert found.after.tolist() == [1 - index for index in found.before.tolist()]
    torch.testing.assert_close(found.eps, torch.full((2,), 0.05), rtol=0.05, atol=0)


@pytest.mark.usefixtures("brief")
def test_a_model_that_never_changes_its_answer_has_no_such_eps():
    model = plain_toy(lambda d: 1 + 0 * d)
    with attack_mode(model):
        found = smallest_flips(model, grey(0.2, 0.8))
    assert found.eps.tolist() == [float("inf")] * 2
    assert torch.equal(found.images, grey(0.2, 0.8))
    assert torch.equal(found.before, found.after)


@pytest.mark.usefixtures("brief")
def test_it_repeats_and_leaves_the_random_numbers_of_others_alone():
    model, given = plain_toy(lambda d: d), torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with attack_mode(model):
        first = smallest_flips(model, given, seed=3)
        state = torch.get_rng_state()
        again = smallest_flips(model, given, seed=3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes():
    with pytest.raises(ValueError, match="'linf', 'l2'"):
        smallest_flips(Linear(), near_the_middle(), norm="l1")
    with pytest.raises(ValueError, match="returned probabilities"):
        smallest_flips(nn.Sequential(Linear(), nn.Softmax(dim=1)), near_the_middle())


@pytest.mark.usefixtures("brief")
def test_it_is_at_least_as_near_as_fmn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(1152, 5)
    )
    given = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with attack_mode(model):
        labels = model(given).argmax(1)
        fmn = FMN(steps=20).nearest(judged_loss(model, margin, labels), given)
        found = smallest_flips(model, given)
    assert bool((found.eps <= fmn.distances).all())
    assert bool((found.eps > 0).all())
