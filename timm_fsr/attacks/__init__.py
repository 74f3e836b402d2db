"""Attacks: each maximises a loss it is handed, and knows nothing of models, data or training."""
