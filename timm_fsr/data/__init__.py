"""Images and labels: where they come from, how they are decoded, ordered and augmented."""
