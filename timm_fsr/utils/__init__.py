"""What every room needs: files, random numbers, errors, processes, progress."""
