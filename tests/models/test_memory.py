"""The memory that a model is said to need, from below and without computing anything."""

from __future__ import annotations

import timm
import torch
from support.tiny import images, same_state, state, tiny_resnet, tiny_vit, with_fsr
from torch import nn

from timm_fsr.models.memory import activation_bytes, weight_bytes
from timm_fsr.models.pixel import PixelModel


def test_weights_are_counted_with_their_buffers():
    assert weight_bytes(nn.BatchNorm2d(3)) == 4 * 3 * 4 + 8
    with torch.device("meta"):
        assert weight_bytes(nn.Linear(10**6, 10**6)) == 4 * (10**12 + 10**6)


def test_feature_maps_of_modules_that_keep_theirs_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 2))
    maps, logits = 5 * 36, 2
    assert activation_bytes(model, (7, 3, 8, 8)) == 7 * 4 * (2 * maps + logits)
    assert activation_bytes(model, (7, 3, 8, 8), gradients=False) == 7 * 4 * maps
    assert activation_bytes(model, (7, 1, 8, 8)) == 0, "a model that does not run says nothing"


def test_it_is_no_more_than_what_autograd_keeps():
    """Measured by the tensors that autograd saves: an estimate above them would refuse what fits."""
    for model in (with_fsr(tiny_resnet()), with_fsr(tiny_vit()), timm.create_model("test_convnext")):
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        given = images() if not hasattr(model, "stages") else torch.rand(4, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model.train()(given)
        assert 0 < activation_bytes(model, tuple(given.shape)) < 1.05 * sum(saved.values())
        assert logits.requires_grad


def test_the_model_is_left_as_it_was():
    model = with_fsr(tiny_resnet())
    before, modes = state(model), [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    assert activation_bytes(PixelModel(model), (4, 3, 32, 32)) > 0
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
