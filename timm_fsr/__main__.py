"""`python -m timm_fsr` is the command `timm-fsr`."""

import sys

from timm_fsr.cli.main import main

sys.exit(main())
