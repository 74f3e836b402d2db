"""A small trained network and the images that attacks are compared on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_fsr


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network, trained by one-step attacks until about half of the images withstand stronger ones."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(144, 10))
    images, labels = next(timm_fsr.load_data("fashion_mnist", "train", limit=2000).batches(2000))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(200):
        chosen = torch.randint(len(images), (100,), generator=torch.Generator().manual_seed(step))
        given, truth = images[chosen], labels[chosen]
        noisy = (given + torch.empty_like(given).uniform_(-0.05, 0.05)).clamp(0, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(noisy), truth), noisy)
        attacked = (given + (noisy.detach() - given + 0.06 * gradient.sign()).clamp(-0.06, 0.06)).clamp(0, 1)
        loss = F.cross_entropy(model(attacked), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def batch(trained) -> tuple[Tensor, Tensor]:
    """150 test images that the network is right about."""
    images, labels = next(timm_fsr.load_data("fashion_mnist", "test", limit=300).batches(300))
    with torch.no_grad():
        right = trained(images).argmax(1) == labels
    assert int(right.sum()) >= 150
    return images[right][:150], labels[right][:150]
