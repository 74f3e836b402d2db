"""The flags of timm-fsr predict."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser
from timm_fsr.cli.parsers.model_flags import add_device_flag, add_model_flags
from timm_fsr.utils.defaults import PRECISIONS, PREDICT_BATCH_SIZE

_DESCRIPTION = """Name what a model sees in images, and how sure it is.

Images of any mode and size are prepared as the model was trained or evaluated. With --robustness, attacks look for the
smallest eps at which the answer changes: an upper bound, as a stronger attack may need less."""


def predict_parser() -> CommandParser:
    """The flags of `timm-fsr predict`."""
    parser = CommandParser(
        "predict",
        usage="timm-fsr predict MODEL IMAGE [IMAGE ...] [FLAGS]",
        description=_DESCRIPTION,
        examples=(
            "predict runs/mine/best photo.jpg",
            "predict hf-hub:user/name photos --mask masks --topk 3",
            "predict runs/mine/best '*.png' --robustness --output found.csv",
        ),
    )
    add_model_flags(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files, folders (all images in them) or quoted patterns ('*.jpg')"
    )
    parser.add_argument("--topk", type=int, default=5, help="how many classes to name")
    parser.add_argument("--output", metavar="FILE", help="write the answers to a .csv or .json too")
    parser.add_argument(
        "--mask", metavar="FOLDER", help="draw each image with the feature layer's masks over it, as PNG files"
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, where the model knows none")
    parser.add_argument("--size", type=int, help="side of the images (default: the model's own)")
    robustness = parser.add_argument_group("robustness")
    robustness.add_argument(
        "--robustness", action="store_true", help="find the smallest eps at which attacks change each answer"
    )
    robustness.add_argument(
        "--norm", choices=["linf", "l2"], help="of that eps (default: that of the model's report, else linf)"
    )
    robustness.add_argument("--seed", type=int, default=0, help="of the attacks' random starts")
    computing = parser.add_argument_group("computing")
    computing.add_argument(
        "--batch-size", type=int, default=PREDICT_BATCH_SIZE, help="images per pass, to fit the memory"
    )
    computing.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the passes")
    add_device_flag(computing)
    parser.add_import()
    return parser
