"""Streamed data: the same images as in memory, decoded when they are needed, by any number of processes."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from timm_fsr.data.augment import Augmentation, ResizedCrop
from timm_fsr.data.dataset import load_data
from timm_fsr.data.decoding import ArrayPictures, Rows, TablePictures
from timm_fsr.data.sampling import training_batches
from timm_fsr.data.streaming import StreamedData, stream_data
from timm_fsr.utils.random import derive_generator

SIZE = (12, 10)


def photograph(number: int) -> Image.Image:
    """A picture of its own size and pixels, so that every crop differs."""
    height, width = 20 + number % 7, 26 - number % 5
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photographs in a folder per class, 14 ants and 10 owls."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(24):
        file = root / ("ant" if number < 14 else "owl") / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        photograph(number).save(file)
    return root


@pytest.fixture(scope="module")
def parquet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photographs in two Parquet files."""
    root = tmp_path_factory.mktemp("parquet")
    for shard, numbers in enumerate((range(14), range(14, 24))):
        columns = {"image": [photograph(number) for number in numbers], "label": [shard] * len(numbers)}
        table = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=["ant", "owl"]))
        table.to_parquet(root / f"train-0000{shard}-of-00002.parquet")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def all_images(data: StreamedData, **options: object) -> torch.Tensor:
    return torch.cat([images for images, _ in data.load(torch.arange(len(data)).split(7), **options)])


class TestAgainstMemory:
    def test_same_images_labels_and_parts(self, folder):
        options = {"size": SIZE, "limit": 20, "classes": ["owl", "bee", "ant"]}
        streamed, held = stream_data(folder, workers=0, **options), load_data(folder, **options)
        for data, expected in [
            (streamed, held),
            *zip(streamed.split(0.3, seed=4), held.split(0.3, seed=4), strict=True),
            (streamed.subset(9, seed=1), held.subset(9, seed=1)),
            (streamed.head(3), held.head(3)),
            (streamed.take(torch.tensor([5, 0])), held.take(torch.tensor([5, 0]))),
        ]:
            assert len(data) == len(expected)
            assert (data.name, data.classes, data.num_classes) == (expected.name, expected.classes, 3)
            assert (data.image_size, torch.equal(data.labels, expected.labels)) == ((3, 12, 10), True)
            for batch, other in zip(data.batches(8), expected.batches(8), strict=True):
                assert all(map(torch.equal, batch, other))
        indices = torch.tensor([7, 7, 2])
        assert all(map(torch.equal, streamed.batch(indices), held.batch(indices)))
        assert streamed.subset(20) is streamed

    def test_it_prints_as_one_line(self, folder):
        data = stream_data(folder, size=8)
        assert repr(data) == f"<StreamedData: {load_data(folder, size=8)}>"

    def test_same_training_batches(self, folder):
        place = {"batch_size": 5, "seed": 1, "epoch": 2, "augmentation": Augmentation(padding=2)}
        for start_step in (0, 3):
            given = training_batches(stream_data(folder, size=SIZE, workers=0), **place, start_step=start_step)
            expected = training_batches(load_data(folder, size=SIZE), **place, start_step=start_step)
            for batch, other in zip(given, expected, strict=True):
                assert all(map(torch.equal, batch, other))

    def test_channels(self, folder):
        grey = stream_data(folder, size=6, channels=1, workers=0)
        assert grey.image_size == (1, 6, 6)
        assert torch.equal(next(grey.batches(24))[0], next(load_data(folder, size=6, channels=1).batches(24))[0])

    def test_fingerprint_follows_rows_labels_classes_and_size(self, folder):
        data = stream_data(folder, size=SIZE)
        others = [
            stream_data(folder, size=6),
            stream_data(folder, size=SIZE, classes=["owl", "ant"]),
            data.head(9),
            data.take(torch.arange(24).flip(0)),
        ]
        assert len({other.fingerprint for other in (data, *others)}) == 5
        assert stream_data(folder, size=SIZE, workers=0).to("cpu").fingerprint == data.fingerprint
        assert re.fullmatch("[0-9a-f]{16}", data.fingerprint)


