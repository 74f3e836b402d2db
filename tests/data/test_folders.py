"""Folders of images as people have them: hidden files, splits by other names, empty classes, broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_fsr.data.dataset import Images, load_data
from timm_fsr.data.decoding import BrokenImagesError
from timm_fsr.data.folders import find_split, is_junk, meaning_of
from timm_fsr.data.streaming import stream_data


def write(folder: Path, count: int = 2, *, size: tuple[int, int] = (6, 8)) -> None:
    """Numbered pictures, each of its own grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size[::-1], (number, 0, 0)).save(folder / f"{number}.png")


def read(folder: Path, split: str = "train", *, streamed: bool, **options: object) -> Images:
    if streamed:
        return stream_data(folder, split, size=(6, 8), workers=0, **options)  # type: ignore[arg-type]
    return load_data(folder, split, **options)  # type: ignore[arg-type]


both = pytest.mark.parametrize("streamed", [False, True], ids=["memory", "streamed"])


class TestJunk:
    @both
    def test_is_skipped_at_any_depth(self, tmp_path, streamed):
        for split in ("train", "test"):
            for name in ("ant", "owl"):
                write(tmp_path / split / name)
        expected = read(tmp_path, streamed=streamed)
        for place in (
            ".hidden",
            "__MACOSX",
            "train/.ipynb_checkpoints",
            "train/__MACOSX/ant",
            "train/ant/@eaDir/0.png",
        ):
            write(tmp_path / place / "more")
            write(tmp_path / place)
        for place in ("._train", "train/._ant", "train/ant/._0.png", "train/owl/.DS_Store", "train/owl/.thumb.jpg"):
            (tmp_path / place).write_bytes(b"no image")
        (tmp_path / "train" / "owl" / "deep" / ".cache").mkdir(parents=True)
        (tmp_path / "train" / "owl" / "deep" / ".cache" / "a.png").write_bytes(b"no image")
        data = read(tmp_path, streamed=streamed)
        assert (data.classes, data.notes) == (("ant", "owl"), ())
        assert data.fingerprint == expected.fingerprint

    def test_beside_tables_and_idx_files(self, tmp_path):
        import datasets

        table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [0]})
        table.to_parquet(tmp_path / "train-0.parquet")
        (tmp_path / "__MACOSX").mkdir()
        for name in ("._train-0.parquet", "__MACOSX/._train-0.parquet", "._train-images-idx3-ubyte.gz"):
            (tmp_path / name).write_bytes(b"no table")
        assert len(load_data(tmp_path)) == 1

    def test_a_data_set_in_a_hidden_folder_is_one(self, tmp_path):
        write(tmp_path / ".cache" / "data" / "ant")
        assert len(load_data(tmp_path / ".cache" / "data")) == 2

    @pytest.mark.parametrize("name", [".git", "._a", "__MACOSX", "__macosx", "@eaDir", "lost+found"])
    def test_names(self, name):
        assert is_junk(name)
        assert not is_junk(name.strip("._@")[1:] + "s")


class TestSplits:
    @both
    @pytest.mark.parametrize(
        ("folders", "asked", "found"),
        [
            (["Training", "Testing"], "train", "Training"),
            (["Training", "Testing"], "test", "Testing"),
            (["TRAIN", "VAL"], "validation", "VAL"),
            (["train", "valid"], "val", "valid"),
            (["train", "Validation"], "valid", "Validation"),
            (["train_set", "test-set"], "test", "test-set"),
            (["Train Images", "dev"], "train", "Train Images"),
            (["train", "training"], "train", "train"),
            (["fold1", "train"], "fold1", "fold1"),
        ],
    )
    def test_are_found_by_any_usual_name(self, tmp_path, folders, asked, found, streamed):
        for number, folder in enumerate(folders, 1):
            write(tmp_path / folder / "ant", number)
            write(tmp_path / folder / "owl", number)
        data = read(tmp_path, asked, streamed=streamed)
        assert len(data) == 2 * (folders.index(found) + 1)
        assert data.name == f"{tmp_path}[{asked}]", "reports and recipes keep the name that was asked for"

    def test_inside_the_only_folder_of_an_unpacked_archive(self, tmp_path):
        write(tmp_path / "archive" / "Training" / "ant")
        write(tmp_path / "__MACOSX" / "archive")
        assert load_data(tmp_path).classes == ("ant",)

    def test_a_class_may_have_the_name_of_a_split(self, tmp_path):
        for name in ("bus", "train"):
            write(tmp_path / name)
        assert load_data(tmp_path).classes == ("bus", "train")

    def test_what_is_refused(self, tmp_path):
        for name in ("train", "training"):
            write(tmp_path / "two" / name / "ant")
        with pytest.raises(ValueError, match="no split 'test'; use one of: train, training"):
            load_data(tmp_path / "two", "test")
        with pytest.raises(ValueError, match="several splits that may be 'Train set': train, training; name one"):
            load_data(tmp_path / "two", "Train set")
        write(tmp_path / "flat" / "train")
        write(tmp_path / "flat" / "test")
        with pytest.raises(ValueError, match=r"flat/test has no class folders: the label .* one folder per class"):
            load_data(tmp_path / "flat")
        (tmp_path / "data.zip").write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"data\.zip is an archive; unpack it"):
            load_data(tmp_path / "data.zip")

    def test_of_tables_and_of_the_package(self, tmp_path):
        import datasets

        table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [0]})
        for name in ("train", "validation"):
            table.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
        assert load_data(tmp_path, "val").name == f"{tmp_path}[val]"
        assert len(load_data("fashion_mnist", "Testing", limit=3)) == 3

    def test_of_the_hub(self, monkeypatch):
        import datasets

        table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [0]})
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: asked.append(split) or table)
        assert load_data("user/name", "val").name == "user/name[val]"
        assert asked == ["validation"]

    @pytest.mark.parametrize(
        ("name", "meaning"),
        [("Train", "train"), ("dataset", None), ("set", None), ("testing_data", "test"), ("cat", None), ("vals", None)],
    )
    def test_meanings(self, name, meaning):
        assert meaning_of(name) == meaning

    def test_an_exact_name_comes_first(self):
        assert find_split("val", ["valid", "val"], "x") == "val"


