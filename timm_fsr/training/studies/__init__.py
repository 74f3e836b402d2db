"""Studies: several trainings in one folder, shared by shells, resumed, and set side by side."""
