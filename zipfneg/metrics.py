"""Ranking metrics at k, from ranks, with ties counted honestly.

A rank is the number of items that score above the target: 0 is the best. With `num_tied` other
items of the target's own score, the target is equally likely at each of the num_tied + 1 places
they share, and a metric is its mean over them: a model that gives every item the same score gets
what guessing gets.

`ranks` is (B,), one target a query, or (B, R), several: distinct ranks of a query's relevant items
in any order, −1 where a query has fewer. `num_tied` goes with one target. Metrics are per query.
"""

from typing import Any

import numpy as np

from . import checks
from .checks import NDArray

TOP_K_METRICS = ("recall", "precision", "mrr", "ndcg", "map")


def recall(ranks: Any, k: int, *, num_tied: Any = None) -> NDArray:
    """Share of the relevant items, at most k of them, among the first k (the hit rate for one).

    Examples
    --------
    >>> recall([0, 9, 10], 10)
    array([1., 1., 0.])
    >>> recall([0], 10, num_tied=[39])
    array([0.25])
    """
    found, relevant = _total_gain(ranks, np.ones(_k(k)), num_tied)
    return found / np.clip(relevant, 1, k)


def precision(ranks: Any, k: int, *, num_tied: Any = None) -> NDArray:
    """Share of the first k that is relevant."""
    return _total_gain(ranks, np.ones(_k(k)), num_tied)[0] / k


def mrr(ranks: Any, k: int, *, num_tied: Any = None) -> NDArray:
    """1 / (1 + rank) of the best-ranked relevant item, 0 if none is among the first k."""
    ranks = _as_ranks(ranks, num_tied)
    if ranks.ndim == 2:
        ranks = np.where(ranks < 0, np.iinfo(np.int64).max, ranks).min(axis=1, initial=2**62)
    return _total_gain(ranks, 1 / np.arange(1, _k(k) + 1), num_tied)[0]


def ndcg(ranks: Any, k: int, *, num_tied: Any = None) -> NDArray:
    """Σ 1/log2(2 + rank) over the relevant among the first k, relative to the best order."""
    discount = 1 / np.log2(np.arange(2, _k(k) + 2))
    gain, relevant = _total_gain(ranks, discount, num_tied)
    ideal = np.cumsum(discount)[np.clip(relevant, 1, k) - 1]
    return gain / ideal


def average_precision(ranks: Any, k: int, *, num_tied: Any = None) -> NDArray:
    """Mean of the precision at each relevant item's place, 0 for those beyond k."""
    ranks = _as_ranks(ranks, num_tied)
    if ranks.ndim == 1:
        return mrr(ranks, k, num_tied=num_tied)
    ordered = np.sort(np.where(ranks < 0, np.iinfo(np.int64).max, ranks), axis=1)  # (B, R)
    above = np.arange(1, ranks.shape[1] + 1)
    precisions = np.where(ordered < _k(k), above / (ordered + 1.0), 0.0)
    return precisions.sum(axis=1) / np.clip((ranks >= 0).sum(axis=1), 1, k)


def ranking_metrics(ranks: Any, top_ks: Any, *, num_tied: Any = None) -> dict[str, float]:
    """Every metric at every k, averaged over the queries: {"recall@10": …, …}.

    Examples
    --------
    >>> ranking_metrics([0, 3], [1])["mrr@1"]
    0.5
    """
    functions = (recall, precision, mrr, ndcg, average_precision)
    if not len(_as_ranks(ranks)):
        return {f"{name}@{_k(k)}": 0.0 for k in top_ks for name in TOP_K_METRICS}
    return {
        f"{name}@{k}": float(function(ranks, k, num_tied=num_tied).mean())
        for k in top_ks
        for name, function in zip(TOP_K_METRICS, functions, strict=True)
    }


def _k(k: int) -> int:
    return checks.integer("k", k, 1, 2**24)  # the gains of k places are written out


def _as_ranks(ranks: Any, num_tied: Any = None) -> NDArray:
    ranks = np.asarray(ranks)
    checks.integral("ranks", ranks)
    if ranks.ndim not in (1, 2):
        raise ValueError(f"ranks: expected shape (B,) or (B, R), got {ranks.shape}")
    if num_tied is not None and ranks.ndim != 1:
        raise ValueError("num_tied: expected None with several relevant items a query")
    return ranks.astype(np.int64, copy=False)


def _total_gain(ranks: Any, gain: NDArray, num_tied: Any) -> tuple[NDArray, NDArray]:
    """Expected Σ gain[place] of a query's relevant items (B,), and how many it has."""
    ranks = _as_ranks(ranks, num_tied)
    tied = np.zeros((), np.int64)
    if num_tied is not None:
        tied = np.asarray(num_tied)
        checks.integral("num_tied", tied)
        checks.shape("num_tied", tied, ranks.shape, "(B,) as ranks")
        if (tied < 0).any():
            raise ValueError(f"num_tied: expected numbers ≥ 0, got {tied.min()}")
    # Mean of gain over places rank … rank + tied, by its running sum.
    running = np.concatenate([[0.0], np.cumsum(gain)])
    first = np.clip(ranks, 0, gain.size)
    last = np.minimum(first + np.minimum(tied, gain.size) + 1, gain.size)
    expected = np.where(ranks < 0, 0.0, (running[last] - running[first]) / (tied + 1.0))
    if ranks.ndim == 1:
        return expected, (ranks >= 0).astype(np.int64)
    return expected.sum(axis=1), (ranks >= 0).sum(axis=1)
