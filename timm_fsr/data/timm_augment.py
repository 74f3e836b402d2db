"""What timm's training script does to a batch after crop and flip: a policy, mixup or cutmix, random erasing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from timm_fsr.data.augment import from_pictures, to_pictures
from timm_fsr.data.policy import Policy
from timm_fsr.utils.random import derive_generator, seeded_libraries


@dataclass(frozen=True)
class Erasing:
    """Random erasing (Zhong et al., 2017, arXiv 1708.04896) by timm's code, of pixels in [0, 1].

    timm erases normalised images; here the same values are put in as pixels, clipped to [0, 1].

    Attributes:
        probability: share of the images that are erased in part.
        mode: "const" puts in the mean colour, "rand" one normal colour for each box, "pixel" normal noise.
        count: largest number of boxes of an image.
        mean: of the normalisation, for each channel.
        std: see `mean`.

    Raises:
        ValueError: a number or mode that timm does not have.
    """

    probability: float
    mode: str = "pixel"
    count: int = 1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_share("random_erasing", self.probability)
        if self.mode not in ("const", "rand", "pixel"):
            raise ValueError(f"erasing_mode={self.mode!r} is none of const, rand and pixel; choose one of them")
        if self.count < 1:
            raise ValueError(f"erasing_count={self.count} must be at least 1: it is the largest number of boxes")

    def __call__(self, images: Tensor, seeds: list[int]) -> Tensor:
        """Images (N, C, H, W) in [0, 1], each erased by its own seed."""
        from timm.data.random_erasing import RandomErasing

        erase = RandomErasing(self.probability, mode=self.mode, max_count=self.count, device="cpu")
        # timm erases in place. Where it has, an empty canvas is a number; all other pixels stay what they were.
        canvas = torch.full(images.shape, torch.nan)
        with seeded_libraries() as begin:
            for place, seed in enumerate(seeds):
                begin(seed)
                erase(canvas[place])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        put_in = (canvas * std + mean).clamp(0, 1).to(images.device, images.dtype)
        return torch.where(put_in.isnan(), images, put_in)


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al., 2017, arXiv 1710.09412) and CutMix (Yun et al., 2019, arXiv 1905.04899) by timm's code.

    Image i of a batch of B is mixed with image B - 1 - i; labels become the share of each class, (B, classes).

    Attributes:
        num_classes: of the labels.
        mixup: alpha of the beta distribution that weights are drawn from; 0 is no mixup.
        cutmix: alpha of that which areas are drawn from; 0 is no CutMix.
        cutmix_minmax: smallest and largest side of CutMix's box, as shares of the image's; switches CutMix on.
        prob: how often a batch, pair or image is mixed.
        switch_prob: how often by CutMix, where both are on.
        mode: whether a "batch", a "pair" or each image ("elem") gets a draw of its own.
        off_epoch: the epoch, counted from 0, from which on nothing is mixed; 0 is never.

    Raises:
        ValueError: a number or mode that timm does not have.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"
    off_epoch: int = 0

    def __post_init__(self) -> None:
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(
                    f"{key}={getattr(self, key)} must be 0 or more: it is alpha of a beta distribution, and 0 is off"
                )
        _check_share("mixup_prob", self.prob)
        _check_share("mixup_switch_prob", self.switch_prob)
        if self.mode not in ("batch", "pair", "elem"):
            raise ValueError(f"mixup_mode={self.mode!r} is none of batch, pair and elem; choose one of them")
        if self.off_epoch < 0:
            raise ValueError(f"mixup_off_epoch={self.off_epoch} must be 0 or more; 0 mixes to the end")
        minmax = self.cutmix_minmax
        if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
            raise ValueError(
                f"cutmix_minmax={list(minmax)} is no range of sides; write the smallest and the largest share of the "
                "image's side, such as [0.2, 0.8]"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if `cutmix_minmax` leaves no box of whole pixels in images of this size."""
        if self.cutmix_minmax is None:
            return
        for side in (height, width):
            low, high = (int(side * share) for share in self.cutmix_minmax)
            if low >= high:
                raise ValueError(
                    f"cutmix_minmax={list(self.cutmix_minmax)} leaves no box of whole pixels in a side of {side}; "
                    "widen the range"
                )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and shares of their classes (B, classes), of `labels` (B,); B is even."""
        from timm.data.mixup import Mixup

        mix = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            cutmix_minmax=self.cutmix_minmax,
            prob=self.prob,
            switch_prob=self.switch_prob,
            mode=self.mode,
            label_smoothing=0.0,  # the objective smooths what it is given, which comes to the same
            num_classes=self.num_classes,
        )
        with seeded_libraries() as begin:
            begin(seed)
            mixed, shares = mix(images.clone(), labels)
        # Rounding may leave a sum of two weighted ones above 1. timm's shares are float32 whatever the images are.
        return mixed.clamp_(0, 1), shares.float()


@dataclass(frozen=True, kw_only=True)
class TimmAugmentation:
    """The augmentations of timm's training script that come after crop and flip, in its order.

    Policy and erasing are drawn for each image by itself, mixing for each batch of a process; all of it by position,
    so that a run can be resumed.

    Attributes:
        policy: for single pictures.
        mixing: mixup and CutMix.
        erasing: random erasing.
    """

    policy: Policy | None = None
    mixing: Mixing | None = None
    erasing: Erasing | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, keys: Tensor, *, seed: int, epoch: int, step: int, rank: int
    ) -> tuple[Tensor, Tensor]:
        """A batch, already cropped and mirrored, augmented.

        Args:
            images: (B, C, H, W) in [0, 1].
            labels: (B,).
            keys: (B,), the number of each image in its data set: with `seed` and `epoch` it decides on policy and
                erasing.
            seed: of the run.
            epoch: counted from 0.
            step: of the epoch; with `rank`, `seed` and `epoch` it decides on mixing.
            rank: of the process.

        Returns:
            Images of the same shape in [0, 1], and labels (B,), or with mixing (B, classes).
        """
        if self.policy is not None:
            changed = self.policy.over(to_pictures(images), self._seeds("policy", keys, seed, epoch))
            images = from_pictures(changed, images.device)
        if self.mixing is not None and not 0 < self.mixing.off_epoch <= epoch:
            drawn = derive_generator(seed, epoch, step, rank, stream="mixing").initial_seed()
            images, labels = self.mixing(images, labels, drawn)
        if self.erasing is not None:
            images = self.erasing(images, self._seeds("erasing", keys, seed, epoch))
        return images, labels

    def over(
        self,
        batches: Iterator[tuple[Tensor, Tensor]],
        keys: Iterator[Tensor],
        *,
        seed: int,
        epoch: int,
        start_step: int,
        rank: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch after batch; see `__call__`."""
        for step, ((images, labels), own) in enumerate(zip(batches, keys, strict=False), start_step):
            yield self(images, labels, own, seed=seed, epoch=epoch, step=step, rank=rank)

    def without_policy(self) -> TimmAugmentation:
        """The rest, where the policy acts as images are decoded."""
        return dataclasses.replace(self, policy=None)

    @staticmethod
    def _seeds(stream: Literal["policy", "erasing"], keys: Tensor, seed: int, epoch: int) -> list[int]:
        return [image_seed(stream, key, seed=seed, epoch=epoch) for key in keys.tolist()]


def image_seed(stream: Literal["policy", "erasing"], key: int, *, seed: int, epoch: int) -> int:
    """What decides on the draws for image `key` of the data set in an epoch."""
    return derive_generator(seed, epoch, key, 0, stream=stream).initial_seed()


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value} must lie in [0, 1]: it is a probability")
