"""The flags of timm-fsr recipes."""

from __future__ import annotations

from timm_fsr.cli.help import CommandParser


def recipes_parser() -> CommandParser:
    """The flags of `timm-fsr recipes`."""
    parser = CommandParser(
        "recipes",
        description="List the recipes that come with the package, or print one, to train by it as it is or to change a "
        "copy. `timm-fsr train --config NAME` takes each by its name.",
        examples=(
            "recipes",
            "recipes cifar10_resnet18",
            "recipes finetune_folder --output my_recipe.yaml",
        ),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print (default: list all)")
    parser.add_argument("--output", metavar="FILE", help="copy the recipe there (default: print it)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--json", action="store_true", help="list as JSON")
    return parser
