"""Toy defences that hide their gradient, each in its own way, from models and feature layers set by hand.

Every toy sees the mean pixel of grey images and little else, so what an honest gradient would find is known: eps moves
the mean twice as far as the border is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import timm_fsr
from support.tiny import layers_registered
from timm_fsr.evaluation.suites.adaptive import JOINT_WEIGHTS
from timm_fsr.hooks.surrogates import feature_layers
from timm_fsr.layers import FSR, FeatureLayer
from timm_fsr.layers.base import Aux

EPS = 0.1
LEVELS = (0.45, 0.55, 0.45, 0.55, 0.45, 0.55)
CLASSES = 4
MASKS = ("wide_tau", "straight_through", "detached_mask")
DIRECT = ("apgd-ce", "apgd-dlr", "apgd-targeted")
JOINT = tuple(f"joint {weight:g}" for weight in JOINT_WEIGHTS)


def grey(*levels: float) -> Tensor:
    """One image per level, of that level everywhere."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).clone()


def data(levels: tuple[float, ...] = LEVELS) -> tuple[Tensor, Tensor]:
    """Grey images that are dark (0) or bright (1)."""
    return grey(*levels), torch.tensor([int(level > 0.5) for level in levels])


def brightness(images: Tensor) -> Tensor:
    """How far the mean pixel (N,) is above the border."""
    return images.mean(dim=(1, 2, 3)) - 0.5


def ones(images: Tensor) -> Tensor:
    """(N,), also where the places for a site are looked for on the meta device."""
    return torch.ones_like(images[:, 0, 0, 0])


def planes(*channels: Tensor) -> Tensor:
    """A feature map (N, C, 2, 2) whose channels are constant."""
    return torch.stack(channels, dim=1)[:, :, None, None].expand(-1, -1, 2, 2)


def decide(score: Tensor, classes: int = CLASSES) -> Tensor:
    """Logits of dark (0), bright (1) and classes that never win, from a score (N,) that is positive for bright."""
    return torch.stack([-score, score, *[torch.full_like(score, -1.0)] * (classes - 2)], dim=1)


def steps(value: Tensor, width: float = 0.1) -> Tensor:
    """`value` rounded to the middle of its step; its gradient is exactly zero."""
    return (value / width).floor() * width + width / 2


def sawtooth(value: Tensor, slope: float, tooth: float = 1e-3) -> Tensor:
    """A small wave in [0, slope * tooth] whose gradient is `slope` everywhere, though it leads nowhere."""
    return slope * value.remainder(tooth)


class Toy(nn.Module):
    """A body from images to a feature map and a head from there to logits, as timm's models have."""

    in_chans = 1

    def __init__(
        self, body: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], classes: int = CLASSES
    ) -> None:
        super().__init__()
        self.body, self.head = Function(body), Function(head)
        self.num_classes = classes
        self.pretrained_cfg = {"input_size": (1, 16, 16)}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, given: Tensor) -> Tensor:
        return self.function(given)


def channel(feature: Tensor, index: int = 0) -> Tensor:
    """The mean (N,) of a channel."""
    return feature[:, index].mean(dim=(1, 2))


def plain_toy(score: Callable[[Tensor], Tensor], classes: int = CLASSES) -> Toy:
    """A model without feature layer."""
    return Toy(lambda images: images, lambda images: decide(score(brightness(images)), classes), classes)


def honest() -> Toy:
    return plain_toy(lambda d: d)


class ToyLayer(FeatureLayer):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()


class Rounding(ToyLayer):
    """Features in coarse steps: no gradient comes through."""

    name = "toy_rounding"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        return steps(feature), {}


class Loud(ToyLayer):
    """Features so large that the head behind saturates."""

    name = "toy_loud"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        return feature * 1e4, {}


class Watching(ToyLayer):
    """Leaves features as they are, and has an auxiliary loss with the slope 1 that says what class they are of."""

    name = "toy_watching"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        return feature, {"seen": channel(feature)}

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"watching": ((1 - 2 * labels) * aux["seen"]).mean()}


class Wavering(ToyLayer):
    """Adds a wave whose gradient points the wrong way; while training, either way at random."""

    name = "toy_wavering"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        sign = 2 * torch.randint_like(feature, 2) - 1 if self.training else torch.full_like(feature, -1)
        return feature + sign * sawtooth(feature, 3), {}


class Detaching(Rounding):
    """As code that leaves torch does: there is not even a gradient of zero."""

    name = "toy_detaching"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        return steps(feature.detach()), {}


class Dropping(Rounding):
    """Random while training through a module of its own."""

    name = "toy_dropping"

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.dropout, self.norm = nn.Dropout(), nn.BatchNorm2d(channels)

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        return self.norm(self.dropout(feature)), {}


TOY_LAYERS = (Rounding, Loud, Watching, Wavering, Detaching, Dropping)


@contextmanager
def toy_layers_registered() -> Iterator[None]:
    """Within it the toy layers are known like any other."""
    with layers_registered(*TOY_LAYERS):
        yield


