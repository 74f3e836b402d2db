"""`--import FILE_OR_MODULE`, with any command: code that registers layers, objectives, attacks or suites."""

from __future__ import annotations

from collections.abc import Sequence

from timm_fsr.utils.registry import import_extension, split_imports


def import_given(arguments: Sequence[str]) -> list[str]:
    """Import what `--import` names.

    Args:
        arguments: of a command.

    Returns:
        The arguments without `--import` and its values.

    Raises:
        FileNotFoundError, ValueError: see `timm_fsr.utils.registry.import_extension`.
    """
    sources, others = split_imports(arguments)
    for source in sources:
        import_extension(source)
    return others
