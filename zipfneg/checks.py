"""Checks at the public edge: what was expected, what came, what to do."""

import operator
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]

FLOATS = {np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as a Python int in [low, high]."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not low <= result <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {result}")
    return result


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}: expected one of {names}, got {value!r}")


def shape(name: str, array: NDArray, expected: Sequence[int], letters: str) -> None:
    """`letters` says what the sizes mean, as in "(B, D)"."""
    if array.shape != tuple(expected):
        raise ValueError(f"{name}: expected shape {letters} = {tuple(expected)}, got {array.shape}")


def floating(name: str, array: NDArray) -> None:
    if array.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {array.dtype}"
        )


def integral(name: str, array: NDArray) -> None:
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer dtype, got {array.dtype}")


def finite(name: str, array: NDArray, hint: str = "") -> None:
    if not np.isfinite(array).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        raise ValueError(f"{name}: expected finite values, got {array[where]} at {where}{hint}")
