"""Numba kernels for the CPU: they trust their caller and release the interpreter's lock."""
