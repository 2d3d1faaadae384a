"""The losses beside the softmax, over blocks of rows: value, ranks and gradients in one pass each.

Each kernel takes a block's scores a (r, S), −inf where a negative is dropped, and leaves dL/da in
their place. It fills in the loss (r,) and g_0 = dL/da_0 (r,). `a_0` (r,) is that of the positive,
less its log q where corrected; `log_q` (r, S) is zero where nothing is; `parameter` is one a row.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..checks import NDArray
from ..scalar import jitable, sigmoid, softplus
from . import kernel, softmax
from .ranks import count, tie_tolerance
from .softmax import Gradients
from .threads import for_spans

# Scores that are worth a thread.
GRAIN = 2**13


class Problem(NamedTuple):
    scores: softmax.Problem  # with only the log q that the loss uses
    loss: str
    parameter: float  # λ of bpr-max, margin of hinge, t of gbce, 1 for bce


class Pass(NamedTuple):
    loss: NDArray  # (B,)
    num_better: NDArray  # (B,) negatives that score above the positive, if asked for
    num_tied: NDArray  # (B,) negatives that score the same


@kernel
def bpr(a, a_0, log_q, parameter, loss, g_0):
    """Σ_j softplus(z_j − z_0)"""
    for i in range(a.shape[0]):
        total = slope = 0.0
        for j in range(a.shape[1]):
            x = a[i, j] - log_q[i, j] - a_0[i]
            total += softplus(x)
            a[i, j] = sigmoid(x)
            slope += a[i, j]
        loss[i], g_0[i] = total, -slope


@kernel
def hinge(a, a_0, log_q, margin, loss, g_0):
    """Σ_j max(0, margin + a_j − a_0)"""
    for i in range(a.shape[0]):
        total = slope = 0.0
        for j in range(a.shape[1]):
            x = margin[i] + (a[i, j] - a_0[i])
            if x <= 0:
                a[i, j] = 0
            else:
                a[i, j] = x if math.isnan(x) else 1
                total += x
                slope += a[i, j]
        loss[i], g_0[i] = total, -slope


@jitable
def top1_term(a, a_0):
    """f = σ(a − a_0) + σ(a²), −df/da_0 and df/da."""
    x, square = a - a_0, a * a
    slope = sigmoid(x) * sigmoid(-x)
    return (
        sigmoid(x) + sigmoid(square),
        slope,
        slope + 2 * a * (sigmoid(square) * sigmoid(-square)),
    )


@kernel
def top1(a, a_0, log_q, parameter, loss, g_0):
    """Σ_j f_j"""
    for i in range(a.shape[0]):
        total = slope = 0.0
        for j in range(a.shape[1]):
            if a[i, j] == -np.inf:
                a[i, j] = 0
                continue
            f, slope_0, a[i, j] = top1_term(a[i, j], a_0[i])
            total += f
            slope += slope_0
        loss[i], g_0[i] = total, -slope


@kernel
def top1_max(a, a_0, log_q, parameter, loss, g_0):
    """Σ_j w_j f_j,  w = softmax_j(a_j − log q_j);  dL/da_j = w_j·(df_j/da_j + f_j − L)"""
    for i in range(a.shape[0]):
        top = -np.inf
        for j in range(a.shape[1]):
            top = max(top, a[i, j] - log_q[i, j])
        weights = total = slope = 0.0
        for j in range(a.shape[1]):
            if a[i, j] != -np.inf:
                w = math.exp(a[i, j] - log_q[i, j] - top)
                f, slope_0, _ = top1_term(a[i, j], a_0[i])
                weights += w
                total += w * f
                slope += w * slope_0
        if weights != 0:
            total, slope = total / weights, slope / weights
        for j in range(a.shape[1]):
            if a[i, j] == -np.inf:
                a[i, j] = 0
            else:
                w = math.exp(a[i, j] - log_q[i, j] - top) / weights
                f, _, d_f = top1_term(a[i, j], a_0[i])
                a[i, j] = w * (d_f + (f - total))
        loss[i], g_0[i] = total, -slope


@kernel
def bpr_max(a, a_0, log_q, penalty, loss, g_0):
    """−log Σ_j w_j·σ(a_0 − a_j) + λ·Σ_j w_j·a_j²,  w = softmax_j(a_j − log q_j)

    e^(a_j)·σ(a_0 − a_j) = e^min(a_j, a_0)/(1 + e^−|a_j − a_0|), so that each of the two sums has
    its own greatest exponent and neither vanishes. With v_j the share of j in the first sum,
    dL/da_j = w_j − v_j·σ(a_0 − a_j) + λ·w_j·(2·a_j + a_j² − Σ_k w_k·a_k²).
    """
    for i in range(a.shape[0]):
        top = top_won = -np.inf
        for j in range(a.shape[1]):
            top = max(top, a[i, j] - log_q[i, j])
            top_won = max(top_won, min(a[i, j], a_0[i]) - log_q[i, j])
        weights = won = squares = 0.0
        kept = False
        for j in range(a.shape[1]):
            if a[i, j] != -np.inf:
                kept = True
                w = math.exp(a[i, j] - log_q[i, j] - top)
                weights += w
                squares += w * (float(a[i, j]) * a[i, j])
                rest = math.exp(min(a[i, j], a_0[i]) - log_q[i, j] - top_won)
                won += rest / (1 + math.exp(-abs(a[i, j] - a_0[i])))
        loss[i] = g_0[i] = 0
        if kept:
            squares /= weights
            loss[i] = (top - top_won) + math.log(weights / won) + penalty[i] * squares
        for j in range(a.shape[1]):
            if a[i, j] == -np.inf:
                a[i, j] = 0
            else:
                w = math.exp(a[i, j] - log_q[i, j] - top) / weights
                rest = math.exp(min(a[i, j], a_0[i]) - log_q[i, j] - top_won)
                v = rest / (1 + math.exp(-abs(a[i, j] - a_0[i]))) / won
                d_square = 2 * a[i, j] + (float(a[i, j]) * a[i, j] - squares)
                g_0[i] -= v * sigmoid(a[i, j] - a_0[i])
                a[i, j] = w - v * sigmoid(a_0[i] - a[i, j]) + penalty[i] * w * d_square


@kernel
def bce(a, a_0, log_q, weight, loss, g_0):
    """weight·softplus(−z_0) + Σ_j softplus(z_j)"""
    for i in range(a.shape[0]):
        total = weight[i] * softplus(-a_0[i])
        for j in range(a.shape[1]):
            z = a[i, j] - log_q[i, j]
            total += softplus(z)
            a[i, j] = sigmoid(z)
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
# Of these the loss is the mean over a row's negatives, the sum divided by their number.
MEANS = ("bpr", "top1", "logistic", "hinge")


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
    u, v, tau = scores.queries, scores.negatives, scores.temperature
    (num_queries, dim), num_sampled, dtype = u.shape, v.shape[-2], u.dtype
    shared = v.ndim == 2
    a_0, z_0 = softmax.positive_scores(scores)
    parameter = np.full(num_queries, problem.parameter, dtype)
    if scores.positive_log_q is not None and name == "gbce":  # it weighs, and corrects nothing
        z_0, parameter = a_0, gbce_weight(scores.positive_log_q, problem.parameter)
    loss, g_0 = np.empty((2, num_queries), dtype)
    better, tied = np.zeros((2, num_queries), np.int64)
    if ranks:
        tolerance = tie_tolerance(u, scores.positives, a_0, tau)
    if d_loss is not None:
        d_u = np.empty_like(u)
        d_v = np.zeros((num_sampled, dim), dtype) if shared else np.empty(v.shape, v.dtype)
        d_bias = np.zeros(v.shape[:-1], dtype)

    row_bytes = max(1, num_sampled * (1 if shared else 1 + dim) * dtype.itemsize)
    height = max(1, min(num_queries, softmax.WORKSPACE // row_bytes))
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
        if scores.negative_bias is not None:
            g += softmax.rows(scores.negative_bias, 1, lo, hi) / dtype.type(tau)
        scores.drop(g, lo)
        if ranks:
            better[lo:hi], tied[lo:hi] = count(g, a_0[lo:hi], tolerance[lo:hi])
        scale = np.ones(hi - lo, dtype)
        if name in MEANS:
            scale /= np.maximum(1, np.count_nonzero(g != -np.inf, axis=1))
        log_q = softmax.rows(scores.negative_log_q, 1, lo, hi)
        log_q = np.broadcast_to(dtype.type(0) if log_q is None else log_q, g.shape)
        _slopes(name, g, z_0[lo:hi], log_q, parameter[lo:hi], loss[lo:hi], g_0[lo:hi])
        loss[lo:hi] *= scale

        if d_loss is not None:
            # What multiplies a row goes into the small factors.
            scale *= d_loss[lo:hi]
            g_0[lo:hi] *= scale
            u_scaled *= scale[:, None]
            scale /= dtype.type(tau)
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
    return result, softmax.gradients(scores, g_0, d_u, d_v, d_bias)


def _slopes(name: str, *arrays: Any) -> None:
    """The loss's kernel, its rows divided over threads."""
    num_rows, num_sampled = arrays[0].shape

    def span(start: int, stop: int) -> None:
        KERNELS[name](*(x[start:stop] for x in arrays))

    for_spans(span, num_rows, max(1, GRAIN // max(1, num_sampled)))


def gbce_weight(log_q: NDArray, t: float) -> NDArray:
    """β = α·(t·(1 − 1/α) + 1/α) of the positives, α = q, at most 1 (Petrov & Macdonald 2023)."""
    return 1 - t * -np.expm1(np.minimum(log_q, 0))
