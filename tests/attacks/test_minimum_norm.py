"""FMN and DDN: the distance to a plane, what foolbox finds, and what happens where nothing can be found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timm_fsr.attacks.base import attack_mode, judged_loss
from timm_fsr.attacks.losses import margin
from timm_fsr.attacks.minimum_norm import DDN, FMN, Nearest, _project_l1, distances, farthest

ATTACKS = [FMN(norm="linf"), FMN(norm="l2"), FMN(norm="l1"), DDN()]
DUALS = {"linf": 1, "l2": 2, "l1": float("inf")}


class Plane(nn.Module):
    """Two classes on either side of a plane through images (N, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 16) + 0.05)

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight - 0.5 * self.weight.sum()
        return torch.stack([-score, score], dim=1)


def grey_images(shift: float = 0.02) -> tuple[Tensor, Tensor]:
    """Images close to the plane in the middle of [0, 1], so that no pixel meets its ends."""
    noise = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    images = 0.5 + shift * noise + 0.03
    with torch.no_grad():
        return images, Plane()(images).argmax(1)


def nearest(attack: FMN | DDN, model: nn.Module, images: Tensor, labels: Tensor) -> Nearest:
    with attack_mode(model):
        return attack.nearest(judged_loss(model, type(attack).model_loss, labels), images)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_the_distance_to_a_plane_is_the_margin_over_the_dual_norm(attack):
    model, (images, labels) = Plane(), grey_images()
    found = nearest(attack, model, images, labels)
    with torch.no_grad():
        score = model(images)[:, 1].abs()
        assert bool((model(found.images).argmax(1) != labels).all())
    exact = score / model.weight.norm(p=DUALS[attack.norm])
    assert bool((found.distances >= exact * (1 - 1e-4)).all()), "nothing is nearer than the plane"
    torch.testing.assert_close(found.distances, exact.detach(), rtol=0.03, atol=0)
    torch.testing.assert_close(found.distances, distances(found.images, images, attack.norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
class TestEdges:
    def test_what_is_misclassified_already_has_distance_0(self, attack):
        images, labels = grey_images()
        found = nearest(attack, Plane(), images, 1 - labels)
        assert found.distances.tolist() == [0] * 6
        assert torch.equal(found.images, images)

    def test_where_nothing_is_found_the_distance_is_infinite_and_the_image_itself_returned(self, attack):
        images, _ = grey_images()

        def always_right(given: Tensor) -> Tensor:
            return -1 - given.flatten(1).square().sum(dim=1)

        found = attack.nearest(always_right, images)
        assert bool(found.distances.isinf().all())
        assert torch.equal(found.images, images)

    def test_pixels_stay_in_their_range(self, attack):
        images, labels = grey_images()
        images = torch.where(images > 0.54, torch.ones_like(images), torch.zeros_like(images))
        with torch.no_grad():
            labels = Plane()(images).argmax(1)
        found = nearest(attack, Plane(), images, labels)
        assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
        assert bool((found.distances <= farthest(images, attack.norm) * (1 + 1e-5)).all())

    def test_a_gradient_that_is_not_finite_gives_nan_and_no_success(self, attack):
        images, _ = grey_images()

        def broken(given: Tensor) -> Tensor:
            scale = torch.ones(6).index_fill(0, torch.tensor([2]), torch.nan)
            return given.flatten(1).sum(dim=1) * scale - 100

        found = attack.nearest(broken, images)
        assert found.distances.isnan().tolist() == [index == 2 for index in range(6)]
        assert bool(found.images[2].isnan().all())

    def test_mistakes(self, attack):
        images, _ = grey_images()
        with pytest.raises(ValueError, match="divide them by 255"):
            attack.nearest(lambda x: x.flatten(1).sum(1), 255 * images)
        with pytest.raises(ValueError, match="one loss per image"):
            attack.nearest(lambda x: x.sum(), images)
        with pytest.raises(ValueError, match="call the model on its argument"):
            attack.nearest(lambda x: torch.zeros(len(x)), images)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FMN(norm="l3"), "'linf', 'l2', 'l1'"),
        (lambda: FMN(steps=0), "at least 1"),
        (lambda: FMN(gamma=1.0), "between 0 and 1"),
        (lambda: FMN(step_size=0.0), "positive"),
        (lambda: DDN(first_eps=-1.0), "positive"),
        (lambda: DDN(steps=0), "at least 1"),
    ],
)
def test_numbers_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_projection_onto_the_l1_ball_is_the_nearest_point():
    """By its optimality condition: the way to the point has no positive product with any way into the ball."""
    rng = torch.Generator().manual_seed(0)
    delta = torch.randn(5, 1, 3, 3, generator=rng)
    eps = torch.tensor([0.5, 1.0, 2.0, 3.0, 100.0])
    found = _project_l1(delta, eps)
    size = found.flatten(1).abs().sum(1)
    torch.testing.assert_close(size[:4], eps[:4])
    assert torch.equal(found[4], delta[4]), "it lies in the ball already"
    corners = torch.cat([torch.eye(9), -torch.eye(9)])
    for index in range(4):
        way = (delta - found)[index].flatten()
        assert float(((eps[index] * corners - found[index].flatten()) @ way).max()) <= 1e-5


@pytest.mark.filterwarnings("ignore")  # of the library
class TestFoolbox:
    """The same steps by foolbox 3.3.4, with its own loss and projections."""

    @pytest.mark.parametrize("attack", ATTACKS, ids=repr)
    def test_the_distances_are_theirs(self, trained, batch, attack):
        foolbox = pytest.importorskip("foolbox")
        images, labels = (given[:25] for given in batch)
        kinds = {"linf": "LInfFMNAttack", "l2": "L2FMNAttack", "l1": "L1FMNAttack"}
        kind = "DDNAttack" if isinstance(attack, DDN) else kinds[attack.norm]
        theirs = getattr(foolbox.attacks, kind)(steps=attack.steps).run(
            foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu"), images, labels
        )
        found = nearest(attack, trained, images, labels)
        with torch.no_grad():
            assert bool((trained(found.images).argmax(1) != labels).all())
            ended = trained(theirs).argmax(1) != labels  # theirs may end in a ball that is too small
        assert int(ended.sum()) >= 15
        expected = distances(theirs, images, attack.norm)
        if (kind, attack.norm) == ("L2FMNAttack", "l2"):
            # Its projection divides a norm by itself and so does nothing: without the ball it stays farther away.
            assert bool((found.distances <= expected * 1.02).all())
            assert float(found.distances.mean()) < 0.9 * float(expected.mean())
            return
        torch.testing.assert_close(found.distances[ended], expected[ended], rtol=0.01, atol=0)


def test_they_agree_with_each_other_in_l2(trained, batch):
    images, labels = (given[:30] for given in batch)
    fmn, ddn = (nearest(attack, trained, images, labels).distances for attack in (FMN(norm="l2"), DDN()))
    assert 0.9 < float(fmn.median() / ddn.median()) < 1.1


def test_a_margin_alone_decides_by_its_sign(trained, batch):
    images, labels = (given[:20] for given in batch)
    alone = FMN().nearest(lambda x: margin(trained(x), labels), images)
    torch.testing.assert_close(alone.distances, nearest(FMN(), trained, images, labels).distances)
