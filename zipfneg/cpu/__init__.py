"""Numba kernels for the CPU: they trust their caller and release the interpreter's lock."""

from typing import Any

from numba import njit


def kernel(function: Any) -> Any:
    """Compile at the first call, and keep the result on disk where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True)(function)
