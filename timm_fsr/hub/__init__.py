"""The Hub: publishing a model with its card, report and recipe."""