def with_set_fsr(toy: Toy, mask: list[list[float]], recalibration: list[float]) -> Toy:
    """`toy` with an FSR layer whose S is the matrix `mask` and whose R is constant, for features above zero.

    The auxiliary heads see nothing.
    """
    channels = len(mask)
    timm_fsr.attach(toy, at="body", layer_args={"hidden": channels})
    (layer,) = feature_layers(toy)
    assert isinstance(layer, FSR)
    nn.init.zeros_(layer.head.weight)
    eye = torch.eye(channels)
    set_centres(layer.separation, eye, eye, torch.tensor(mask))
    set_centres(layer.recalibration, eye, torch.zeros(channels, channels), torch.tensor(recalibration).diag())
    nn.init.ones_(layer.recalibration[4].bias)
    return toy


def set_centres(network: nn.Sequential, *centres: Tensor) -> None:
    """Let the three convolutions of S or R see single pixels."""
    for index, centre in zip((0, 3, 6), centres, strict=True):
        nn.init.zeros_(network[index].weight)
        with torch.no_grad():
            network[index].weight[:, :, 1, 1] = centre


def by_the_mask(logit: float, head: Callable[[Tensor], Tensor] = lambda out: out) -> Toy:
    """The image decides nothing but the mask m of a constant channel, which recalibration turns into 2 m - 1.

    The mask's logits over tau are -`logit` for dark and `logit` for bright images: a sigmoid has no float32 gradient
    beyond 104 below and 17 above.
    """
    toy = Toy(
        lambda images: planes(brightness(images) + 0.5, ones(images)),
        lambda out: decide(head(channel(out, 1))),
    )
    slope = logit / 0.05 * 0.1
    return with_set_fsr(toy, mask=[[0, 0], [slope, -0.5 * slope]], recalibration=[0, -2])


def misled_mask() -> Toy:
    """Beside the honest channel 0, the mask of channel 1 follows a wave (channel 2)."""

    def body(images: Tensor) -> Tensor:
        d = brightness(images)
        return planes(d + 0.5, ones(images), sawtooth(d, 1000))

    toy = Toy(body, lambda out: decide(channel(out) - 0.5 + 0.04 * channel(out, 1)))
    mask = [[0.0, 0, 0], [0, 0.05, -0.1], [0, 0, 0]]
    return with_set_fsr(toy, mask, recalibration=[0, -2, 0])


def misled_recalibration() -> Toy:
    """The mask sorts out channel 1, a wave, but the recalibrated part brings it back."""

    def body(images: Tensor) -> Tensor:
        d = brightness(images)
        return planes(d + 0.5, sawtooth(d, 1), ones(images))

    toy = Toy(body, lambda out: decide(channel(out) - 0.5 * channel(out, 2) - 3 * channel(out, 1)))
    mask = [[0, 0, 20], [0, 0, -20], [0, 0, 20]]
    return with_set_fsr(toy, mask, recalibration=[0, 0, 0])


def ripple() -> Toy:
    """Small steps end on the next crest; Auto-PGD begins with long ones."""
    return plain_toy(lambda d: d + 0.02 * torch.sin(2 * math.pi * d / 0.05))


def shouting(classes: int = CLASSES) -> Toy:
    """Logits so large that the softmax is 1 and the cross-entropy's gradient 0 in float32."""
    toy = plain_toy(lambda d: d, classes)
    toy.head = nn.Sequential(toy.head, Function(lambda logits: 1e6 * logits))
    return toy


def decoy() -> Toy:
    """Dark to 1: the best wrong class never wins; class 2 does, in the other direction."""

    def logits(images: Tensor) -> Tensor:
        t = brightness(images) / EPS
        return 20 * torch.stack([0 * t, -0.2 + 0.1 * t, -0.6 - 0.9 * t, 0 * t - 2], dim=1)

    return Toy(lambda images: images, logits)


def wrapped(layer: str) -> Toy:
    toy = Toy(lambda images: planes(brightness(images)), lambda out: decide(channel(out)))
    return timm_fsr.attach(toy, layer, at="body")


def hole() -> Toy:
    """Dark is only a small disc of left and right brightness: long steps jump over it, and outside all look alike."""

    def body(images: Tensor) -> Tensor:
        left, right = images[..., :8].mean(dim=(1, 2, 3)), images[..., 8:].mean(dim=(1, 2, 3))
        return planes((left - 0.53).hypot(right - 0.44) - 0.004)

    return timm_fsr.attach(Toy(body, lambda out: decide(channel(out))), "toy_rounding", at="body")


def saturated_head() -> Toy:
    toy = Toy(lambda images: planes(brightness(images)), lambda out: decide(channel(out).tanh()))
    return timm_fsr.attach(toy, "toy_loud", at="body")


