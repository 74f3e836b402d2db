"""Run a script that knows timm alone with the FSR variants registered: `python -m timm_fsr.run train.py ...`."""

import runpy
import sys
from pathlib import Path

import timm_fsr  # noqa: F401  (registers the variants)
from timm_fsr.utils.errors import UnsoundError


def main(arguments: list[str]) -> int:
    """Run the script `arguments[0]` as `__main__` with the other arguments."""
    if not arguments or not Path(arguments[0]).is_file():
        sys.stderr.write("usage: python -m timm_fsr.run SCRIPT.py [ARGUMENTS ...]\n")
        return 2
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except UnsoundError as error:  # the script knows nothing of it; its own errors keep their traces
        sys.stderr.write(f"{arguments[0]}: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
