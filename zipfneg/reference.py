"""The float64 reference: every quantity as its equation stands, in NumPy, with no block or kernel.

It is the oracle of the tests and the gate of the benchmarks. It forms (B, S, D) and checks nothing.
"""

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
    d_loss: Any = 1.0,
) -> tuple[NDArray, SoftmaxGradients]:
    """Loss L (B,) and the gradients of Σ_i d_i·L_i.

    a_0 = (u·v_0 + b_0)/τ,  z_0 = a_0 − log q_0;  a_j = (u·v_j + b_j)/τ,  z_j = a_j − log q_j
    L   = log(e^(z_0) + Σ_j e^(z_j)) − z_0
    """
    u = np.asarray(queries, np.float64)  # (B, D)
    p = np.asarray(positives, np.float64)  # (B, D)
    v = np.asarray(negatives, np.float64)
    shared = v.ndim == 2
    num_queries, (num_sampled, dim) = len(u), v.shape[-2:]
    v = np.broadcast_to(v, (num_queries, num_sampled, dim))
    d = np.broadcast_to(np.asarray(d_loss, np.float64), (num_queries,))
    tau = float(temperature)

    a_0 = (np.einsum("bd,bd->b", u, p) + positive_bias) / tau  # (B,)
    a = (np.einsum("bd,bsd->bs", u, v) + negative_bias) / tau  # (B, S)
    z_0 = a_0 - positive_log_q
    z = np.where(dropped, -np.inf, a - negative_log_q)

    candidates = np.concatenate([z_0[:, None], z], axis=1)  # (B, 1 + S)
    shift = candidates.max(axis=1)
    exps = np.exp(candidates - shift[:, None])
    loss = np.log(exps.sum(axis=1)) + shift - z_0

    # dL/dz = softmax(z) − onehot(positive)
    g = exps / exps.sum(axis=1, keepdims=True)
    g[:, 0] = -g[:, 1:].sum(axis=1)
    g *= d[:, None]
    g_0, g_s = g[:, 0], g[:, 1:]
    d_queries = (g_0[:, None] * p + np.einsum("bs,bsd->bd", g_s, v)) / tau
    d_positives = g_0[:, None] * u / tau
    d_negatives = np.einsum("bs,bd->bsd", g_s, u) / tau
    d_negative_bias = g_s / tau
    if shared:
        d_negatives, d_negative_bias = d_negatives.sum(axis=0), d_negative_bias.sum(axis=0)
    d_tau = -((g_0 * a_0).sum() + (g_s * a).sum()) / tau
    return loss, SoftmaxGradients(
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
