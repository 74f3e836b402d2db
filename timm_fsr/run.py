"""Run a script that knows timm alone with the FSR variants registered: `python -m timm_fsr.run train.py ...`."""

import runpy
import sys
from pathlib import Path

import timm_fsr  # noqa: F401  (registers the variants)


def main(arguments: list[str]) -> int:
    """Run the script `arguments[0]` as `__main__` with the other arguments."""
    if not arguments or not Path(arguments[0]).is_file():
        sys.stderr.write("usage: python -m timm_fsr.run SCRIPT.py [ARGUMENTS ...]\n")
        return 2
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
