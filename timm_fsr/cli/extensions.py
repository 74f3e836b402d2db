"""`--import FILE_OR_MODULE`, with any command: code that registers layers, objectives or attacks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timm_fsr.utils.registry import import_extension

IMPORT_HELP = "a Python file or module that registers layers, objectives or attacks; may be given several times"


def import_given(arguments: Sequence[str]) -> list[str]:
    """Import what `--import` names.

    Args:
        arguments: of a command.

    Returns:
        The arguments without `--import` and its values.

    Raises:
        FileNotFoundError, ValueError: see `timm_fsr.utils.registry.import_extension`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", action="append", default=[], dest="sources")
    found, rest = parser.parse_known_args(list(arguments))
    for source in found.sources:
        import_extension(source)
    return rest
