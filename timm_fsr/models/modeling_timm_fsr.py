"""How transformers finds a model that timm_fsr saved: it reads this file with `trust_remote_code=True`.

All code is in the package: `pip install "timm-fsr[transformers]"`.
"""

from timm_fsr.models.for_transformers import TimmFsrConfig, TimmFsrForImageClassification, TimmFsrImageProcessor

__all__ = ["TimmFsrConfig", "TimmFsrForImageClassification", "TimmFsrImageProcessor"]
