"""Images per second from the disk to augmented batches, and how many of them training takes in on the same core.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --data FOLDER --batch 128 --rounds 9     a folder with train-*.parquet files

Ours reads and decodes a data set once, before the training, and augments whole batches; streamed, it decodes each
image when it is needed. The other is what is usual: `datasets` in a `torch.utils.data.DataLoader` that decodes each
image and applies torchvision's RandomCrop, RandomHorizontalFlip and ToTensor to it. All run in this process, without
workers, so that their CPU time is that of one core; the consumers, steps of adversarial training, are timed in turn
with them. "Ours, first epoch" includes reading and decoding, which only the first epoch of a run pays for.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from side_by_side import ROOT, Timing, adversarial_step, parser, random_batch, time_in_turn, write
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_fsr.cli.demo import quickstart_recipe
from timm_fsr.data.augment import Augmentation
from timm_fsr.data.dataset import ImageData, Images, load_data
from timm_fsr.data.sampling import training_batches
from timm_fsr.data.sources import EMBEDDED
from timm_fsr.data.streaming import stream_data

PLAIN = "torchvision transforms in a DataLoader"
OURS = {"memory": "ours", "first": "ours, first epoch", "streamed": "ours, streamed"}
GOAL = 20
EMBEDDED_FILES = ROOT / "timm_fsr" / "data" / "embedded" / EMBEDDED


def main() -> None:
    """Time loaders and consumers in turn."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)  # where mapped files are copied to
        data = load_data(args.data, limit=args.limit, progress=False)
        loaders, consumers = loading(data, args, Path(folder)), consuming(data, args)
        timings = time_in_turn({**loaders, **{name: step for name, (step, _) in consumers.items()}}, rounds=args.rounds)
    per_epoch = len(data) // args.batch * args.batch
    supply = {name: per_epoch / timings[name].median for name in loaders}
    demand = {name: images / timings[name].median for name, (_, images) in consumers.items()}
    print(f"{data.name}, {len(data)} images of {'x'.join(map(str, data.image_size))}, batches of {args.batch}\n")
    print(markdown(supply, demand))
    write(args.json, results(data, timings, supply, demand))


def parse_args() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__, "data_loading")
    result.add_argument("--data", default=EMBEDDED, help="folder of Parquet files (default: the embedded subset)")
    result.add_argument("--limit", type=int, help="largest number of images (default: all)")
    result.add_argument("--batch", type=int, default=128, help="images of a loaded batch")
    result.add_argument("--rounds", type=int, default=3, help="timed rounds")
    result.add_argument("--demo-batch", type=int, default=128, help="images of a step of the demonstration's network")
    result.add_argument("--large-batch", type=int, default=8, help="images of a step of resnet18_cifar_fsr")
    result.add_argument("--large-steps", type=int, default=10, help="PGD steps of resnet18_cifar_fsr")
    return result.parse_args()


def loading(data: ImageData, args: argparse.Namespace, cache: Path) -> dict[str, Callable[[], object]]:
    """By name, functions that go through one epoch of augmented batches each."""
    read = partial(load_data, args.data, limit=args.limit, progress=False)
    streamed = stream_data(args.data, size=data.image_size[1:], limit=args.limit, workers=0)
    plain = usual_loader(args.data, args.limit, data, args.batch, cache)
    return {
        PLAIN: lambda: exhaust(plain),
        OURS["memory"]: lambda: exhaust(epoch(data, args.batch)),
        OURS["first"]: lambda: exhaust(epoch(read(), args.batch)),
        OURS["streamed"]: lambda: exhaust(epoch(streamed, args.batch)),
    }


def epoch(data: Images, batch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """One epoch of our batches, as the training loop draws them."""
    return training_batches(data, batch_size=batch, seed=0, epoch=0, augmentation=Augmentation(padding=4))


def usual_loader(
    source: str, limit: int | None, data: ImageData, batch: int, cache: Path
) -> Iterable[tuple[Tensor, Tensor]]:
    """A DataLoader over the same Parquet files whose data set transforms one image at a time."""
    folder = EMBEDDED_FILES if source == EMBEDDED else Path(source)
    files = sorted(str(path) for path in [*folder.glob("train*.parquet"), *folder.glob("train/*.parquet")])
    if not files:
        raise SystemExit(f"{source} holds no train*.parquet; give a folder that does")
    table = datasets.Dataset.from_parquet(files, cache_dir=str(cache))
    image, label = (next(name for name in names if name in table.column_names) for names in COLUMNS)
    table = table if limit is None else table.select(range(min(limit, len(table))))
    augment = transforms.Compose(
        [
            transforms.RandomCrop(data.image_size[1:], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [augment(picture) for picture in rows[image]], "label": rows[label]}

    return DataLoader(table.with_transform(transform), batch_size=batch, shuffle=True, drop_last=True, num_workers=0)


COLUMNS = (("image", "img"), ("label", "labels", "fine_label"))


def exhaust(batches: Iterable[Any]) -> None:
    """Take every batch."""
    for _ in batches:
        pass


def consuming(data: ImageData, args: argparse.Namespace) -> dict[str, tuple[Callable[[], None], int]]:
    """By name, a training step and the number of its images: the demonstration's, and the paper's ResNet-18 by PGD."""
    recipe = quickstart_recipe()
    small = recipe.model.build(num_classes=data.num_classes, image_size=data.image_size)
    large = timm.create_model("resnet18_cifar_fsr", num_classes=data.num_classes)
    size = (3, 32, 32)
    steps = recipe.attack.steps or 10
    return {
        f"the demonstration's network, PGD-{steps}": (
            adversarial_step(
                small, *random_batch(args.demo_batch, data.image_size, data.num_classes, "cpu"), attack_steps=steps
            ),
            args.demo_batch,
        ),
        f"resnet18_cifar_fsr, PGD-{args.large_steps}": (
            adversarial_step(
                large, *random_batch(args.large_batch, size, data.num_classes, "cpu"), attack_steps=args.large_steps
            ),
            args.large_batch,
        ),
    }


def markdown(supply: dict[str, float], demand: dict[str, float]) -> str:
    """Loaders down, consumers across: how many times more images a loader gives than the step takes."""
    lines = [
        f"| loader | images/s | {' | '.join(f'{name}: {rate:.0f} images/s' for name, rate in demand.items())} |",
        f"| --- | --- | {' | '.join('---' for _ in demand)} |",
    ]
    for name, rate in supply.items():
        cells = [ratio(rate / needed) for needed in demand.values()]
        lines.append(f"| {name} | {rate:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(value: float) -> str:
    """A ratio of images loaded to images consumed, and whether it misses the goal."""
    return f"{value:.0f}x" if value >= GOAL else f"{value:.1f}x (below {GOAL}x)"


def results(
    data: ImageData, timings: dict[str, Timing], supply: dict[str, float], demand: dict[str, float]
) -> dict[str, Any]:
    """The figures for JSON."""
    return {
        "data": {"name": data.name, "images": len(data), "image_size": data.image_size},
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "images_per_second": {"loaders": supply, "consumers": demand},
        "ratios": {
            name: {consumer: rate / needed for consumer, needed in demand.items()} for name, rate in supply.items()
        },
    }


if __name__ == "__main__":
    main()
