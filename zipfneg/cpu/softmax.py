"""The sampled softmax over blocks of rows: value, ranks and gradients in one pass each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..checks import NDArray
from .ranks import count, tie_tolerance

# Bytes of logits, and of converted per-query negatives, that stand at any one time.
WORKSPACE = 4 * 2**20


class Problem(NamedTuple):
    """Checked arrays in the dtype of accumulation; per-query negatives are converted blockwise."""

    queries: NDArray  # (B, D)
    positives: NDArray  # (B, D)
    negatives: NDArray  # (S, D) or (B, S, D)
    positive_bias: NDArray | None  # (B,)
    negative_bias: NDArray | None  # (S,) or (B, S)
    positive_log_q: NDArray | None  # (B,)
    negative_log_q: NDArray | None  # (S,) or (B, S)
    drop: Callable[[NDArray, int], None]  # writes −inf into a block of logits from a row on
    temperature: float


class Pass(NamedTuple):
    """What the logits give of each row."""

    # logsumexp_j z_j = shift + log(total). Kept apart: their sum, rounded, would lose digits of
    # the weights e^(z − shift)/total where scores are large.
    shift: NDArray  # (B,)
    total: NDArray  # (B,); 0 where no negative is left
    excess: NDArray  # (B,) D = logsumexp_j z_j − z_0, so that L = softplus(D)
    num_better: NDArray  # (B,) negatives that score above the positive, if asked for
    num_tied: NDArray  # (B,) negatives that score the same

    @property
    def loss(self) -> NDArray:
        return softplus(self.excess)


class Gradients(NamedTuple):
    """Of Σ_i d_i·L_i, in the dtype of accumulation."""

    queries: NDArray  # (B, D)
    positives: NDArray  # (B, D)
    negatives: NDArray  # (S, D) or (B, S, D)
    positive_bias: NDArray  # (B,)
    negative_bias: NDArray  # (S,) or (B, S)
    temperature: NDArray  # ()


def _rows(x: NDArray | None, shared_ndim: int, lo: int, hi: int) -> Any:
    """The block's part of a column array: all of it if shared, else its rows."""
    if x is None or x.ndim == shared_ndim:
        return x
    return x[lo:hi]


def positive_scores(problem: Problem) -> tuple[NDArray, NDArray]:
    """a_0 and z_0 = a_0 − log q_0, both (B,)."""
    a_0 = np.einsum("bd,bd->b", problem.queries, problem.positives)
    if problem.positive_bias is not None:
        a_0 += problem.positive_bias
    a_0 /= problem.temperature
    return a_0, a_0 if problem.positive_log_q is None else a_0 - problem.positive_log_q


def softplus(x: NDArray) -> NDArray:
    """log(1 + e^x), without overflow."""
    with np.errstate(invalid="ignore"):  # NaN passes through, unannounced as elsewhere
        return np.logaddexp(0, x)


def value(problem: Problem) -> Pass:
    return _run(problem, None, None, False)[0]


def value_and_gradients(
    problem: Problem, d_loss: NDArray, *, known: Pass | None = None, ranks: bool = False
) -> tuple[Pass, Gradients]:
    """`d_loss` (B,) weighs the rows. A `known` pass saves the row maximum and sum.

    `value`, then this with its result, is the exact forward and backward for any upstream gradient.
    """
    result, gradients = _run(problem, d_loss, known, ranks)
    assert gradients is not None
    return result, gradients


