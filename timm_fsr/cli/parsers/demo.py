"""The flags of timm-fsr demo."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser


def demo_parser() -> CommandParser:
    """The flags of `timm-fsr demo`."""
    parser = CommandParser(
        "demo",
        description="Train a small network adversarially with and without FSR on embedded Fashion-MNIST, and compare.",
        examples=(
            "demo",
            "demo --epochs 3 --limit 2000",
            "demo --seed 1 --output demo_seed_1",
        ),
    )
    parser.add_argument("--output", default="timm_fsr_demo", help="folder of the results")
    parser.add_argument("--epochs", type=int, help="of each training (default: 12)")
    parser.add_argument("--limit", type=int, help="largest number of training and of test images (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser
