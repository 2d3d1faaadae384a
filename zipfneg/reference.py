"""The float64 reference: every quantity as its equation stands, in NumPy, with no block or kernel.

It is the oracle of the tests and the gate of the benchmarks. It forms (B, S, D) and checks nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NDArray = np.ndarray[Any, np.dtype[np.float64]]


def log_uniform_prob(num_items: int) -> NDArray:
    """P(k) = log((k + 2)/(k + 1)) / log(N + 1), for all k."""
    k = np.arange(num_items, dtype=np.float64)
    return np.log1p(1 / (k + 1)) / np.log1p(num_items)


def inclusion_prob(prob: NDArray, num_sampled: int) -> NDArray:
    """π_k = 1 − e^(−p_k·t) with Σ π = S: bisection on t over all items."""
    low, high = 0.0, 1.0
    while -np.expm1(-prob * high).sum() < num_sampled and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if -np.expm1(-prob * middle).sum() < num_sampled:
            low = middle
        else:
            high = middle
    return -np.expm1(-prob * high)


def dropped_negatives(
    negative_ids: Any,
    positive_ids: Any = None,
    known_positives: Any = None,
    mask: Any = None,
    num_queries: int = 0,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(B, S), True where a negative is dropped: own positive, known positives, mask."""
    ids = np.broadcast_to(negative_ids, (num_queries, np.shape(negative_ids)[-1]))
    dropped = np.zeros(ids.shape, np.bool_)
    if positive_ids is not None:
        dropped |= ids == np.asarray(positive_ids)[:, None]
    if known_positives is not None:
        indptr, known = known_positives
        for row in range(num_queries):
            dropped[row] |= np.isin(ids[row], known[indptr[row] : indptr[row + 1]])
    if mask is not None:
        dropped |= mask
    return dropped


class Scores(NamedTuple):
    """What a loss depends on. Each loss below returns L (B,), dL/da_0 (B,) and dL/da (B, S)."""

    a_0: NDArray  # (B,)
    a: NDArray  # (B, S)
    log_q_0: NDArray  # (B,)
    log_q: NDArray  # (B, S)
    kept: np.ndarray[Any, np.dtype[np.bool_]]  # (B, S) the negatives that count
    parameter: float  # λ of bpr-max, margin of hinge, t of gbce


Slopes = tuple[NDArray, NDArray, NDArray]


def softmax(s: Scores) -> Slopes:
    """L = log(e^(z_0) + Σ_j e^(z_j)) − z_0"""
    z_0 = s.a_0 - s.log_q_0
    z = np.where(s.kept, s.a - s.log_q, -np.inf)
    candidates = np.concatenate([z_0[:, None], z], axis=1)  # (B, 1 + S)
    shift = candidates.max(axis=1)
    exps = np.exp(candidates - shift[:, None])
    loss = np.log(exps.sum(axis=1)) + shift - z_0
    # dL/dz = softmax(z) − onehot(positive)
    g = exps[:, 1:] / exps.sum(axis=1, keepdims=True)
    return loss, -g.sum(axis=1), g


def bpr(s: Scores) -> Slopes:
    """L = mean_j softplus(z_j − z_0), also called logistic"""
    x = (s.a - s.log_q) - (s.a_0 - s.log_q_0)[:, None]
    w = mean_weights(s)
    g = w * sigmoid(x)
    return (w * softplus(x)).sum(axis=1), -g.sum(axis=1), g


def hinge(s: Scores) -> Slopes:
    """L = mean_j max(0, margin + a_j − a_0)"""
    x = s.parameter + s.a - s.a_0[:, None]
    w = mean_weights(s)
    g = w * (x > 0)
    return (w * np.maximum(x, 0)).sum(axis=1), -g.sum(axis=1), g


def top1(s: Scores) -> Slopes:
    """L = mean_j f_j,  f_j = σ(a_j − a_0) + σ(a_j²)"""
    f, d_f_0, d_f = top1_terms(s)
    w = mean_weights(s)
    return (w * f).sum(axis=1), (w * d_f_0).sum(axis=1), w * d_f


def top1_max(s: Scores) -> Slopes:
    """L = Σ_j w_j f_j,  w = softmax_j(a_j − log q_j)"""
    f, d_f_0, d_f = top1_terms(s)
    w = softmax_weights(s)
    loss = (w * f).sum(axis=1)
    # dw_j/da_k = w_j·(δ_jk − w_k)
    return loss, (w * d_f_0).sum(axis=1), w * (d_f + f - loss[:, None])


def bpr_max(s: Scores) -> Slopes:
    """L = −log Σ_j w_j·σ(a_0 − a_j) + λ·Σ_j w_j·a_j²,  w = softmax_j(a_j − log q_j)"""
    w = softmax_weights(s)
    p = sigmoid(s.a_0[:, None] - s.a)
    won = (w * p).sum(axis=1)  # (B,); 0 in a row without negatives
    won = np.where(s.kept.any(axis=1), won, 1)
    penalty = (w * s.a**2).sum(axis=1)
    loss = -np.log(won) + s.parameter * penalty
    share = w * p / won[:, None]
    g_0 = -(share * (1 - p)).sum(axis=1)
    g = w - share * p + s.parameter * w * (2 * s.a + s.a**2 - penalty[:, None])
    return loss, g_0, g


