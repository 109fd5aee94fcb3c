"""Vectors for Numba code: the CPU (`target`), its instructions (`vector`), and what kernels call (`operations`)."""
