"""timm-fsr train: train a model by a recipe."""

from __future__ import annotations

from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train


def train_command(recipe: Recipe) -> None:
    """`timm-fsr train`: train a model by a recipe."""
    train(recipe)
