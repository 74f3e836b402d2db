"""Sources of data: embedded, Parquet, image folder, IDX and Hub, and the errors of each."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_fsr.data.dataset import load_data
from timm_fsr.data.folders import other_class_order
from timm_fsr.data.sources import EMBEDDED, is_image_folder
from timm_fsr.data.streaming import stream_data

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def picture(value: int, size: tuple[int, int] = (6, 8), mode: str = "RGB") -> Image.Image:
    """A plain picture of (height, width) `size` whose pixels are `value`."""
    return Image.new(mode, size[::-1], value if mode != "RGB" else (value, value // 2, 255 - value))


def write_parquet(
    path: Path,
    pictures: list[Image.Image],
    labels: list,
    *,
    names: list[str] | None = None,
    columns: tuple[str, str] = ("img", "label"),
    **extra: list,
) -> Path:
    """A Parquet file in the schema of the Hub."""
    table = datasets.Dataset.from_dict({columns[0]: pictures, columns[1]: labels, **extra})
    table = table.cast_column(columns[0], datasets.Image())
    if names is not None:
        table = table.cast_column(columns[1], datasets.ClassLabel(names=names))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return path


def write_images(folder: Path, **classes: list[Image.Image]) -> Path:
    """A folder per class with numbered PNG files."""
    for name, pictures in classes.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(pictures):
            image.save(folder / name / f"{number}.png")
    return folder


def write_idx(folder: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
        header = np.array([magic, *array.shape], ">i4").tobytes()
        (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


class TestEmbedded:
    @pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
    def test_loads(self, split, per_class, capsys):
        data = load_data(EMBEDDED, split)
        assert data.labels.bincount().tolist() == [per_class] * 10
        assert data.image_size == (1, 28, 28)
        assert (data.images.dtype, data.images.min(), data.images.max()) == (torch.uint8, 0, 255)
        assert data.classes[0] == "T-shirt/top"
        assert data.classes[9] == "Ankle boot"
        assert data.name == f"fashion_mnist[{split}]"
        assert capsys.readouterr() == ("", "")

    def test_fingerprints_of_the_readme(self):
        folder = Path(__file__).parents[2] / "timm_fsr" / "data" / "embedded" / EMBEDDED
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert load_data(EMBEDDED, "test").fingerprint in readme
        assert "Zalando SE" in (folder / "LICENSE").read_text(encoding="utf-8")
        assert sum(file.stat().st_size for file in folder.iterdir()) < 5 * 2**20

    def test_limit_is_balanced_and_repeatable(self):
        data = load_data(EMBEDDED, "test", limit=50)
        assert data.labels.bincount().tolist() == [5] * 10
        assert data.fingerprint == load_data(EMBEDDED, "test").subset(50).fingerprint
        assert data.name == "fashion_mnist[test] limited to 50"

    def test_three_channels_and_another_size(self):
        data = load_data(EMBEDDED, "test", limit=10, channels=3, size=32)
        assert data.image_size == (3, 32, 32)
        assert torch.equal(data.images[:, 0], data.images[:, 2])

    def test_leaves_no_copy(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write_images(tmp_path / "images", a=[picture(1)])
        write_parquet(tmp_path / "table.parquet", [picture(1)], [0])
        for source in (EMBEDDED, tmp_path / "images", tmp_path / "table.parquet"):
            load_data(source, limit=1)
        assert not (tmp_path / "cache").exists()


class TestParquet:
    def test_folder_with_a_file_per_shard(self, tmp_path):
        names = ["cat", "dog"]
        for shard in range(2):
            pictures = [picture(100 * shard), picture(100 * shard + 50)]
            write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", pictures, [0, 1], names=names)
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [picture(7)], [1], names=names)
        train, test = load_data(tmp_path), load_data(tmp_path, "test")
        assert train.images[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
        assert train.images[1, :, 3, 4].tolist() == [50, 25, 205]
        assert (train.labels.tolist(), train.classes) == ([0, 1, 0, 1], ("cat", "dog"))
        assert (test.images[0, 0, 0, 0], test.labels.tolist(), test.image_size) == (7, [1], (3, 6, 8))

    def test_folder_with_a_folder_per_split(self, tmp_path):
        write_parquet(tmp_path / "train" / "0000.parquet", [picture(1)], [0])
        write_parquet(tmp_path / "test" / "0000.parquet", [picture(2)], [0])
        assert load_data(tmp_path, "test").images[0, 0, 0, 0] == 2

    def test_file_and_glob(self, tmp_path):
        file = write_parquet(tmp_path / "some-0.parquet", [picture(1)], [0])
        write_parquet(tmp_path / "some-1.parquet", [picture(2)], [0])
        assert len(load_data(file)) == 1
        assert load_data(str(tmp_path / "some-*.parquet"), "some").images[:, 0, 0, 0].tolist() == [1, 2]
        with pytest.raises(ValueError, match="no split 'test'; use one of: some"):
            load_data(file, "test")
        with pytest.raises(FileNotFoundError, match="no file matches"):
            load_data(str(tmp_path / "none-*.parquet"))

    def test_usual_columns_beside_others(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [picture(1)], [3], columns=("img", "fine_label"), coarse_label=[0])
        assert load_data(file).labels.tolist() == [3]

    def test_explicit_columns(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [picture(1)], [1], columns=("photo", "kind"), label=[0])
        data = load_data(file, image_column="photo", label_column="kind")
        assert data.labels.tolist() == [1]
        with pytest.raises(ValueError, match="image_column to one of its columns: photo, kind, label"):
            load_data(file)
        with pytest.raises(ValueError, match="has no column 'sort'; set label_column"):
            load_data(file, image_column="photo", label_column="sort")
        with pytest.raises(ValueError, match="rather than images"):
            load_data(file, image_column="kind", label_column="label")

    def test_ambiguous_columns(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [picture(1)], [1], fine_label=[0])
        with pytest.raises(ValueError, match="several columns of the usual label names"):
            load_data(file)

    def test_plain_bytes_without_features(self, tmp_path):
        source = write_parquet(tmp_path / "a.parquet", [picture(9)], [0])
        table = datasets.Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
        plain = table.data.table.replace_schema_metadata(None)
        datasets.Dataset(plain).to_parquet(tmp_path / "b.parquet")
        assert load_data(tmp_path / "b.parquet").images[0, 0, 0, 0] == 9

    def test_numbers_and_words_as_labels(self, tmp_path):
        pictures = [picture(1), picture(2), picture(3)]
        numbers = load_data(write_parquet(tmp_path / "a.parquet", pictures, [2, 0, 2]))
        words = load_data(write_parquet(tmp_path / "b.parquet", pictures, ["owl", "ant", "owl"]))
        assert (numbers.labels.tolist(), numbers.classes) == ([2, 0, 2], ("0", "1", "2"))
        assert (words.labels.tolist(), words.classes) == ([1, 0, 1], ("ant", "owl"))

    def test_given_classes_decide_the_order(self, tmp_path):
        words = write_parquet(tmp_path / "a.parquet", [picture(1), picture(2)], ["owl", "ant"])
        numbers = write_parquet(tmp_path / "b.parquet", [picture(1), picture(2)], [1, 0])
        data = load_data(words, classes=("owl", "bee", "ant"))
        assert (data.labels.tolist(), data.num_classes) == ([0, 2], 3)
        assert load_data(numbers, classes=("a", "b", "c")).classes == ("a", "b", "c")
        with pytest.raises(ValueError, match="add to classes: ant"):
            load_data(words, classes=("owl", "bee"))
        with pytest.raises(ValueError, match="labels from 0 to 1 but 1 classes"):
            load_data(numbers, classes=("a",))

    @pytest.mark.parametrize(("labels", "kind"), [([0.5], "float"), ([None], "NoneType")])
    def test_labels_of_no_class(self, tmp_path, labels, kind):
        file = write_parquet(tmp_path / "a.parquet", [picture(1)], labels)
        with pytest.raises(ValueError, match=f"labels of type {kind}"):
            load_data(file)

    def test_unlabelled_split(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [picture(1)], [-1], names=["a", "b"])
        with pytest.raises(ValueError, match="use a split with labels"):
            load_data(file)

    def test_corrupt_file(self, tmp_path):
        file = tmp_path / "train-0.parquet"
        write_parquet(file, [picture(1)], [0])
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"broken Parquet file .*; fetch it again") as caught:
            load_data(tmp_path)
        assert "\n" not in str(caught.value)

    def test_corrupt_or_missing_image(self, tmp_path):
        rows = {"img": [{"bytes": b"no image", "path": None}, None], "label": [0, 1]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict(rows, features=features)
        table.select([0]).to_parquet(tmp_path / "a.parquet")
        table.select([1]).to_parquet(tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"1 image that cannot be used: row 0 \(not an image\); replace"):
            load_data(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"row 0 \(the row has no image\)"):
            load_data(tmp_path / "b.parquet")


class TestDecoding:
    def test_different_sizes_need_one(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", [picture(1), picture(1, (12, 16))], [0, 0])
        with pytest.raises(ValueError, match=r"different sizes, 6x8 and 12x16; use size="):
            load_data(file)
        assert load_data(file, size=(5, 4)).image_size == (3, 5, 4)
        assert load_data(file, size=7).image_size == (3, 7, 7)

    def test_scaling_keeps_proportions_and_the_centre(self, tmp_path):
        stripes = Image.fromarray(np.repeat([0, 200, 200, 0], 8).astype(np.uint8)[None].repeat(16, 0))
        file = write_parquet(tmp_path / "a.parquet", [stripes], [0])
        assert (load_data(file, size=8).images[..., 1:-1] > 190).all()

    def test_grey_and_colour(self, tmp_path):
        grey, colour = picture(10, mode="L"), picture(10)
        grey_first = write_parquet(tmp_path / "a.parquet", [grey] * 128 + [colour], [0] * 129)
        mixed = write_parquet(tmp_path / "b.parquet", [grey, colour], [0, 0])
        assert load_data(mixed).image_size[0] == 3
        assert load_data(mixed, channels=1).image_size[0] == 1
        with pytest.raises(ValueError, match="use channels=3 or channels=1"):
            load_data(grey_first)
        assert load_data(grey_first, channels=3).image_size[0] == 3

    def test_more_than_8_bits(self, tmp_path):
        deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
        with pytest.raises(ValueError, match="more than 8 bits"):
            load_data(write_images(tmp_path, a=[deep]))

    @pytest.mark.parametrize("option", [{"channels": 2}, {"limit": 0}, {"size": 0}, {"size": (3, -1)}])
    def test_impossible_options(self, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))}="):
            load_data(EMBEDDED, "test", **option)


class TestImageFolder:
    def test_with_splits(self, tmp_path):
        write_images(tmp_path / "train", owl=[picture(1)], ant=[picture(2), picture(3)])
        write_images(tmp_path / "val", owl=[picture(4)])
        train = load_data(tmp_path)
        assert (train.labels.tolist(), train.classes) == ([0, 0, 1], ("ant", "owl"))
        assert train.images[:, 0, 0, 0].tolist() == [2, 3, 1]
        assert load_data(tmp_path, "val", classes=train.classes).labels.tolist() == [1]
        with pytest.raises(ValueError, match="no split 'test'; use one of: train, val"):
            load_data(tmp_path, "test")

    def test_without_splits(self, tmp_path):
        write_images(tmp_path, owl=[picture(1)], ant=[picture(2)])
        (tmp_path / "owl" / "notes.txt").write_text("not an image")
        assert load_data(tmp_path).labels.tolist() == [0, 1]
        with pytest.raises(ValueError, match="no split 'test'; use one of: train"):
            load_data(tmp_path, "test")

    def test_without_images(self, tmp_path):
        with pytest.raises(ValueError, match="neither Parquet nor IDX files nor images"):
            load_data(tmp_path)


class TestIdx:
    def test_loads_and_refuses(self, tmp_path):
        images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        write_idx(tmp_path, "t10k", images, np.array([4, 1], np.uint8))
        data = load_data(tmp_path, "test")
        assert torch.equal(data.images[:, 0], torch.from_numpy(images))
        assert (data.labels.tolist(), data.num_classes) == ([4, 1], 5)
        with pytest.raises(ValueError, match="no split 'train'"):
            load_data(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
        with pytest.raises(ValueError, match="not complete IDX files"):
            load_data(tmp_path, "test")


class TestNpz:
    IMAGES = np.random.default_rng(0).integers(0, 256, (300, 5, 7, 3), np.uint8)
    LABELS = np.arange(300) % 3

    def write(self, folder: Path, **arrays: np.ndarray) -> Path:
        np.savez(folder / "generated.npz", **arrays)
        return folder / "generated.npz"

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("split", ["train", "generated"])
    def test_loads(self, tmp_path, save, split):
        save(tmp_path / "generated.npz", image=self.IMAGES, label=self.LABELS.astype(np.uint8), other=np.zeros(2))
        data = load_data(str(tmp_path / "generated.npz"), split)
        assert torch.equal(data.images, torch.from_numpy(self.IMAGES).permute(0, 3, 1, 2))
        assert data.images.is_contiguous()
        assert torch.equal(data.labels, torch.from_numpy(self.LABELS))
        assert (data.classes, data.name) == (("0", "1", "2"), f"{tmp_path / 'generated.npz'}[{split}]")

    def test_grey(self, tmp_path):
        for images in (self.IMAGES[..., 0], self.IMAGES[..., :1]):
            data = load_data(self.write(tmp_path, image=images, label=self.LABELS))
            assert torch.equal(data.images[:, 0], torch.from_numpy(self.IMAGES[..., 0]))
            assert data.image_size == (1, 5, 7)

    def test_limit_size_channels_and_classes(self, tmp_path):
        file = self.write(tmp_path, image=self.IMAGES, label=self.LABELS)
        data = load_data(file, limit=30, size=4, channels=1, classes=["a", "b", "c"])
        assert data.labels.bincount().tolist() == [10] * 3
        assert (data.image_size, data.classes) == ((1, 4, 4), ("a", "b", "c"))
        same = load_data(file, limit=30, size=(5, 7), channels=3)
        assert same.fingerprint == load_data(file, limit=30).fingerprint
        with pytest.raises(ValueError, match="labels from 0 to 2 but 2 classes"):
            load_data(file, classes=["a", "b"])
        with pytest.raises(ValueError, match="no split 'test'; use one of: generated, train"):
            load_data(file, "test")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": IMAGES, "label": LABELS}, r"arrays images, label but 'image' and 'label' are needed; save it"),
            ({"image": IMAGES / 255, "label": LABELS}, "'image' of float64 .* must be uint8"),
            (
                {"image": IMAGES.transpose(0, 3, 1, 2), "label": LABELS},
                r"\(300, 3, 5, 7\); it must be uint8 .* H, W, 3",
            ),
            ({"image": IMAGES[:0], "label": LABELS[:0]}, r"shape \(0, 5, 7, 3\); it must be"),
            ({"image": IMAGES, "label": LABELS[:9]}, r"'label' of int64 .* \(9,\); .* each of 300 images"),
            ({"image": IMAGES, "label": LABELS / 2}, "'label' of float64"),
            ({"image": IMAGES, "label": LABELS.astype(object)}, "no complete NumPy archive of plain arrays"),
        ],
    )
    def test_refuses(self, tmp_path, arrays, message):
        with pytest.raises(ValueError, match=message):
            load_data(self.write(tmp_path, **arrays))

    @pytest.mark.parametrize("content", [b"", b"no archive", b"cut"])
    def test_not_an_archive(self, tmp_path, content):
        file = self.write(tmp_path, image=self.IMAGES, label=self.LABELS)
        file.write_bytes(file.read_bytes()[:9000] if content == b"cut" else content)
        with pytest.raises(ValueError, match=r"no complete NumPy archive .*; fetch it again") as caught:
            load_data(file)
        assert "\n" not in str(caught.value)

    def test_a_single_array_and_no_file(self, tmp_path):
        with (tmp_path / "single.npz").open("wb") as file:
            np.save(file, self.IMAGES)
        with pytest.raises(ValueError, match="it is a single array"):
            load_data(tmp_path / "single.npz")
        with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz; check the path"):
            load_data(tmp_path / "none.npz")


class TestUnknownSource:
    @pytest.mark.parametrize("source", ["/no/such/folder", "./none", "a/b/c", "none.parquet"])
    def test_path(self, source):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no file or folder {source}")):
            load_data(source)

    @pytest.mark.parametrize("source", ["fashion-mnist", "FashionMNIST", "fashion_minst"])
    def test_misspelt_embedded_name(self, source):
        with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
            load_data(source)

    def test_embedded_split(self):
        with pytest.raises(ValueError, match="fashion_mnist has no split 'val'; use one of: train, test"):
            load_data(EMBEDDED, "val")

    def test_hub_without_network(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"neither a path here nor .* check the name, .* the network"):
            load_data("nobody/nothing")

    def test_hub(self, monkeypatch):
        table = datasets.Dataset.from_dict({"image": [picture(5)], "label": [0]})
        asked = []
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: ["train", "test"])
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or table)
        data = load_data("user/name", "test", config="small")
        assert (data.images[0, 0, 0, 0], data.name) == (5, "user/name[test]")
        assert asked == [("user/name", "small", "test")]
        with pytest.raises(ValueError, match="user/name has no split 'val'; use one of: train, test"):
            load_data("user/name", "val")


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not beside this checkout")
def test_cifar10():
    data = load_data(CIFAR10, "test", limit=1000)
    assert data.image_size == (3, 32, 32)
    assert data.labels.bincount().tolist() == [100] * 10
    assert data.classes[3] == "cat"


class TestClassOrder:
    NAMES = ("Zebra", "apple", "class10", "class9", "Class 2", "b01", "B1x", "7", "10", "übung")

    def test_timm_orders_folders_so(self, tmp_path):
        """Its reader is asked, for the order must not differ from that of its scripts."""
        from timm.data import create_dataset

        write_images(tmp_path / "train", **{name: [picture(number)] for number, name in enumerate(self.NAMES)})
        (tmp_path / "train" / "empty").mkdir()
        reader = create_dataset("", root=str(tmp_path / "train")).reader
        ours = load_data(tmp_path, class_order="timm")
        assert {name: number for number, name in enumerate(ours.classes)} == reader.class_to_idx
        assert ours.classes[:3] == ("7", "10", "apple")
        own = load_data(tmp_path)
        assert own.classes == tuple(sorted([*self.NAMES, "empty"]))
        names = [ours.classes[label] for label in ours.labels]
        assert dict(zip(ours.images[:, 0, 0, 0].tolist(), names, strict=True)) == dict(enumerate(self.NAMES))

    def test_nothing_else_has_an_order_of_folders(self, tmp_path):
        table = write_parquet(tmp_path / "train.parquet", [picture(1)] * 2, [0, 1], names=["b10", "b9"])
        assert load_data(table, class_order="timm").classes == ("b10", "b9")
        assert load_data(EMBEDDED, limit=10, class_order="timm").classes[0] == "T-shirt/top"
        assert not is_image_folder(EMBEDDED)
        assert not is_image_folder(str(tmp_path))

    def test_an_order_that_does_not_exist(self, tmp_path):
        write_images(tmp_path, a=[picture(1)])
        with pytest.raises(ValueError, match="unknown class_order 'natural'"):
            load_data(tmp_path, class_order="natural")

    def test_whether_two_orders_differ(self):
        assert other_class_order(["a", "b", "c9"], "codepoint") is None
        assert other_class_order(["b10", "b9"], "codepoint") == ("timm", ["b9", "b10"])
        assert other_class_order(["b9", "b10"], "timm") == ("codepoint", ["b10", "b9"])


class TestNames:
    def test_which_sources_have_some(self, tmp_path):
        write_images(tmp_path / "images", **{"0": [picture(1)], "1": [picture(2)]})
        write_parquet(tmp_path / "named.parquet", [picture(1)] * 2, [0, 1], names=["0", "1"])
        write_parquet(tmp_path / "texts.parquet", [picture(1)] * 2, ["a", "b"])
        write_parquet(tmp_path / "numbers.parquet", [picture(1)] * 2, [0, 1])
        for source in ("images", "named.parquet", "texts.parquet", "numbers.parquet"):
            named = source != "numbers.parquet"
            data = load_data(tmp_path / source)
            assert data.named is data.subset(1).named is named
            assert stream_data(tmp_path / source, size=4, workers=0).named is named
        assert load_data(tmp_path / "numbers.parquet", classes=["a", "b"]).named

    def test_how_large_images_are_stored(self, tmp_path):
        write_images(tmp_path, a=[picture(1, (10, 12))])
        assert load_data(tmp_path, size=6, channels=1).stored == (3, 10, 12)
