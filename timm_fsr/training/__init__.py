"""Training: a recipe is read, checked, run and concluded."""
