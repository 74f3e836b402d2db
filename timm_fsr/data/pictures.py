"""Single picture files: found by path, folder or pattern, and read in any mode as grey or RGB."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from timm_fsr.data.decoding import one_line
from timm_fsr.data.folders import is_junk

ENDINGS = frozenset(
    f".{name}"
    for group in ("avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg", "pbm pgm png pnm ppm tga tif tiff webp")
    for name in group.split()
)
"""Files that count as images in a folder; a file that is named itself is read whatever its ending."""

_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def find_pictures(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that `sources` name, each once.

    Args:
        sources: files, folders (all images in them, also in folders inside, but no files that systems leave there), or
            patterns such as "photos/*.jpg" and "photos/**/*.png".

    Returns:
        Files in the order of `sources`; those of a folder or pattern sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder or pattern without images, or no source at all.
    """
    found: dict[Path, None] = {}
    for source in sources:
        found.update(dict.fromkeys(_of_one(str(source))))
    if not found:
        raise ValueError("no images were given; name files, folders or patterns such as 'photos/*.jpg'")
    return list(found)


def _of_one(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (file for file in path.rglob("*") if not any(map(is_junk, file.relative_to(path).parts)))
        images = sorted(file for file in inside if file.suffix.lower() in ENDINGS and file.is_file())
        if not images:
            raise ValueError(f"the folder {source} holds no images; their names end in {', '.join(sorted(ENDINGS))}")
        return images
    if path.exists():
        return [path]
    if not glob.has_magic(source):
        raise FileNotFoundError(f"there is no image {source}; check the path and the working directory")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    images = [match for match in matches if match.is_file() and match.suffix.lower() in ENDINGS]
    if not images:
        why = f"the {len(matches)} that it matches are none" if matches else "nothing matches it"
        raise ValueError(f"the pattern {source} gives no images ({why}); quote it, or check the working directory")
    return images


def read_picture(path: str | Path, channels: int) -> Image.Image:
    """The picture of a file as `to_mode` gives it, the first one of several (animations, TIFF pages).

    Raises:
        ValueError: it cannot be decoded.
        OSError: the file cannot be read.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return to_mode(picture, channels)
    except (PermissionError, FileNotFoundError, IsADirectoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read; convert it to PNG or JPEG") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be decoded ({one_line(error)}); fetch it again, or convert it to PNG or JPEG"
        ) from error


def to_mode(picture: Image.Image, channels: int) -> Image.Image:
    """A picture as a viewer shows it, in 8 bits.

    It is turned as its EXIF orientation says, put on white where it is transparent, and scaled down from 16 or 32 bits.

    Args:
        picture: of any mode.
        channels: 1 for grey ("L"), 3 for RGB.

    Raises:
        ValueError: a mode without a conversion, or numbers whose range is unknown.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        picture = _in_8_bits(picture)
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of whole numbers up to 65535 or 255, or of floats up to 1 or 255."""
    values = np.asarray(picture).astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    deep = picture.mode.startswith("I;16") or (picture.mode == "I" and high > 255)
    top = 65535.0 if deep else 1.0 if picture.mode == "F" and high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ValueError(f"its pixels lie in [{low:g}, {high:g}], so that black and white are unknown")
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))
