"""Makes the Fashion-MNIST subset inside the package from the official IDX files.

    python benchmarks/make_embedded_fashion_mnist.py --idx /usr/share/datasets/fashion-mnist

The folder is the one of Debian's package `dataset-fashion-mnist`; the files of
https://github.com/zalandoresearch/fashion-mnist are the same. The images chosen depend on the seed alone.
"""

import argparse
import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image

from timm_fsr.data.dataset import ImageData, load_data

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
COUNTS = {"train": 10_000, "test": 2_000}
SEED = 0
FOLDER = Path(__file__).parents[1] / "timm_fsr" / "data" / "embedded" / "fashion_mnist"


def main() -> None:
    """Writes one Parquet file per split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx", required=True, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: the package's)")
    options = parser.parse_args()
    for split, count in COUNTS.items():
        data = load_data(options.idx, split, classes=CLASSES).subset(count, seed=SEED)
        path = options.out / f"{split}.parquet"
        write(data, path)
        print(f"{path.name}: {len(data)} images, {path.stat().st_size} bytes, fingerprint {data.fingerprint}")


def write(data: ImageData, path: Path) -> None:
    """Writes grey images as PNG in a `datasets` Image column beside a ClassLabel column.

    The PNGs are not compressed: Zstandard over all of them makes a smaller file than each one's own deflate.
    """
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(data.classes))})
    images = [{"bytes": png(Image.fromarray(image[0].numpy())), "path": None} for image in data.images]
    table = datasets.Dataset.from_dict({"image": images, "label": data.labels.tolist()}, features=features)
    pq.write_table(
        table.data.table.cast(features.arrow_schema),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
    )


def png(image: Image.Image) -> bytes:
    """The bytes of an uncompressed PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()


if __name__ == "__main__":
    main()