class TestEmptyClasses:
    @both
    def test_are_named_and_stay_classes(self, tmp_path, streamed):
        write(tmp_path / "ant")
        (tmp_path / "bee").mkdir()
        (tmp_path / "cow").mkdir()
        for name in ("a.heic", "b.txt"):
            (tmp_path / "cow" / name).write_bytes(b"x")
        data = read(tmp_path, streamed=streamed)
        assert data.classes == ("ant", "bee", "cow")
        said = "has no images of 'bee' (an empty folder), 'cow' (2 file(s) of other kinds: .heic, .txt)"
        assert data.notes == (f"{tmp_path}[train] {said}",)
        assert data.split(1)[0].notes == data.notes

    def test_are_no_classes_for_timm(self, tmp_path):
        write(tmp_path / "ant")
        (tmp_path / "bee").mkdir()
        data = load_data(tmp_path, class_order="timm")
        assert data.classes == ("ant",)
        assert "folders without images, which were not counted as classes: 'bee' (an empty folder)" in data.notes[0]

    def test_of_numbers_and_names(self, tmp_path):
        import datasets

        picture = Image.new("RGB", (4, 4))
        table = datasets.Dataset.from_dict({"image": [picture] * 2, "label": [1, 3]})
        table.to_parquet(tmp_path / "numbers.parquet")
        assert load_data(tmp_path / "numbers.parquet").notes[0].endswith("has no images of '0', '2'")
        table.cast_column("label", datasets.ClassLabel(names=[f"c{n}" for n in range(40)])).to_parquet(
            tmp_path / "names.parquet"
        )
        (note,) = load_data(tmp_path / "names.parquet", limit=1).notes
        assert note.endswith("'c11', ... (38 of 40 classes)")


class TestSizes:
    def test_mixed_ones_are_scaled_and_cropped_and_said(self, tmp_path):
        write(tmp_path / "ant", size=(6, 8))
        write(tmp_path / "owl", size=(10, 6))
        data = load_data(tmp_path, mixed_size=5)
        assert torch.equal(data.images, load_data(tmp_path, size=5).images)
        (note,) = data.notes
        assert "images of different sizes, 6x8 to 10x6: all were scaled and centre-cropped to 5x5" in note
        with pytest.raises(ValueError, match=r"different sizes, 6x8 and 10x6; use size=\(height, width\)"):
            load_data(tmp_path)

    def test_equal_ones_are_kept(self, tmp_path):
        write(tmp_path / "ant")
        data = load_data(tmp_path, mixed_size=5)
        assert (data.image_size, data.notes) == ((3, 6, 8), ())


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Four classes' worth of trouble among 4 good images."""
    write(tmp_path / "ant", 4)
    write(tmp_path / "owl", 3)
    whole = tmp_path / "ant" / "3.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:-60])
    (tmp_path / "ant" / "0.png").write_bytes(b"no image")
    (tmp_path / "owl" / "1.png").write_bytes(b"")
    (tmp_path / "owl" / "9.png").symlink_to(tmp_path / "gone.png")
    return tmp_path


