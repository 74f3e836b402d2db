"""`accelerate launch recipes/train.py --config recipe.yaml [--optim.epochs=5 ...]`: train by a recipe."""

import sys

from timm_fsr.cli.main import main  # before torch: the package bounds how long waiting threads spin

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