def _run(
    problem: Problem, d_loss: NDArray | None, known: Pass | None, ranks: bool
) -> tuple[Pass, Gradients | None]:
    """One pass over all blocks of rows."""
    u, p, v = problem.queries, problem.positives, problem.negatives
    (num_queries, dim), num_sampled, dtype = u.shape, v.shape[-2], u.dtype
    shared = v.ndim == 2
    tau = problem.temperature
    a_0, z_0 = positive_scores(problem)
    if known is None:
        shift, total, excess = (np.empty(num_queries, dtype) for _ in range(3))
    else:
        shift, total, excess = known[:3]
    better, tied = np.zeros((2, num_queries), np.int64)
    if ranks:
        tolerance = tie_tolerance(u, p, a_0, tau)
    if d_loss is not None:
        g_0 = np.empty(num_queries, dtype)
        d_u = np.empty_like(u)
        d_v = np.zeros((num_sampled, dim), dtype) if shared else np.empty(v.shape, v.dtype)
        d_bias = np.zeros(v.shape[:-1], dtype)

    row_bytes = max(1, num_sampled * (1 if shared else 1 + dim) * dtype.itemsize)
    height = max(1, min(num_queries, WORKSPACE // row_bytes))
    workspace = np.empty((height, num_sampled), dtype)
    for lo in range(0, num_queries, height):
        hi = min(lo + height, num_queries)
        z = workspace[: hi - lo]  # (r, S)
        u_scaled = u[lo:hi] / tau
        if shared:
            np.matmul(u_scaled, v.T, out=z)
        else:
            v_block = v[lo:hi].astype(dtype, copy=False)  # (r, S, D)
            np.matmul(v_block, u_scaled[:, :, None], out=z[:, :, None])
        if problem.negative_bias is not None:
            z += _rows(problem.negative_bias, 1, lo, hi) / dtype.type(tau)
        problem.drop(z, lo)
        if ranks:
            better[lo:hi], tied[lo:hi] = count(z, a_0[lo:hi], tolerance[lo:hi])
        if problem.negative_log_q is not None:
            z -= _rows(problem.negative_log_q, 1, lo, hi)

        if known is None:
            top = z.max(axis=1, initial=-np.inf)
            # A row with no negative left: any finite shift serves it.
            shift[lo:hi] = np.where(top == -np.inf, 0, top)
        z -= shift[lo:hi, None]
        e = np.exp(z, out=z)  # (r, S)
        if known is None:
            total[lo:hi] = e.sum(axis=1)
            with np.errstate(divide="ignore"):
                excess[lo:hi] = shift[lo:hi] - z_0[lo:hi] + np.log(total[lo:hi])

        if d_loss is not None:
            # g_0 = −d·σ(D) and g_j = d·σ(D)·softmax_j; the normaliser goes into the small factors.
            d_excess = d_loss[lo:hi] * np.exp(-softplus(-excess[lo:hi]))
            g_0[lo:hi] = -d_excess
            some = total[lo:hi] != 0
            scale = np.divide(d_excess, total[lo:hi], out=np.zeros_like(d_excess), where=some)
            u_scaled *= scale[:, None]
            if shared:
                np.matmul(e, v, out=d_u[lo:hi])
                d_v += e.T @ u_scaled
                d_bias += scale / tau @ e
            else:
                np.matmul(e[:, None, :], v_block, out=d_u[lo:hi, None, :])
                factors = (e[:, :, None], u_scaled[:, None, :])
                np.multiply(*factors, out=d_v[lo:hi], casting="unsafe")
                np.multiply(e, (scale / tau)[:, None], out=d_bias[lo:hi])
            d_u[lo:hi] *= (scale / tau)[:, None]

    result = Pass(shift, total, excess, better, tied)
    if d_loss is None:
        return result, None
    g_0 /= tau
    d_u += g_0[:, None] * p
    # Σ g·a = Σ u·dU + Σ b·db, because a = (u·v + b)/τ: no second look at the logits.
    d_tau = np.einsum("bd,bd->", u, d_u, dtype=np.float64)
    if problem.positive_bias is not None:
        d_tau += np.vdot(problem.positive_bias, g_0)
    if problem.negative_bias is not None:
        d_tau += np.vdot(problem.negative_bias, d_bias)
    d_tau = np.asarray(-d_tau / tau, dtype)
    return result, Gradients(d_u, g_0[:, None] * u, d_v, g_0, d_bias, d_tau)