class TestBroken:
    def test_are_named_together_by_their_paths(self, broken):
        with pytest.raises(BrokenImagesError) as caught:
            load_data(broken)
        text = str(caught.value)
        assert "has 4 images that cannot be used" in text
        for name in ("ant/0.png (not an image)", "ant/3.png (", "owl/1.png (not an image)", "owl/9.png ("):
            assert f"{broken}/{name}" in text
        assert text.endswith("set on_error='skip' to go on without such images")
        assert "\n" not in text

    def test_many_are_counted(self, tmp_path):
        write(tmp_path / "ant", 1)
        for number in range(150):
            (tmp_path / "ant" / f"x{number:03}.png").write_bytes(b"x")
        with pytest.raises(BrokenImagesError, match=r"has 150 images .*x019\.png .* and 130 more; replace"):
            load_data(tmp_path)
        data = load_data(tmp_path, on_error="skip")
        assert (len(data), data.skipped) == (1, 150)

    @both
    def test_skip_goes_on_without_them_and_counts(self, broken, streamed):
        data = read(broken, streamed=streamed, on_error="skip")
        images, labels = next(data.batches(9))
        assert (images[:, 0, 0, 0] * 255).round().int().tolist() == [1, 2, 0, 2]
        assert labels.tolist() == data.labels.tolist() == [0, 0, 1, 1]
        assert data.skipped == data.subset(2).skipped == 4
        (note,) = data.notes
        assert "[train] was read without 4 images that cannot be used: ant/0.png (not an image), ant/3.png (" in note
        assert f"{broken}/ant" not in note, "a report may leave this machine"

    def test_a_batch_of_a_stream_names_all_of_its_own(self, broken):
        data = read(broken, streamed=True, channels=3)
        with pytest.raises(BrokenImagesError, match=r"2 images .*/ant/0\.png .*/ant/3\.png"):
            next(data.batches(4))

    @both
    def test_nothing_left_is_an_error(self, tmp_path, streamed):
        (tmp_path / "ant").mkdir()
        (tmp_path / "ant" / "0.png").write_bytes(b"x")
        with pytest.raises(BrokenImagesError, match=r"1 image that cannot be used: .*/ant/0\.png"):
            read(tmp_path, streamed=streamed, on_error="skip")

    @both
    def test_of_a_table(self, tmp_path, streamed, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write(tmp_path / "ant", 1, size=(6, 8))
        good = (tmp_path / "ant" / "0.png").read_bytes()
        cells = [{"bytes": good, "path": "a.png"}, {"bytes": b"x", "path": "b.png"}, None]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        file = tmp_path / "t.parquet"
        datasets.Dataset.from_dict({"image": cells, "label": [0, 0, 0]}, features=features).to_parquet(file)
        data = read(file, streamed=streamed, on_error="skip")
        assert len(data) == 1
        assert "row 1 (b.png) (not an image), row 2 (the row has no image)" in data.notes[0]

    def test_an_unknown_policy(self, tmp_path):
        with pytest.raises(ValueError, match="unknown on_error 'ignore'"):
            load_data(tmp_path, on_error="ignore")


class TestSparseNumbers:
    @staticmethod
    def table(folder: Path, labels: list[int]) -> Path:
        import datasets

        pictures = [Image.new("RGB", (8, 6), (label % 250, 0, 0)) for label in labels]
        datasets.Dataset.from_dict({"image": pictures, "label": labels}).to_parquet(folder / "t.parquet")
        return folder / "t.parquet"

    @both
    def test_become_named_classes(self, tmp_path, streamed, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data = read(self.table(tmp_path, [300, 100, 200, 100]), streamed=streamed)
        assert (data.classes, data.labels.tolist(), data.named) == (("100", "200", "300"), [2, 0, 1, 0], False)
        assert "labels of" in data.notes[0]
        assert "are 3 of the numbers from 100 to 300; each of them became a class of that name" in data.notes[0]

    def test_of_a_test_split_are_matched_by_number(self, tmp_path):
        data = load_data(self.table(tmp_path, [200, 200]), classes=["100", "200", "300"])
        assert (data.labels.tolist(), data.num_classes) == ([1, 1], 3)
        with pytest.raises(ValueError, match="labels from 150 to 150 but 3 classes"):
            load_data(self.table(tmp_path, [150]), classes=["100", "200", "300"])

    @pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 3], [0, 9], [5], list(range(0, 20, 2))])
    def test_others_stay_what_they_are(self, tmp_path, labels):
        data = load_data(self.table(tmp_path, labels))
        assert data.labels.tolist() == labels
        assert data.num_classes == max(labels) + 1
