"""The part of a recipe that says what is trained on: sources, splits, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from timm_fsr.data import Augmentation, ImageData, load_data
from timm_fsr.notation import Number
from timm_fsr.streaming import Images, ResizedCrop, stream_data


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from and how they are augmented.

    Attributes:
        source: see `timm_fsr.data.load_data`, as are the next seven.
        config: configuration of a Hub data set.
        train_split: name of the training split.
        test_split: name of the test split.
        image_column: null finds it.
        label_column: null finds it.
        size: side that images are scaled and cropped to; null keeps theirs.
        channels: 1 or 3; null keeps theirs.
        limit_train: use at most so many training images, balanced.
        limit_test: use at most so many test images, balanced.
        held_out: training images held out, balanced, to choose the best checkpoint by robust accuracy.
        crop_padding: pixels of padding of the random crop.
        flip: mirror half of the training images.
        extra_source: further training images, such as generated ones, of the same classes; scaled like the others.
        extra_split: name of their split.
        extra_fraction: share of each batch that comes from them, between 0 and 1; an epoch stays as long as without.
        extra_limit: use at most so many of them, balanced.
        streamed: decode images when they are needed, with `workers` processes, instead of holding them all in memory;
            needs `size`. See `timm_fsr.streaming.stream_data` for what it keeps on the disk.
        workers: processes that decode streamed images, for each training process; 0 decodes in that one.
        crop_scale: smallest and largest share of a streamed image's area that a random resized crop takes, such as
            [0.25, 1.0], in place of the crop with padding; null scales the whole image and takes its centre.
    """

    source: str = "fashion_mnist"
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    size: int | None = None
    channels: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    held_out: int = 1000
    crop_padding: int = 4
    flip: bool = True
    extra_source: str | None = None
    extra_split: str = "train"
    extra_fraction: Number = 0.0
    extra_limit: int | None = None
    streamed: bool = False
    workers: int = 4
    crop_scale: list[Number] | None = None

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        if self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must be at least 1: these images choose the checkpoint")
        if self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding} must be 0 or more")
        self._check_extra()
        self._check_streamed()

    def _check_extra(self) -> None:
        if self.extra_source is None and (self.extra_fraction != 0 or self.extra_limit is not None):
            raise ValueError(
                "data.extra_fraction and data.extra_limit are about data.extra_source, which is not set; set it to "
                "where the extra images are, or leave out the others"
            )
        if self.extra_source is not None and not 0 < self.extra_fraction < 1:
            raise ValueError(
                f"data.extra_fraction={self.extra_fraction} is no share of a batch for {self.extra_source}; use a "
                "number between 0 and 1, such as 0.7, or leave out data.extra_source"
            )

    def _check_streamed(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")
        if self.crop_scale is not None and not self.streamed:
            raise ValueError(
                "data.crop_scale is drawn as images are decoded, but these are decoded once, before the training; set "
                "data.streamed to true or leave out data.crop_scale"
            )
        if self.streamed and self.size is None:
            raise ValueError("data.streamed does not look at every image, so set data.size to the side they get")
        if self.streamed and self.extra_source is not None:
            raise ValueError(
                "data.extra_source is held in memory and cannot join data.streamed; leave out one of the two"
            )
        self.augmentation()

    def build(self, *, seed: int, progress: bool = True) -> tuple[Images, Images]:
        """Training and held-out validation images; the split is drawn from `seed`."""
        return self._load(self.train_split, self.limit_train, None, progress).split(self.held_out, seed=seed)

    def build_test(self, classes: Sequence[str] | None = None, *, progress: bool = True) -> Images:
        """Test images, in their stored order."""
        return self._load(self.test_split, self.limit_test, classes, progress)

    def build_extra(
        self, classes: Sequence[str], image_size: tuple[int, int, int], *, progress: bool = True
    ) -> ImageData | None:
        """The extra training images, with these classes and (channels, height, width); None if there are none.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: they cannot be read, or have other classes.
        """
        if self.extra_source is None:
            return None
        channels, height, width = image_size
        return load_data(
            self.extra_source,
            self.extra_split,
            classes=classes,
            size=(height, width),
            channels=channels,
            limit=self.extra_limit,
            progress=progress,
        )

    def augmentation(self) -> Augmentation | ResizedCrop:
        """The training augmentation.

        Raises:
            ValueError: `crop_scale` is no range of areas.
        """
        if self.crop_scale is None:
            return Augmentation(padding=self.crop_padding, flip=self.flip)
        return ResizedCrop(scale=tuple(map(float, self.crop_scale)), flip=self.flip)

    def _load(self, split: str, limit: int | None, classes: Sequence[str] | None, progress: bool) -> Images:
        read: Callable[..., Images] = partial(load_data, progress=progress)
        if self.streamed:
            read = partial(stream_data, workers=self.workers)
        return read(
            self.source,
            split,
            config=self.config,
            image_column=self.image_column,
            label_column=self.label_column,
            classes=classes,
            size=self.size,
            channels=self.channels,
            limit=limit,
        )
