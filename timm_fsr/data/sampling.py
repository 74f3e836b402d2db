"""The order of training images and the batches they form, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from timm_fsr.data.augment import Augmentation, ResizedCrop
from timm_fsr.data.dataset import ImageData, Images
from timm_fsr.data.streaming import StreamedData
from timm_fsr.data.timm_augment import TimmAugmentation
from timm_fsr.utils.random import derive_generator


def training_batches(
    data: Images,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    augmentation: Augmentation | ResizedCrop,
    then: TimmAugmentation | None = None,
    extra: ImageData | None = None,
    extra_fraction: float = 0.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch for one process; a function of its arguments alone, so that a run can be resumed.

    An epoch has `epoch_steps(len(data), batch_size, world_size=world_size)` steps, extra images or not, as in Gowal et
    al. (2021) and Wang et al. (2023). Its images of `data` are the first of `epoch_order`; those of `extra` go on from
    epoch to epoch, each once before any comes again.

    Args:
        data: the training images.
        batch_size: B, images per process and step.
        seed: with `epoch` decides order and augmentation.
        epoch: counted from 0.
        rank: this process, 0 <= rank < world_size, the number of processes.
        world_size: see `rank`.
        start_step: the first step to give; skipping the ones before costs nothing.
        augmentation: crop and flip, applied to each image by its own draw.
        then: what is done to them after that.
        extra: further images, such as generated ones, of the same classes and size.
        extra_fraction: the share of each batch that comes from `extra`, in (0, 1); at least one image of either kind.

    Returns:
        Float images (B, C, H, W) in [0, 1], those of `data` first, and int64 labels (B,), on the device of
        `data`; labels are (B, classes) where `then` mixes images.

    Raises:
        ValueError: the epoch has no such step, or data, extra images and augmentation do not fit together.
    """
    _check(data, extra, extra_fraction)
    chosen = partial(
        _chosen,
        data,
        extra,
        batch_size=batch_size,
        fraction=extra_fraction,
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
    )

    def keys() -> Iterator[Tensor]:
        return (own if more is None else torch.cat([own, len(data) + more]) for own, more in chosen())

    batches: Iterator[tuple[Tensor, Tensor]]
    if isinstance(data, StreamedData) and isinstance(augmentation, ResizedCrop):
        policy = None if then is None else then.policy
        then = None if then is None else then.without_policy()
        indices = (own for own, _ in chosen())
        batches = data.load(indices, crop=augmentation, policy=policy, seed=seed, epoch=epoch)
    elif isinstance(augmentation, ResizedCrop):
        batches = _resized(_joined(data, extra, chosen()), keys(), augmentation, seed=seed, epoch=epoch)
    else:
        batches = _joined(data, extra, chosen())
        batches = _augmented(batches, augmentation, seed=seed, epoch=epoch, start_step=start_step, rank=rank)
    if then is None:
        return batches
    return then.over(batches, keys(), seed=seed, epoch=epoch, start_step=start_step, rank=rank)


def _check(data: Images, extra: ImageData | None, fraction: float) -> None:
    """Raise ValueError for what cannot be used together."""
    if isinstance(data, StreamedData) and extra is not None:
        raise ValueError(f"{data.name} is streamed and takes no extra images; load it or leave out {extra.name}")
    if extra is None and fraction:
        raise ValueError(f"extra_fraction={fraction} is a share of no images; give extra too, or leave it out")


