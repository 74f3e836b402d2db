"""Picture files: how they are found, and that every mode is read as a viewer shows it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from timm_fsr.data.pictures import find_pictures, read_picture, to_mode


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "inside/c.webp", ".hidden/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


class TestFinding:
    def test_a_folder_gives_the_images_in_it_and_in_its_folders(self, folder):
        assert [path.name for path in find_pictures([folder])] == ["a.JPG", "b.png", "c.webp"]

    def test_a_pattern_gives_images_alone(self, folder):
        assert [path.name for path in find_pictures([f"{folder}/*"])] == ["a.JPG", "b.png"]
        assert [path.name for path in find_pictures([f"{folder}/**/*.webp"])] == ["c.webp"]

    def test_a_named_file_is_taken_whatever_its_ending(self, folder):
        assert find_pictures([folder / "notes.txt"]) == [folder / "notes.txt"]

    def test_each_file_comes_once_in_the_order_given(self, folder):
        assert [path.name for path in find_pictures([folder / "b.png", folder])] == ["b.png", "a.JPG", "c.webp"]

    def test_a_name_with_brackets_is_a_file_if_there_is_one(self, folder):
        (folder / "x[1].png").write_bytes(b"")
        assert find_pictures([folder / "x[1].png"]) == [folder / "x[1].png"]

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ("nowhere.png", FileNotFoundError, "there is no image nowhere.png"),
            ("no*.png", ValueError, "nothing matches it"),
            ("*.txt", ValueError, "the 1 that it matches are none"),
            ("empty", ValueError, "the folder empty holds no images"),
        ],
    )
    def test_mistakes(self, folder, monkeypatch, source, error, message):
        monkeypatch.chdir(folder)
        (folder / "empty").mkdir()
        with pytest.raises(error, match=message):
            find_pictures([source])

    def test_nothing_given(self):
        with pytest.raises(ValueError, match="no images were given"):
            find_pictures([])


RED, GREY = (200, 30, 30), 96


def made(mode: str) -> Image.Image:
    """A picture of one grey, or of a red where the mode has colour."""
    if mode == "P":
        return Image.new("RGB", (6, 4), RED).quantize(4)
    if mode in ("RGB", "CMYK", "YCbCr", "HSV", "RGBA", "RGBX"):
        return Image.new("RGB", (6, 4), RED).convert(mode)
    if mode == "I;16":
        return Image.fromarray(np.full((4, 6), GREY * 257, dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(np.full((4, 6), GREY * 257, dtype=np.int32))
    if mode == "F":
        return Image.fromarray(np.full((4, 6), GREY / 255, dtype=np.float32))
    if mode == "1":
        return Image.new("1", (6, 4), 1)
    return Image.new("L", (6, 4), GREY).convert(mode)


FILES = [("RGB", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("RGBA", "webp")]
FILES += [("L", "png"), ("LA", "png"), ("1", "png"), ("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif")]


class TestModes:
    @pytest.mark.parametrize(("mode", "ending"), FILES)
    def test_every_mode_of_a_file(self, tmp_path, mode, ending):
        made(mode).save(tmp_path / f"x.{ending}")
        colour = read_picture(tmp_path / f"x.{ending}", 3)
        grey = read_picture(tmp_path / f"x.{ending}", 1)
        assert (colour.mode, colour.size, grey.mode, grey.size) == ("RGB", (6, 4), "L", (6, 4))
        if mode in ("RGB", "CMYK", "P", "RGBA"):
            expected, brightness = RED, Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
        else:
            brightness = 255 if mode == "1" else GREY
            expected = (brightness,) * 3
        assert colour.getpixel((3, 2)) == pytest.approx(expected, abs=12)
        assert grey.getpixel((3, 2)) == pytest.approx(brightness, abs=6)

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "La", "I;16"])
    def test_modes_that_only_pictures_in_memory_have(self, mode):
        assert to_mode(made("LA").convert("La") if mode == "La" else made(mode), 3).mode == "RGB"

    def test_what_is_transparent_is_white(self, tmp_path):
        clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        clear.putpixel((0, 0), (255, 0, 0, 255))
        assert to_mode(clear, 3).getpixel((3, 3)) == (255, 255, 255)
        assert to_mode(clear, 3).getpixel((0, 0)) == (255, 0, 0)
        assert to_mode(clear.convert("LA"), 1).getpixel((3, 3)) == 255
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.save(tmp_path / "x.png", transparency=0)
        assert read_picture(tmp_path / "x.png", 3).getpixel((0, 0)) == (255, 255, 255)

    def test_it_is_turned_as_its_exif_says(self, tmp_path):
        picture = Image.new("RGB", (8, 4), "black")
        picture.paste((255, 255, 255), (0, 0, 4, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
        picture.save(tmp_path / "x.png", exif=exif)
        turned = read_picture(tmp_path / "x.png", 1)
        assert turned.size == (4, 8)
        assert (turned.getpixel((2, 0)), turned.getpixel((2, 7))) == (255, 0)

    def test_of_an_animation_the_first_picture(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
        assert read_picture(tmp_path / "x.gif", 3).getpixel((0, 0)) == (255, 0, 0)

    def test_whole_numbers_up_to_255_stay_as_they_are(self):
        assert to_mode(Image.fromarray(np.full((2, 2), 96, dtype=np.int32)), 1).getpixel((0, 0)) == 96

    @pytest.mark.parametrize("value", [-1.0, 1000.0, float("nan")])
    def test_floats_of_unknown_range_are_refused(self, value):
        with pytest.raises(ValueError, match="black and white are unknown"):
            to_mode(Image.fromarray(np.full((2, 2), value, dtype=np.float32)), 1)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"x\.png is no image that Pillow can read"):
        read_picture(tmp_path / "x.png", 3)
    made("RGB").resize((200, 200)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be decoded"):
        read_picture(tmp_path / "cut.jpg", 3)
    with pytest.raises(OSError, match="directory"):
        read_picture(tmp_path, 3)
