"""The losses beside the softmax, over blocks of rows: value, ranks and gradients in one pass each.

Each kernel takes a block's scores a (r, S), −inf where a negative is dropped, and leaves dL/da in
their place. It fills in the loss (r,) and g_0 = dL/da_0 (r,). `a_0` (r,) is that of the positive,
less its log q where corrected; `log_q` (r, S) or (1, S) is zero where nothing is; `parameter` (r,).
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from ..checks import NDArray
from ..scalar import d_sigmoid, decay, jitable, sigmoid, softplus
from . import kernel, softmax
from .ranks import count, tie_tolerance
from .softmax import Gradients, positive_scores
from .threads import for_spans

# Bytes of scores, and of converted per-query negatives, that stand at any one time.
WORKSPACE = 4 * 2**20
# Scores that are worth a thread.
GRAIN = 2**14

# A row's sums, in float64, may be taken in any order: in that of the terms they do not vectorise.
row_kernel = partial(kernel, fastmath={"reassoc", "contract"})


class Problem(NamedTuple):
    scores: softmax.Problem  # with only the log q that the loss uses
    loss: str
    parameter: float  # λ of bpr-max, margin of hinge, t of gbce, 1 for bce


class Pass(NamedTuple):
    loss: NDArray  # (B,)
    num_better: NDArray  # (B,) negatives that score above the positive, if asked for
    num_tied: NDArray  # (B,) negatives that score the same


@jitable
def means(row, num_kept, total, slope):
    """Sums over a row's negatives as means over those kept; those of the slopes stay in `row`."""
    share = 1 / max(1, num_kept)
    for j in range(row.size):
        row[j] *= share
    return total * share, -slope * share


@row_kernel
def bpr(a, a_0, log_q, parameter, loss, g_0):
    """mean_j softplus(z_j − z_0)"""
    for i in range(len(a)):
        row, row_log_q, own = a[i], log_q[min(i, len(log_q) - 1)], a_0[i]
        num_kept, total, slope = 0, 0.0, 0.0
        for j in range(row.size):
            num_kept += row[j] != -np.inf
            x = row[j] - row_log_q[j] - own
            g = sigmoid(x)
            total += softplus(x)
            slope += g
            row[j] = g
        loss[i], g_0[i] = means(row, num_kept, total, slope)


@row_kernel
def hinge(a, a_0, log_q, margin, loss, g_0):
    """mean_j max(0, margin + a_j − a_0)"""
    for i in range(len(a)):
        row, own, offset = a[i], a_0[i], margin[i]
        num_kept, total, slope = 0, 0.0, 0.0
        for j in range(row.size):
            num_kept += row[j] != -np.inf
            x = offset + (row[j] - own)
            g = 1.0 if x > 0 else 0.0 if x <= 0 else x  # NaN stays
            total += 0.0 if x <= 0 else x
            slope += g
            row[j] = g
        loss[i], g_0[i] = means(row, num_kept, total, slope)


@jitable
def top1_term(a, a_0):
    """f = σ(a − a_0) + σ(a²), −df/da_0 and df/da."""
    x, square = a - a_0, a * a
    return (
        sigmoid(x) + sigmoid(square),
        d_sigmoid(x),
        d_sigmoid(x) + 2 * a * d_sigmoid(square),
    )


@row_kernel
def top1(a, a_0, log_q, parameter, loss, g_0):
    """mean_j f_j"""
    for i in range(len(a)):
        row, own = a[i], a_0[i]
        num_kept, total, slope = 0, 0.0, 0.0
        for j in range(row.size):
            kept = row[j] != -np.inf
            num_kept += kept
            f, slope_0, g = top1_term(row[j], own)
            total += f if kept else 0.0
            slope += slope_0 if kept else 0.0
            row[j] = g if kept else 0.0
        loss[i], g_0[i] = means(row, num_kept, total, slope)


@row_kernel
def top1_max(a, a_0, log_q, parameter, loss, g_0):
    """Σ_j w_j·f_j,  w = softmax_j(a_j − log q_j);  dL/da_j = w_j·(df_j/da_j + f_j − L)"""
    for i in range(len(a)):
        row, row_log_q, own = a[i], log_q[min(i, len(log_q) - 1)], a_0[i]
        top = -np.inf
        for j in range(row.size):
            top = max(top, row[j] - row_log_q[j])
        weights = total = slope = 0.0
        for j in range(row.size):
            w = decay(row[j] - row_log_q[j] - top) if row[j] != -np.inf else 0.0
            f, slope_0, _ = top1_term(row[j], own)
            weights += w
            total += w * f
            slope += w * slope_0
        if weights != 0:
            total, slope = total / weights, slope / weights
        for j in range(row.size):
            w = decay(row[j] - row_log_q[j] - top) / weights
            f, _, d_f = top1_term(row[j], own)
            row[j] = w * (d_f + (f - total)) if row[j] != -np.inf else 0.0
        loss[i], g_0[i] = total, -slope


