"""Rescoring: the attacked images of an earlier evaluation, tried on the same or another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_fsr.attacked import attacked_batches, attacked_suites
from timm_fsr.attacks import attack_mode
from timm_fsr.inference import check_channels, full_precision, predict
from timm_fsr.pixels import as_pixel_model
from timm_fsr.soundness import check_model

__all__ = ["Rescored", "rescore"]


@dataclass(frozen=True, eq=False)
class Rescored:
    """What has become of one attack's images.

    Attributes:
        correct: (N,) bool: was the attacked image classified correctly?
        perturbed: (N,) bool: had the attack changed the image at all?
    """

    correct: Tensor
    perturbed: Tensor

    def sentence(self) -> str:
        """Both in words."""
        count, changed = len(self.correct), int(self.perturbed.sum())
        text = f"{100 * int(self.correct.sum()) / count:.2f} % right ({count} images)"
        if changed == count:
            return text
        right = int((self.correct & self.perturbed).sum())
        share = f", of which {100 * right / changed:.2f} % are right" if changed else ""
        return (
            f"{text}; the attack changed {changed} of them{share}: for a fair transfer save images of an attack that "
            "changes every one, such as pgd100 or apgd100"
        )


def rescore(model: nn.Module, folder: str | Path) -> dict[str, Rescored]:
    """Try the attacked images of an earlier evaluation with `save_images` on a model, be it the same or another.

    Args:
        model: a timm model or a pixel-space model.
        folder: of the evaluation.

    Returns:
        The outcome of each attack, by its folder's name.

    Raises:
        FileNotFoundError: there are no attacked images in the folder.
        ValueError: they are damaged, or do not fit the model.
    """
    pixel_model = as_pixel_model(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outcomes: dict[str, Rescored] = {}
    with attack_mode(pixel_model), full_precision(device):
        check_model(pixel_model)
        for suite in attacked_suites(Path(folder)):
            correct, perturbed = [], []
            for batch in attacked_batches(Path(folder), suite):
                check_channels(pixel_model, batch.images)
                found = predict(pixel_model, batch.images.to(device), suite).cpu()
                correct.append(found == batch.labels)
                perturbed.append(batch.perturbed)
            outcomes[suite] = Rescored(torch.cat(correct), torch.cat(perturbed))
    return outcomes
