"""Compiling kernels with Numba and launching them through CuPy, which launches far faster."""

import inspect
import re
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numba import cuda, from_dtype, types

from . import SIMULATED

BLOCK = 256
# Kernels stride over what more threads would do. As many blocks as a large GPU holds at a time.
MAX_BLOCKS = 1024


def arrays() -> Any:
    """The array library of the arguments: CuPy, or NumPy in the simulator."""
    if SIMULATED:
        return np
    import cupy

    return cupy


class Kernel:
    """A CUDA kernel of one-dimensional C-contiguous arrays and 64-bit scalars.

    It is compiled at the first call for each device and each set of argument types.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._loaded: dict[Hashable, Any] = {}

    def __call__(self, num_threads: int, *arguments: Any) -> None:
        """Launch with about one thread each of `num_threads`."""
        blocks = max(1, min(-(-num_threads // BLOCK), MAX_BLOCKS))
        if SIMULATED:
            cuda.jit(self.function)[blocks, BLOCK](*arguments)
            return
        import cupy

        kinds = tuple(x.dtype if _is_array(x) else type(x) for x in arguments)
        key = (cupy.cuda.runtime.getDevice(), kinds)
        if key not in self._loaded:
            self._loaded[key] = self._load(kinds)
        self._loaded[key]((blocks,), (BLOCK,), _flattened(arguments))

    def _load(self, kinds: tuple[Any, ...]) -> Any:
        import cupy

        capability = cupy.cuda.Device().compute_capability
        cubin, name = self.compiled(kinds, (int(capability[:-1]), int(capability[-1])))
        module = cupy.cuda.function.Module()
        module.load(cubin)
        return module.get_function(name)

    def compiled(self, kinds: tuple[Any, ...], capability: tuple[int, int]) -> tuple[bytes, str]:
        """The machine code for a compute capability, and the kernel's name in it.

        `kinds` are the dtypes of array arguments and the types of scalar ones. No GPU is needed.
        """
        from cuda.core import Linker, LinkerOptions, ObjectCode

        ptx = self.ptx(kinds, capability)
        # Not by the driver, which may be older than the compiler.
        options = LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}")
        cubin = Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin")
        name = re.search(r"\.entry\s+(\w+)", ptx)
        assert name is not None
        return cubin.code, name[1]

    def ptx(self, kinds: tuple[Any, ...], capability: tuple[int, int]) -> str:
        signature: list[Any] = [
            _SCALARS.get(kind) or types.Array(from_dtype(kind), 1, "C") for kind in kinds
        ]
        parameters = inspect.signature(self.function).parameters.values()
        named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        if named < len(parameters):
            signature[named:] = [types.StarArgTuple(tuple(signature[named:]))]
        return cuda.compile_ptx(self.function, tuple(signature), cc=capability)[0]


_SCALARS = {int: types.int64, float: types.float64, np.uint64: types.uint64}


def _is_array(x: Any) -> bool:
    return getattr(x, "ndim", 0) > 0


def _flattened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The kernel's parameters as Numba lays them out, each of 64 bits.

    An array is its memory's owner, its parent, the number of items, their size, the address, the
    shape and the strides. The first two are of use on the host alone.
    """
    flat: list[Any] = []
    for x in arguments:
        if _is_array(x):
            flat += (0, 0, x.size, x.itemsize, x.data.ptr, x.size, x.itemsize)
        else:
            flat.append(x)
    return tuple(flat)


_beside: dict[int, dict[Hashable, Any]] = {}


def beside(owner: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for each current device and kept for as long as its owner lives.

    Not an attribute of the owner: it is not pickled with it.
    """
    if id(owner) not in _beside:
        _beside[id(owner)] = {}
        weakref.finalize(owner, _beside.pop, id(owner), None)
    kept = _beside[id(owner)]
    if not SIMULATED:
        key = (arrays().cuda.runtime.getDevice(), key)
    if key not in kept:
        kept[key] = make()
    return kept[key]