class TestSources:
    def test_parquet_is_mapped_and_not_decoded_before(self, parquet, cache, monkeypatch):
        expected = load_data(parquet, size=SIZE)
        assert not cache.exists()
        decoded = []
        original = TablePictures.__call__
        monkeypatch.setattr(TablePictures, "__call__", lambda self, rows: decoded.extend(rows) or original(self, rows))
        data = stream_data(parquet, size=SIZE, workers=0)
        assert decoded == [0]  # for its mode
        assert isinstance(data.rows.pictures, TablePictures)
        assert data.rows.pictures.table.cache_files  # memory-mapped
        assert next(cache.rglob("*.arrow")).stat().st_size > 0
        batches = data.batches(8)
        assert decoded == [0]
        images, labels = next(batches)
        assert decoded == [0, *range(8)]
        assert torch.equal(images, expected.images[:8] / 255)
        assert torch.equal(torch.cat([labels, *(labels for _, labels in batches)]), expected.labels)

    def test_parquet_without_features_and_with_brackets(self, parquet, cache, tmp_path):
        table = datasets.Dataset.from_parquet(str(parquet / "train-00001-of-00002.parquet"))
        plain = table.data.table.replace_schema_metadata(None)
        datasets.Dataset(plain).to_parquet(tmp_path / "some [1].parquet")
        data = stream_data(tmp_path / "some [1].parquet", size=SIZE, workers=0)
        assert torch.equal(
            next(data.batches(10))[0], next(load_data(parquet, size=SIZE).take(torch.arange(14, 24)).batches(10))[0]
        )

    def test_broken_parquet(self, parquet, cache, tmp_path):
        file = tmp_path / "train-0.parquet"
        file.write_bytes((parquet / "train-00000-of-00002.parquet").read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"broken Parquet file .*; fetch it again"):
            stream_data(tmp_path, size=SIZE)

    def test_array_embedded_and_hub(self, tmp_path, cache, monkeypatch):
        pixels = np.stack([np.asarray(photograph(0))] * 3)
        np.savez(tmp_path / "a.npz", image=pixels, label=np.arange(3))
        assert torch.equal(
            next(stream_data(tmp_path / "a.npz", size=8, workers=0).batches(3))[0],
            next(load_data(tmp_path / "a.npz", size=8).batches(3))[0],
        )
        assert stream_data("fashion_mnist", "test", size=28, limit=20).image_size == (1, 28, 28)
        assert not cache.exists()
        table = datasets.Dataset.from_dict({"image": [photograph(0)], "label": [0]})
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: table)
        assert len(stream_data("user/name", size=8)) == 1

    @pytest.mark.parametrize("option", [{"channels": 2}, {"limit": 0}, {"size": 0}, {"workers": -1}])
    def test_impossible_options(self, folder, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))}="):
            stream_data(folder, **{"size": SIZE, **option})

    def test_impossible_data(self):
        rows = Rows("x", [], None, ArrayPictures(np.zeros((2, 4, 4, 3), np.uint8)))
        for count, labels, message in [
            (2, [0], "1 labels for 2 images"),
            (0, [], "at least one image"),
            (2, [0, 2], "labels from 0 to 2 but 2 classes"),
        ]:
            with pytest.raises(ValueError, match=message):
                StreamedData(rows, torch.arange(count), torch.tensor(labels), ("a", "b"), "x", (4, 4))


class TestWorkers:
    @pytest.mark.parametrize("augmentation", [Augmentation(padding=2), ResizedCrop()], ids=["crop", "resized crop"])
    def test_their_number_changes_nothing(self, folder, augmentation):
        place = {"batch_size": 5, "seed": 1, "epoch": 0, "start_step": 1, "augmentation": augmentation}
        none, two = (
            list(training_batches(stream_data(folder, size=SIZE, workers=workers), **place)) for workers in (0, 2)
        )
        assert len(none) == len(two) == 3
        assert all(all(map(torch.equal, *pair)) for pair in zip(none, two, strict=True))

    def test_more_than_cores_are_not_started(self, folder):
        data = stream_data(folder, size=SIZE, workers=1000)
        assert len(list(data.batches(8))) == 3  # torch would warn of too many

    def test_they_decode_instead_of_this_process(self, folder, tmp_path, monkeypatch):
        original = TablePictures.__call__

        def noted(self: TablePictures, rows: list[int]) -> list:
            (tmp_path / str(os.getpid())).touch()
            return original(self, rows)

        data = stream_data(folder, size=SIZE, workers=2)
        monkeypatch.setattr(TablePictures, "__call__", noted)
        assert len(list(data.batches(4))) == 6
        assert str(os.getpid()) not in os.listdir(tmp_path)
        assert len(os.listdir(tmp_path)) == min(2, len(os.sched_getaffinity(0)))

    def test_an_epoch_may_be_left_early(self, folder):
        batches = stream_data(folder, size=SIZE, workers=1).batches(4)
        next(batches)
        batches.close()

    def test_what_they_get_can_be_pickled(self, folder, monkeypatch):
        """For systems whose processes do not fork."""
        seen = []

        def loader(samples: object, **options: object) -> list[torch.Tensor]:
            seen.append(pickle.loads(pickle.dumps((samples, options["collate_fn"]))))
            return []

        monkeypatch.setattr("timm_fsr.data.streaming.DataLoader", loader)
        data = stream_data(folder, size=SIZE)
        assert list(data.load([], crop=ResizedCrop())) == []
        samples, collate = seen[0]
        monkeypatch.undo()
        expected = next(stream_data(folder, size=SIZE, workers=0).load([torch.tensor([3, 4])], crop=ResizedCrop()))[0]
        assert torch.equal(collate(samples.__getitems__([3, 4])) / 255, expected)


