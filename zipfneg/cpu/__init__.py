"""Numba kernels for the CPU: they trust their caller and release the interpreter's lock."""

from typing import Any

from numba import njit


def kernel(function: Any, **more: Any) -> Any:
    """Compile at the first call, and keep the result on disk where there is a place for it."""
    # NumPy's division: one that may raise is a branch in every loop.
    options: Any = {"nogil": True, "error_model": "numpy", **more}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**options)(function)
