"""Reports: the outcome of an evaluation as data, as statistics and as a page."""