@jitable
def won_term(a, a_0, log_q, top):
    """e^(a − log q − top)·σ(a_0 − a), with one exponent: e^min(a, a_0)/(1 + e^−|a − a_0|)."""
    return decay(min(a, a_0) - log_q - top) / (1 + decay(a - a_0))


@row_kernel
def bpr_max(a, a_0, log_q, penalty, loss, g_0):
    """−log Σ_j w_j·σ(a_0 − a_j) + λ·Σ_j w_j·a_j²,  w = softmax_j(a_j − log q_j)

    The log is that of two sums, each with its own greatest exponent, so that neither vanishes.
    With r_j the share of j in the first sum and R = Σ_k w_k·a_k²,
    dL/da_j = w_j − r_j·σ(a_0 − a_j) + λ·w_j·(2·a_j + a_j² − R).
    """
    for i in range(len(a)):
        row, row_log_q, own = a[i], log_q[min(i, len(log_q) - 1)], a_0[i]
        top = top_won = -np.inf
        for j in range(row.size):
            top = max(top, row[j] - row_log_q[j])
            top_won = max(top_won, min(row[j], own) - row_log_q[j])
        weights = won = squares = 0.0
        for j in range(row.size):
            kept, x = row[j] != -np.inf, np.float64(row[j])  # whose square is no overflow
            w = decay(x - row_log_q[j] - top)
            weights += w if kept else 0.0
            squares += w * (x * x) if kept else 0.0
            won += won_term(x, own, row_log_q[j], top_won) if kept else 0.0
        total = slope = 0.0
        if weights != 0:
            squares /= weights
            total = (top - top_won) + np.log(weights / won) + penalty[i] * squares
        scale = penalty[i]
        for j in range(row.size):
            kept, x = row[j] != -np.inf, np.float64(row[j])
            w = decay(x - row_log_q[j] - top) / weights
            r = won_term(x, own, row_log_q[j], top_won) / won
            g = w - r * sigmoid(own - x) + scale * w * (2 * x + (x * x - squares))
            slope += r * sigmoid(x - own) if kept else 0.0
            row[j] = g if kept else 0.0
        loss[i], g_0[i] = total, -slope


@row_kernel
def bce(a, a_0, log_q, weight, loss, g_0):
    """weight·softplus(−z_0) + Σ_j softplus(z_j)"""
    for i in range(len(a)):
        row, row_log_q = a[i], log_q[min(i, len(log_q) - 1)]
        total = weight[i] * softplus(-a_0[i])
        for j in range(row.size):
            z = row[j] - row_log_q[j]
            total += softplus(z)
            row[j] = sigmoid(z)
        loss[i], g_0[i] = total, -weight[i] * sigmoid(-a_0[i])


KERNELS = {
    "bpr": bpr,
    "bpr-max": bpr_max,
    "top1": top1,
    "top1-max": top1_max,
    "logistic": bpr,
    "hinge": hinge,
    "bce": bce,
    "gbce": bce,
}


def value(problem: Problem) -> Pass:
    return _run(problem, None, False)[0]


def value_and_gradients(
    problem: Problem, d_loss: NDArray, *, known: Pass | None = None, ranks: bool = False
) -> tuple[Pass, Gradients]:
    """`d_loss` (B,) weighs the rows. A `known` pass saves nothing: all is computed again."""
    result, gradients = _run(problem, d_loss, ranks)
    assert gradients is not None
    return result, gradients