def watched(wrong: float = 0.0) -> Toy:
    """A head without honest gradient, whose margin has the slope `wrong` in the wrong direction."""
    toy = Toy(
        lambda images: planes(brightness(images)),
        lambda out: decide(steps(channel(out)) - sawtooth(channel(out), wrong / 2), 2),
        2,
    )
    return timm_fsr.attach(toy, "toy_watching", at="body")


def noisy_gradient() -> Toy:
    """Random in eval mode: the honest gradient of every pixel drowns in noise."""

    def score(images: Tensor) -> Tensor:
        noise = 6 * torch.randn_like(images) / images[0].numel()
        return brightness(images) + (noise * (images - images.detach())).sum(dim=(1, 2, 3)) + 1e-3 * noise.sum()

    return Toy(lambda images: images, lambda images: decide(score(images)))


def rounded_head() -> Toy:
    toy = Toy(lambda images: planes(brightness(images)), lambda out: decide(steps(channel(out))))
    toy.feature_info = [{"module": "body", "num_chs": 1, "reduction": 8}]
    return toy


def rounded_score() -> Toy:
    return plain_toy(steps)


def rounded_pixels() -> Toy:
    return Toy(lambda images: steps(images), lambda images: decide(brightness(images)))


@dataclass(frozen=True)
class Defence:
    """A toy, the stages that break it, and stages that must not: else it would prove nothing."""

    build: Callable[[], Toy]
    breaks: tuple[str, ...]
    withstands: tuple[str, ...]
    levels: tuple[float, ...] = LEVELS
    labels: tuple[int, ...] | None = None
    sources: tuple[str, ...] = ()

    def data(self) -> tuple[Tensor, Tensor]:
        images, labels = data(self.levels)
        return images, labels if self.labels is None else torch.tensor(self.labels)

    def transfer_from(self) -> dict[str, nn.Module]:
        return {name: honest().eval() for name in self.sources}


DEFENCES = {
    "ripple": Defence(ripple, ("apgd-ce",), ()),
    "shouting": Defence(shouting, ("apgd-dlr", "apgd-targeted"), ("apgd-ce",)),
    "shouting at two": Defence(lambda: shouting(2), ("apgd-margin", "apgd-targeted"), ("apgd-ce",)),
    "decoy": Defence(decoy, ("apgd-targeted",), ("apgd-ce", "apgd-dlr"), (0.5,) * 4, (0,) * 4),
    "rounded features": Defence(lambda: wrapped("toy_rounding"), ("identity", "bypass"), (*DIRECT, "eot", "latent")),
    "detached features": Defence(lambda: wrapped("toy_detaching"), ("identity", "bypass"), (*DIRECT, "eot", "latent")),
    "hole": Defence(hole, ("identity", "bypass"), DIRECT, (0.5,) * 6, (1,) * 6),
    "detached pixels": Defence(lambda: plain_toy(lambda d: d.detach()), ("square",), DIRECT),
    "saturated mask": Defence(
        lambda: by_the_mask(130),
        ("wide_tau", "straight_through", "mask forcing"),
        (*DIRECT, "identity", "detached_mask", "robust_part", "bypass", "joint 1"),
    ),
    "dead mask": Defence(
        lambda: by_the_mask(1300),
        ("straight_through",),
        (*DIRECT, "identity", "wide_tau", "detached_mask", "robust_part", "bypass", "joint 1"),
    ),
    "misled mask": Defence(
        misled_mask, ("detached_mask", "identity", "bypass"), (*DIRECT, "wide_tau", "straight_through", *JOINT)
    ),
    "misled recalibration": Defence(
        misled_recalibration, ("robust_part",), (*DIRECT, *MASKS, "identity", "bypass", *JOINT)
    ),
    "saturated head": Defence(saturated_head, ("bypass",), (*DIRECT, "identity", "eot")),
    "watched": Defence(watched, JOINT, ("apgd-ce", "apgd-margin", "identity", "bypass", "eot")),
    "watched, slightly wrong": Defence(lambda: watched(0.5), JOINT[1:], (JOINT[0], "apgd-margin", "identity")),
    "watched, wrong": Defence(lambda: watched(5), JOINT[2:], (*JOINT[:2], "apgd-margin", "identity")),
    "forced mask": Defence(
        lambda: by_the_mask(8, steps), ("mask forcing",), (*DIRECT, *MASKS, "identity", "bypass", *JOINT)
    ),
    "forced saturated mask": Defence(
        lambda: by_the_mask(130, steps), ("mask forcing",), (*DIRECT, *MASKS, "identity", "bypass", *JOINT)
    ),
    "wavering": Defence(lambda: wrapped("toy_wavering"), ("eot",), DIRECT),
    "noisy gradient": Defence(noisy_gradient, ("eot",), DIRECT),
    "rounded head": Defence(rounded_head, ("latent",), DIRECT),
    "rounded score": Defence(rounded_score, ("transfer from honest",), DIRECT, sources=("honest",)),
    "rounded pixels": Defence(rounded_pixels, ("square",), DIRECT),
}
