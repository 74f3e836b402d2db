"""Pieces that several feature layers share: masks, auxiliary predictions, straight-through gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux

_WIDE = 10.0
"""Factor on tau of the surrogate "wide_tau"."""


def auxiliary_logits(aux: Aux, logits: Tensor) -> Tensor:
    """The `logits` (N, classes) among a layer's auxiliary outputs.

    Raises:
        ValueError: there are none, as the model has num_classes=0, or of another width than the model's `logits`.
    """
    found = aux.get("logits")
    if found is None:
        raise ValueError(
            "this feature layer has no auxiliary classifier because the model has num_classes=0; "
            "call model.reset_classifier(number_of_classes) before training"
        )
    if found.shape[1] != logits.shape[1]:
        raise ValueError(
            f"the model gives {logits.shape[1]} logits but the layer's auxiliary classifier {found.shape[1]}; "
            "change the number of classes with model.reset_classifier(), which resets both"
        )
    return found


def prediction_losses(logits: Tensor, labels: Tensor, clean: Tensor | None = None) -> Tensor:
    """Loss of auxiliary predictions under attack, one value per image (N,), for `FeatureLayer.attack_losses`.

    The cross-entropy of `logits` (N, classes), or their KL divergence from `clean` ones where these are given.
    """
    if clean is None:
        return F.cross_entropy(logits, labels, reduction="none")
    both = logits.log_softmax(dim=1), clean.log_softmax(dim=1)
    return F.kl_div(*both, reduction="none", log_target=True).sum(dim=1)


def with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, `surrogate` going backward."""
    return surrogate + (value - surrogate).detach()


def soft_mask(logits: Tensor, tau: float, surrogate: str | None = None) -> Tensor:
    """The mask sigmoid(logits / tau), with the gradient of the selected surrogate."""
    mask = torch.sigmoid(logits / tau)
    if surrogate == "wide_tau":
        return with_gradient_of(torch.sigmoid(logits / (_WIDE * tau)), mask)
    if surrogate == "straight_through":
        return with_gradient_of(logits, mask)
    return mask.detach() if surrogate == "detached_mask" else mask


def logistic_noise(like: Tensor) -> Tensor:
    """Standard logistic noise of `like`'s shape, dtype and device.

    It is the difference of two Gumbel variables, so one draw does what the paper's two do: the first entry of
    softmax([(log s + g1) / tau, (log(1 - s) + g2) / tau]) is sigmoid((logit(s) + g1 - g2) / tau).
    """
    uniform = torch.rand_like(like)
    tiny = torch.finfo(like.dtype).tiny
    return uniform.clamp_min(tiny).log() - (1 - uniform).clamp_min(torch.finfo(like.dtype).eps / 2).log()


def strongest_wrong_class(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row of `logits` (N, classes) the highest-scoring class that is not in `labels` (N,).

    Of mixed labels (N, classes) none that has a share is wrong; without any other, the result is class 0.
    """
    true_class = labels > 0 if labels.ndim == 2 else F.one_hot(labels, logits.shape[1]).bool()
    return logits.detach().masked_fill(true_class, float("-inf")).argmax(dim=1)


def wrong_class_loss(found: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `found` (N, classes) towards the strongest wrong class of the model's `logits`.

    Images in which every class has a share, as of two mixed ones, have no wrong class, and count as a loss of 0.
    """
    wrong = strongest_wrong_class(logits, labels)
    if labels.ndim == 1:
        return F.cross_entropy(found, wrong)
    return (F.cross_entropy(found, wrong, reduction="none") * (labels == 0).any(dim=1)).mean()


def three_convolutions(channels: int, hidden: int) -> nn.Sequential:
    """The shape of S and R: two convolution-BN-ReLU blocks of width `hidden`, and a convolution back to C."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
    )