def _run(problem: Problem, d_loss: NDArray | None, ranks: bool) -> tuple[Pass, Gradients | None]:
    """One pass over all blocks of rows."""
    scores, name, _ = problem
    u, p, v, tau = scores.queries, scores.positives, scores.negatives, scores.temperature
    (num_queries, dim), num_sampled, dtype = u.shape, v.shape[-2], u.dtype
    shared = v.ndim == 2
    a_0, z_0 = positive_scores(scores)
    parameter = np.full(num_queries, problem.parameter, dtype)
    if scores.positive_log_q is not None and name == "gbce":  # it weighs, and corrects nothing
        z_0, parameter = a_0, gbce_weight(scores.positive_log_q, problem.parameter)
    loss, g_0 = np.empty((2, num_queries), dtype)
    better, tied = np.zeros((2, num_queries), np.int64)
    if ranks:
        tolerance = tie_tolerance(u, p, a_0, tau)
    if d_loss is not None:
        d_u = np.empty_like(u)
        d_v = np.zeros((num_sampled, dim), dtype) if shared else np.empty(v.shape, v.dtype)
        d_bias = np.zeros(v.shape[:-1], dtype)

    bias, log_q = scores.negative_bias, scores.negative_log_q
    log_q = np.zeros((1, num_sampled), dtype) if log_q is None else np.atleast_2d(log_q)
    row_bytes = max(1, num_sampled * (1 if shared else 1 + dim) * dtype.itemsize)
    height = max(1, min(num_queries, WORKSPACE // row_bytes))
    workspace = np.empty((height, num_sampled), dtype)
    for lo in range(0, num_queries, height):
        hi = min(lo + height, num_queries)
        g = workspace[: hi - lo]  # (r, S), at first the scores
        u_scaled = u[lo:hi] / tau
        if shared:
            np.matmul(u_scaled, v.T, out=g)
        else:
            v_block = v[lo:hi].astype(dtype, copy=False)  # (r, S, D)
            np.matmul(v_block, u_scaled[:, :, None], out=g[:, :, None])
        if bias is not None:
            g += _rows(np.atleast_2d(bias), lo, hi) / dtype.type(tau)
        scores.drop(g, lo)
        if ranks:
            better[lo:hi], tied[lo:hi] = count(g, a_0[lo:hi], tolerance[lo:hi])
        of_rows = (x[lo:hi] for x in (parameter, loss, g_0))
        _slopes(name, g, z_0[lo:hi], _rows(log_q, lo, hi), *of_rows)

        if d_loss is not None:
            # The row's weight goes into the small factors.
            g_0[lo:hi] *= d_loss[lo:hi]
            u_scaled *= d_loss[lo:hi, None]
            scale = d_loss[lo:hi] / dtype.type(tau)
            if shared:
                np.matmul(g, v, out=d_u[lo:hi])
                d_v += g.T @ u_scaled
                d_bias += scale @ g
            else:
                np.matmul(g[:, None, :], v_block, out=d_u[lo:hi, None, :])
                factors = (g[:, :, None], u_scaled[:, None, :])
                np.multiply(*factors, out=d_v[lo:hi], casting="unsafe")
                np.multiply(g, scale[:, None], out=d_bias[lo:hi])
            d_u[lo:hi] *= scale[:, None]

    result = Pass(loss, better, tied)
    if d_loss is None:
        return result, None
    g_0 /= dtype.type(tau)
    d_u += g_0[:, None] * p
    # Σ g·a = Σ u·dU + Σ b·db, because a = (u·v + b)/τ: no second look at the scores.
    g_a = np.einsum("bd,bd->", u, d_u, dtype=np.float64)
    if bias is not None:
        g_a += np.vdot(bias, d_bias)
    if scores.positive_bias is not None:
        g_a += np.vdot(scores.positive_bias, g_0)
    d_tau = np.asarray(-g_a / tau, dtype)
    return result, Gradients(d_u, g_0[:, None] * u, d_v, g_0, d_bias, d_tau)


def _rows(x: NDArray, lo: int, hi: int) -> NDArray:
    """Some rows of x (B, S), or of (1, S) the one that all share."""
    return x if len(x) == 1 else x[lo:hi]


def _slopes(name: str, a: NDArray, a_0: NDArray, log_q: NDArray, *of_rows: NDArray) -> None:
    """The loss's kernel, its rows divided over threads."""

    def span(start: int, stop: int) -> None:
        rows = slice(start, stop)
        KERNELS[name](a[rows], a_0[rows], _rows(log_q, start, stop), *(x[rows] for x in of_rows))

    for_spans(span, len(a), max(1, GRAIN // max(1, a.shape[1])))


def gbce_weight(log_q: NDArray, t: float) -> NDArray:
    """β = α·(t·(1 − 1/α) + 1/α) of the positives, α = q, at most 1 (Petrov & Macdonald 2023)."""
    return 1 - t * -np.expm1(np.minimum(log_q, 0))
