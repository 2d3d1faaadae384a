"""Numba kernels for CUDA, the twins of `zipfneg.cpu`: over CuPy arrays, on its current stream.

Under ``NUMBA_ENABLE_CUDASIM=1`` they run in Numba's simulator, on NumPy arrays.
"""

import numba

SIMULATED = bool(vars(numba.config)["ENABLE_CUDASIM"])