class TestBrokenImages:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_names_the_file_and_has_no_traceback(self, tmp_path, workers):
        for number in range(4):
            (tmp_path / "a").mkdir(exist_ok=True)
            photograph(number).save(tmp_path / "a" / f"{number}.png")
        (tmp_path / "a" / "2.png").write_bytes(b"no image")
        data = stream_data(tmp_path, size=SIZE, workers=workers)
        message = r"\[train\] has 1 image that cannot be used: /.*/a/2\.png \(not an image\); replace"
        with pytest.raises(ValueError, match=message) as caught:
            list(data.batches(2))
        assert "\n" not in str(caught.value)

    def test_colour_among_grey(self, tmp_path):
        (tmp_path / "a").mkdir()
        photograph(0).convert("L").save(tmp_path / "a" / "0.png")
        photograph(1).save(tmp_path / "a" / "1.png")
        with pytest.raises(ValueError, match="grey and colour images; use channels=3 or channels=1"):
            next(stream_data(tmp_path, size=SIZE, workers=0).batches(2))
        assert next(stream_data(tmp_path, size=SIZE, workers=0, channels=3).batches(2))[0].shape == (2, 3, 12, 10)


class TestResizedCrop:
    def test_equals_torchvision_on_the_same_box(self):
        picture = photograph(3)
        generator = derive_generator(0, 0, 0, 0)
        for _ in range(20):
            state = generator.get_state()
            given = ResizedCrop(flip=False)(picture, SIZE, generator)
            generator.set_state(state)
            left, upper, right, lower = ResizedCrop(flip=False).box(picture.height, picture.width, generator)
            expected = v2.functional.resized_crop(
                picture, upper, left, lower - upper, right - left, list(SIZE), v2.InterpolationMode.BICUBIC
            )
            assert given.size == SIZE[::-1]
            assert np.array_equal(np.asarray(given), np.asarray(expected))

    @pytest.mark.parametrize("scale", [(0.1, 0.3), (1.0, 1.0), (0.25, 1.0)])
    def test_boxes_are_inside_and_of_the_asked_area_and_aspect(self, scale):
        generator = derive_generator(1, 0, 0, 0)
        boxes = torch.tensor([ResizedCrop(scale=scale).box(300, 400, generator) for _ in range(500)])
        wide, high = (boxes[:, 2] - boxes[:, 0]).double(), (boxes[:, 3] - boxes[:, 1]).double()
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= 400
        assert boxes[:, 3].max() <= 300
        area = wide * high / (300 * 400)
        assert scale[0] - 0.01 < area.min() <= area.max() < scale[1] + 0.01
        assert ((wide / high).log().abs() < torch.tensor(4 / 3).log() + 0.02).all()
        if scale == (0.1, 0.3):
            assert abs(area.mean() - 0.2) < 0.01
            assert (wide / high).log().mean().abs() < 0.03
            assert boxes[:, 0].min() < 20
            assert boxes[:, 2].max() > 380

    @pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1)])
    def test_a_very_long_image_gives_its_centre(self, height, width):
        left, upper, right, lower = ResizedCrop(scale=(1.0, 1.0)).box(height, width, derive_generator(0, 0, 0, 0))
        assert {right - left, lower - upper} == ({1} if height == width else {10, 13})
        assert abs((left + right) - width) <= 1
        assert abs((upper + lower) - height) <= 1

    def test_half_are_mirrored(self):
        picture = photograph(0).resize(SIZE[::-1])
        whole = ResizedCrop(scale=(1.0, 1.0))
        generator = derive_generator(0, 0, 0, 0)
        drawn = {whole(picture, SIZE, generator).tobytes() for _ in range(20)}
        assert picture.tobytes() in drawn
        assert picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() in drawn
        assert len({ResizedCrop((1.0, 1.0), flip=False)(picture, SIZE, generator).tobytes() for _ in range(20)}) == 1

    def test_draws_depend_on_seed_epoch_and_row_only(self, folder):
        data = stream_data(folder, size=SIZE, workers=0)
        crop = ResizedCrop()
        first = all_images(data, crop=crop, seed=1, epoch=2)
        backwards = all_images(data.take(torch.arange(24).flip(0)), crop=crop, seed=1, epoch=2)
        held_out = data.split(5, seed=0)[1]
        assert torch.equal(first, backwards.flip(0))
        assert torch.equal(all_images(held_out, crop=crop, seed=1, epoch=2), first[held_out.indices])
        for changes in ({"seed": 2}, {"epoch": 3}):
            other = all_images(data, crop=crop, **{"seed": 1, "epoch": 2, **changes})
            assert not (other == first).flatten(1).all(dim=1).any()

    @pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.1), (0.5,), (0.1, 0.2, 0.3)])
    def test_refuses(self, scale):
        with pytest.raises(ValueError, match=r"is no range of the image's area; .* such as"):
            ResizedCrop(scale=scale)
