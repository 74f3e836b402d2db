"""Models that cannot be judged are refused in clear words; what makes results doubtful is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import images, labels, tiny_resnet, with_fsr
from torch import Tensor, nn

from timm_fsr.evaluation.model_checks import ModelCheck, check_model, examine


class Linear(nn.Module):
    """Logits from the mean of each channel."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, classes)

    def forward(self, given: Tensor) -> Any:
        return self.head(given.mean(dim=(2, 3)))


class Softmax(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given).softmax(dim=1)


class LogSoftmax(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given).log_softmax(dim=1)


class Pair(Linear):
    def forward(self, given: Tensor) -> Any:
        return super().forward(given), given


class Broken(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) * float("nan")


class Noisy(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given + 0.1 * torch.rand_like(given))


class Dynamic(Linear):
    def forward(self, given: Tensor) -> Tensor:
        with torch.enable_grad():
            point = given.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(super().forward(point).sum(), point)
        return super().forward(given + 0.01 * gradient)


class Rounded(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given.round())


class Rooted(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) + (given - given).square().sum(dim=(1, 2, 3)).sqrt()[:, None]


class Sigmoid(Linear):
    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given).sigmoid()


class Batched(Linear):
    """Normalises by the statistics of the batch in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(self.norm(given))


class Stubborn(Linear):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class TestExamine:
    def test_a_sound_model(self):
        sound = ModelCheck(10, random=False, dynamic=False, zero_gradients=0, looked_at=4)
        assert examine(Linear(), images(), labels()) == sound
        assert examine(Linear(), images(), labels()).notes() == []

    def test_log_probabilities_are_logits(self):
        assert examine(LogSoftmax(), images(), labels()).num_classes == 10

    def test_feature_layers_with_auxiliary_losses(self):
        assert examine(with_fsr(tiny_resnet()).eval(), images(), labels()).auxiliary
        assert not examine(tiny_resnet().eval(), images(), labels()).auxiliary

    @pytest.mark.parametrize(
        ("model", "field", "note"),
        [
            (Noisy(), "random", "random in eval mode"),
            (Dynamic(), "dynamic", "computes gradients in its forward pass"),
            (Sigmoid(), "bounded", "all logits lie in [0, 1], as probabilities do: if the model ends in a sigmoid"),
        ],
    )
    def test_doubts(self, model, field, note):
        found = examine(model.eval(), images(), labels())
        assert getattr(found, field)
        assert any(note in text for text in found.notes())

    def test_images_without_gradient_are_counted(self):
        found = examine(Rounded().eval(), images(), labels())
        assert found.zero_gradients == len(images())
        assert "4 of the first 4 images have a gradient of exactly zero" in found.notes()[0]

    def test_one_image_has_no_company(self):
        assert examine(Batched().eval(), images()[:1], labels()[:1]).num_classes == 10

    def test_a_step_on_the_edge_of_rounding_is_not_taken_for_company(self):
        """One image of three changes with the batch, as by the order of a sum."""

        class Edge(Linear):
            def forward(self, given: Tensor) -> Tensor:
                moved = torch.zeros(len(given), 1)
                moved[0] = float(not torch.equal(given[3], given[0]))
                return super().forward(given) + moved * torch.arange(10)

        assert examine(Edge().eval(), images(6), labels(6)).num_classes == 10

    def test_autograd_is_as_it_was(self):
        before = torch.autograd.grad, torch.autograd.backward
        examine(Dynamic().eval(), images(), labels())
        assert (torch.autograd.grad, torch.autograd.backward) == before

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Softmax(), "the model returned probabilities.*remove it"),
            (Pair(), "type tuple for 4 images; it must return logits"),
            (Broken(), "NaN or infinite logits for clean images"),
            (Rooted(), "NaN or infinite for 4 of 4 images.*call any model robust.*add a small constant"),
            (Batched(), r"depend on the other images of the batch.*track_running_stats=True"),
            (Linear(1), "1 class; there is nothing to confuse"),
            (Linear(2), r"labels run from 0 to 3, but the model has 2 classes"),
            (nn.Identity(), r"shape \(4, 3, 32, 32\)"),
        ],
    )
    def test_refusals(self, model, message):
        with pytest.raises(ValueError, match=message):
            examine(model.eval(), images(), labels())


class TestCheckModel:
    def test_half_precision_is_refused(self):
        with pytest.raises(ValueError, match=r"torch\.float16.*call model\.float\(\)"):
            check_model(Linear().eval().half())

    def test_a_model_that_will_not_leave_training_mode(self):
        with pytest.raises(ValueError, match="stays in training mode after"):
            check_model(nn.Sequential(Stubborn()).eval())

    def test_integer_buffers_are_fine(self):
        check_model(tiny_resnet().eval())
