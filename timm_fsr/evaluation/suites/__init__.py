"""Attack suites: one file for each family, found by name."""
