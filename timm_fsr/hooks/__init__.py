"""Hooks: feature layers on the blocks of any timm model."""
