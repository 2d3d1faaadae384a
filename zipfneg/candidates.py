"""What stands on either side of a query."""

from typing import NamedTuple

import numpy as np

from .interop import Array, as_array


class Candidates(NamedTuple):
    """Items to score against queries: one positive for each query, or the negatives.

    A named tuple, hence a pytree in every framework. What is not known stays None.

    Parameters
    ----------
    ids : positives (B,); negatives (S,) shared by all queries, or (B, S) for each its own.
    embeddings : ``ids``' shape and a last dimension D.
    log_q : log of the expected number of times each id stands among the candidates, in nats;
        shaped like `ids`.
    bias : added to the score before the temperature; shaped like `ids`.
    """

    ids: Array | None = None
    embeddings: Array | None = None
    log_q: Array | None = None
    bias: Array | None = None


def as_candidates(name: str, x: Candidates | Array) -> Candidates:
    """A plain array means embeddings alone."""
    if isinstance(x, Candidates):
        return x
    if isinstance(x, tuple):
        raise TypeError(f"{name}: expected Candidates or an array of embeddings, got a tuple")
    return Candidates(embeddings=x)


def as_temperature(value: float | Array) -> float:
    """A checked number, given as such or as an array without dimensions."""
    array = np.asarray(value if isinstance(value, int | float) else as_array(value, "temperature"))
    if array.ndim or (array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16"):
        raise TypeError(f"temperature: expected a number, got {array.dtype} of shape {array.shape}")
    tau = float(array)
    if not 1e-30 < tau < 1e30:  # its reciprocal, too, is a float32
        raise ValueError(
            f"temperature: expected a finite number above 0, got {tau} (the range is 1e-30 to 1e30)"
        )
    return tau
