"""Provenance: the report that training has left beside a model, wherever that came from."""

from __future__ import annotations

from pathlib import Path

from timm.models._hub import download_from_hf
from torch import nn

from timm_fsr.hub import FOLDER, HUB, resolve, weights_digest
from timm_fsr.models import list_pretrained
from timm_fsr.pretrained import REPORT
from timm_fsr.remote import explained
from timm_fsr.report import Report


def training_report(name: str, model: nn.Module) -> Report | None:
    """What training has said of a model, such as the split that chose the checkpoint; None if it has left nothing.

    Args:
        name: of the model, as `timm_fsr.hub.load` takes it: a folder, a pretrained tag or a repository of the Hub.
        model: what was loaded. A report of other weights says nothing about it and is left out.

    Raises:
        ValueError: the report is damaged.
    """
    path = _find(resolve(name))
    if path is None or not path.is_file():
        return None
    report = Report.load(path)
    recorded = report.conditions.get("weights_sha256")
    return report if recorded in (None, weights_digest(model)) else None


def _find(name: str) -> Path | None:
    if name.startswith(FOLDER):
        return Path(name.removeprefix(FOLDER)) / REPORT
    if name.startswith(HUB):
        return _of_hub(name.removeprefix(HUB))
    return next((entry.folder / REPORT for entry in list_pretrained() if entry.name == name), None)


def _of_hub(repository: str) -> Path | None:
    """The report in a repository; None where it has none, or where it cannot be had now."""
    try:
        with explained(repository):
            return Path(download_from_hf(repository, REPORT))
    except OSError:  # the weights were there: what they were chosen by must not keep them from being judged
        return None
