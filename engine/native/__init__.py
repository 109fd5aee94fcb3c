"""Machine code: compiled, kept on disk, loaded, run by a team of threads; and what this machine offers for it."""