def _chosen(
    data: Images,
    extra: ImageData | None,
    *,
    batch_size: int,
    fraction: float,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    start_step: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Of each batch, the indices of its images in `data`, and in `extra` if there are any."""
    order = partial(epoch_batches, len(data), seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    all_own = order(batch_size, start_step=start_step)
    if extra is None:
        return ((own, None) for own in all_own)
    count = _extra_count(data, extra, batch_size, fraction)
    steps = epoch_steps(len(data), batch_size, world_size=world_size)
    own = islice(order(batch_size - count, start_step=start_step), steps - start_step)
    first = (epoch * steps + start_step) * world_size + rank
    return zip(own, _slices_of_rounds(len(extra), count, first=first, stride=world_size, seed=seed), strict=False)


def _extra_count(data: Images, extra: ImageData, batch_size: int, fraction: float) -> int:
    """How many images of a batch are extra ones."""
    if (extra.classes, extra.image_size) != (data.classes, data.image_size):
        raise ValueError(
            f"{extra.name} has {extra.num_classes} classes and images of {extra.image_size}, but {data.name} has "
            f"{data.num_classes} and {data.image_size}; load it with the classes, size and channels of the other"
        )
    if not 0 < fraction < 1:
        raise ValueError(f"extra_fraction={fraction} is no share of a batch; use a number between 0 and 1")
    if batch_size < 2:
        raise ValueError(f"a batch of {batch_size} has no place for two kinds of images; use a batch size of 2 or more")
    return min(max(round(batch_size * fraction), 1), batch_size - 1)


def _slices_of_rounds(total: int, count: int, *, first: int, stride: int, seed: int) -> Iterator[Tensor]:
    """Without end, slices `first`, `first + stride`, ... of permutations of 0..total-1 that follow one another.

    A slice is an int64 tensor (count,). The permutations are drawn from the seed and their number only.
    """
    known: dict[int, Tensor] = {}
    while True:
        places = torch.arange(first * count, (first + 1) * count)
        rounds = places.div(total, rounding_mode="floor")
        order = torch.empty_like(places)
        for number in rounds.unique().tolist():
            if number not in known:
                known[number] = torch.randperm(total, generator=derive_generator(seed, number, 0, 0, stream="extra"))
            order[rounds == number] = known[number][places[rounds == number] % total]
        known = {int(rounds[-1]): known[int(rounds[-1])]}
        yield order
        first += stride


def _joined(
    data: Images, extra: ImageData | None, chosen: Iterator[tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as they are held, those of `data` first."""
    if isinstance(data, StreamedData):
        yield from data.load(own for own, _ in chosen)
        return
    for own, more in chosen:
        images, labels = data.batch(own)
        if extra is not None and more is not None:
            others, other_labels = extra.batch(more)
            images = torch.cat([images, others.to(images.device)])
            labels = torch.cat([labels, other_labels.to(labels.device)])
        yield images, labels


def _resized(
    batches: Iterator[tuple[Tensor, Tensor]], keys: Iterator[Tensor], crop: ResizedCrop, *, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image cropped by a draw of its own, from (seed, epoch, key) as streamed images are."""
    for (images, labels), own in zip(batches, keys, strict=False):
        draws = [derive_generator(seed, epoch, key, 0, stream="crop") for key in own.tolist()]
        yield crop.of_batch(images, draws), labels


def _augmented(
    batches: Iterator[tuple[Tensor, Tensor]],
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    start_step: int,
    rank: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    for step, (images, labels) in enumerate(batches, start_step):
        yield augmentation(images, derive_generator(seed, epoch, step, rank)), labels


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..count-1 as an int64 tensor (count,), drawn from (seed, epoch) only."""
    return torch.randperm(count, generator=derive_generator(seed, epoch, 0, 0, stream="order"))


def epoch_steps(count: int, batch_size: int, *, world_size: int = 1, drop_last: bool = True) -> int:
    """The number of batches that `epoch_batches` gives each rank in one epoch."""
    whole, remainder = divmod(count, batch_size * world_size)
    return whole + (not drop_last and remainder >= world_size)


def epoch_batches(
    count: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    drop_last: bool = True,
) -> Iterator[Tensor]:
    """The image indices of each step of one epoch for one rank, as int64 tensors (batch_size,).

    Global batch b is order[b*B*W:(b+1)*B*W] of `epoch_order`; rank r takes the r-th of its W equal slices.

    Args:
        count: the number of images.
        batch_size: B, images per rank and step.
        seed: with `epoch` the only thing that decides the order.
        epoch: see `seed`.
        rank: r, this process, 0 <= r < W.
        world_size: W, the number of processes.
        start_step: the first step to give; skipping the ones before costs nothing.
        drop_last: leave out a last global batch that is not full; otherwise ranks share it as evenly as they
            can, and it is left out only if it has fewer images than there are ranks.

    Raises:
        ValueError: the epoch has no step, not that many steps, or there is no such rank.
    """
    steps = epoch_steps(count, batch_size, world_size=world_size, drop_last=drop_last)
    if steps == 0:
        raise ValueError(
            f"{count} images do not fill one batch of {batch_size} on {world_size} process(es); "
            "use a smaller batch_size, more images or drop_last=False"
        )
    if not (0 <= rank < world_size and 0 <= start_step <= steps):
        raise ValueError(
            f"rank={rank} of {world_size} and start_step={start_step} of {steps} are out of range; "
            "a run resumes with the batch size, the data and the number of processes it began with"
        )
    parts = epoch_order(count, seed=seed, epoch=epoch).split(batch_size * world_size)
    return (part.tensor_split(world_size)[rank] for part in parts[start_step:steps])
