"""Where a target stands among scores, ties told apart from losses."""

import numpy as np

from ..checks import NDArray


def tie_tolerance(u: NDArray, v: NDArray, score: NDArray, temperature: float = 1.0) -> NDArray:
    """(B,) how far two computations of the score (u·v + b)/τ may differ by rounding.

    Copies of one item get scores that differ in the last digits, by their place in a block of a
    matrix product. Without this they would win or lose at random, instead of being tied. The
    rounding errors of a sum of D terms grow like √D.
    """
    terms = np.einsum("bd,bd->b", np.abs(u), np.abs(v)) / u.dtype.type(temperature)
    eps = np.finfo(u.dtype).eps
    return u.dtype.type(0.5 * u.shape[1] ** 0.5 + 1) * eps * terms + 2 * eps * np.abs(score)


def count(z: NDArray, score: NDArray, tolerance: NDArray) -> tuple[NDArray, NDArray]:
    """Of each row of z (r, S): the number better than score (r,), and the number tied with it.

    What is NaN counts as better: a broken model must not look good.
    """
    not_better = np.count_nonzero(z <= (score + tolerance)[:, None], axis=1)
    worse = np.count_nonzero(z < (score - tolerance)[:, None], axis=1)
    return z.shape[1] - not_better, not_better - worse
