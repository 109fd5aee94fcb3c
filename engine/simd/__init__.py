"""Vectors for Numba code: the target (`target`), instruction emission (`vector`), and operations for kernels (`operations`)."""