def bce(s: Scores) -> Slopes:
    """L = softplus(−z_0) + Σ_j softplus(z_j)"""
    z_0, z = s.a_0 - s.log_q_0, s.a - s.log_q
    loss = softplus(-z_0) + (s.kept * softplus(z)).sum(axis=1)
    return loss, -sigmoid(-z_0), s.kept * sigmoid(z)


def gbce(s: Scores) -> Slopes:
    """L = β·softplus(−a_0) + Σ_j softplus(a_j),  β = α·(t·(1 − 1/α) + 1/α),  α = min(1, q_0)"""
    alpha, t = np.minimum(1, np.exp(s.log_q_0)), s.parameter
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    loss = beta * softplus(-s.a_0) + (s.kept * softplus(s.a)).sum(axis=1)
    return loss, -beta * sigmoid(-s.a_0), s.kept * sigmoid(s.a)


def top1_terms(s: Scores) -> Slopes:
    """f_j = σ(a_j − a_0) + σ(a_j²), its derivatives by a_0 and by a_j: (B, S) each."""
    x, y = s.a - s.a_0[:, None], s.a**2
    d_x, d_y = sigmoid(x) * sigmoid(-x), sigmoid(y) * sigmoid(-y)
    return sigmoid(x) + sigmoid(y), -d_x, d_x + 2 * s.a * d_y


def mean_weights(s: Scores) -> NDArray:
    """1/n for each of a row's n kept negatives."""
    return s.kept / np.maximum(1, s.kept.sum(axis=1, keepdims=True)).astype(s.a.dtype)


def softmax_weights(s: Scores) -> NDArray:
    """softmax_j(a_j − log q_j) over a row's kept negatives."""
    z = np.where(s.kept, s.a - s.log_q, -np.inf)
    top = z.max(axis=1, keepdims=True, initial=-np.inf)
    e = np.exp(z - np.where(top == -np.inf, 0, top))
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def sigmoid(x: Any) -> Any:
    """1/(1 + e^(−x))"""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softplus(x: Any) -> Any:
    """log(1 + e^x)"""
    return np.logaddexp(0, x)


LOSSES: dict[str, Callable[[Scores], Slopes]] = {
    "softmax": softmax,
    "bpr": bpr,
    "bpr-max": bpr_max,
    "top1": top1,
    "top1-max": top1_max,
    "logistic": bpr,
    "hinge": hinge,
    "bce": bce,
    "gbce": gbce,
}


class SoftmaxGradients(NamedTuple):
    """Of Σ_i d_i·L_i."""

    queries: NDArray
    positives: NDArray
    negatives: NDArray
    positive_bias: NDArray
    negative_bias: NDArray
    temperature: float


def sampled_softmax(
    queries: Any,
    positives: Any,
    negatives: Any,
    *,
    positive_bias: Any = 0.0,
    negative_bias: Any = 0.0,
    positive_log_q: Any = 0.0,
    negative_log_q: Any = 0.0,
    dropped: Any = False,
    temperature: float = 1.0,
    loss: str = "softmax",
    parameter: float = 0.0,
    d_loss: Any = 1.0,
) -> tuple[NDArray, SoftmaxGradients]:
    """Loss L (B,) and the gradients of Σ_i d_i·L_i.

    a_0 = (u·v_0 + b_0)/τ,  z_0 = a_0 − log q_0;  a_j = (u·v_j + b_j)/τ,  z_j = a_j − log q_j
    """
    u = np.asarray(queries, np.float64)  # (B, D)
    p = np.asarray(positives, np.float64)  # (B, D)
    v = np.asarray(negatives, np.float64)
    shared = v.ndim == 2
    num_queries, (num_sampled, dim) = len(u), v.shape[-2:]
    v = np.broadcast_to(v, (num_queries, num_sampled, dim))
    d = np.broadcast_to(np.asarray(d_loss, np.float64), (num_queries,))
    tau = float(temperature)
    log_q_0 = np.broadcast_to(positive_log_q, (num_queries,))
    log_q = np.broadcast_to(negative_log_q, (num_queries, num_sampled))
    kept = np.broadcast_to(np.logical_not(dropped), (num_queries, num_sampled))

    a_0 = (np.einsum("bd,bd->b", u, p) + positive_bias) / tau  # (B,)
    a = (np.einsum("bd,bsd->bs", u, v) + negative_bias) / tau  # (B, S)
    losses, g_0, g = LOSSES[loss](Scores(a_0, a, log_q_0, log_q, kept, parameter))

    g_0, g = d * g_0, d[:, None] * g
    d_queries = (g_0[:, None] * p + np.einsum("bs,bsd->bd", g, v)) / tau
    d_positives = g_0[:, None] * u / tau
    d_negatives = np.einsum("bs,bd->bsd", g, u) / tau
    d_negative_bias = g / tau
    if shared:
        d_negatives, d_negative_bias = d_negatives.sum(axis=0), d_negative_bias.sum(axis=0)
    d_tau = -((g_0 * a_0).sum() + (g * a).sum()) / tau
    return losses, SoftmaxGradients(
        d_queries, d_positives, d_negatives, g_0 / tau, d_negative_bias, float(d_tau)
    )


def full_softmax_loss(
    queries: Any, items: Any, targets: Any, *, temperature: float = 1.0
) -> NDArray:
    """−log softmax(u·vᵀ/τ)[target], over every item (B,)."""
    logits = np.asarray(queries, np.float64) @ np.asarray(items, np.float64).T / temperature
    shift = logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(logits - shift).sum(axis=1)) + shift[:, 0]
    return lse - logits[np.arange(len(logits)), targets]
