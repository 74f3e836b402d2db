"""Hooks: feature layers on the blocks of any timm model."""

import timm  # noqa: F401  (first: it registers the variants, which need modules of this room that are whole)
