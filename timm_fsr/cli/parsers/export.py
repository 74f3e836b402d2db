"""The flags of timm-fsr export."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser
from timm_fsr.cli.parsers.model_flags import add_model_flags
from timm_fsr.utils.defaults import EXPORTS

_DESCRIPTION = """Write a model as one file that others run without timm and timm_fsr.

model.pt2 needs torch alone, and gradients flow through it to the images, as attacks need them; model.onnx needs
onnxruntime. Both take images with pixels in [0, 1], any number at once, and return logits: mean and std are inside.
Each file is compared with the model before it is kept."""


def export_parser() -> CommandParser:
    """The flags of `timm-fsr export`."""
    parser = CommandParser(
        "export",
        description=_DESCRIPTION,
        examples=(
            "export runs/mine/best",
            "export runs/mine/best --output handed_out --formats pt2 onnx",
            "export hf-hub:user/name --output handed_out",
        ),
    )
    add_model_flags(parser)
    parser.add_argument("--output", metavar="FOLDER", help="where the files go (default: MODEL, if it is a folder)")
    parser.add_argument("--formats", nargs="+", choices=list(EXPORTS), default=["pt2"], help="which files")
    parser.add_argument("--size", type=int, help="side of the images (default: the model's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace such files in the folder")
    parser.add_import()
    return parser
