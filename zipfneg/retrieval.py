"""The full catalog, block by block: scores, top-k, ranks, exact softmax."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import checks
from .candidates import Candidates, as_candidates, as_temperature
from .checks import NDArray
from .interop import Array, Home, borrow
from .masking import Csr, csr

# A block of scores: 512 × 2048 float32 take 4 MiB.
BLOCK_ROWS, BLOCK_COLUMNS = 512, 2048


class TopK(NamedTuple):
    """The best items of each query, best first: ids and scores (B, k)."""

    ids: Array
    scores: Array


class Ranks(NamedTuple):
    """Where each query's target stands: items that score above it, and others that tie, (B,)."""

    num_better: Array
    num_tied: Array


class _Catalog(NamedTuple):
    """Checked queries against all items, as blocks of scores."""

    queries: NDArray  # (B, D)
    items: NDArray  # (N, D)
    bias: NDArray | None  # (N,)
    temperature: float
    first_id: int
    excluded: tuple[NDArray, NDArray] | None
    place: Home

    def block(self, rows: NDArray | slice, columns: slice) -> NDArray:
        z = (self.queries[rows] / self.temperature) @ self.items[columns].T  # (r, c)
        if self.bias is not None:
            z += self.bias[columns] / z.dtype.type(self.temperature)
        return z

    def columns(self) -> Iterator[slice]:
        for start in range(self.first_id, len(self.items), BLOCK_COLUMNS):
            yield slice(start, min(start + BLOCK_COLUMNS, len(self.items)))

    def rows(self, order: NDArray | None = None) -> Iterator[NDArray]:
        if order is None:
            order = np.arange(len(self.queries))
        for start in range(0, len(order), BLOCK_ROWS):
            yield order[start : start + BLOCK_ROWS]

    def exclude(self, z: NDArray, rows: NDArray, columns: slice) -> None:
        """−inf over the excluded items of a block."""
        if self.excluded is None:
            return
        indptr, ids = self.excluded
        counts = indptr[rows + 1] - indptr[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        ends = np.cumsum(counts)
        column = ids[np.arange(len(row)) + np.repeat(indptr[rows + 1] - ends, counts)]
        inside = (column >= columns.start) & (column < columns.stop)
        z[row[inside], column[inside] - columns.start] = -np.inf


def _targets_within(targets: NDArray, columns: slice) -> tuple[NDArray, NDArray]:
    """The places (row, column) of the targets that a block of columns holds."""
    here = np.flatnonzero((targets >= columns.start) & (targets < columns.stop))
    return here, targets[here] - columns.start


def _catalog(
    queries: Array,
    items: Array | Candidates,
    temperature: float | Array = 1.0,
    first_id: int = 0,
    exclude: Csr | None = None,
    target_ids: Array | None = None,
) -> tuple[_Catalog, NDArray]:
    items = as_candidates("items", items)
    place, given = borrow(
        {
            "queries": queries,
            "items.embeddings": items.embeddings,
            "items.bias": items.bias,
            "target_ids": target_ids,
        }
    )
    u, v, bias = given["queries"], given["items.embeddings"], given["items.bias"]
    if u is None or v is None:
        raise ValueError(f"{'queries' if u is None else 'items'}: expected an array, got None")
    for name, x in (("queries", u), ("items", v)):
        checks.floating(name, x)
        if x.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {x.shape}")
    checks.shape("items", v, (len(v), u.shape[1]), "(N, D) with D as queries")
    dtype = np.dtype(np.float64 if np.float64 in (u.dtype, v.dtype) else np.float32)
    if bias is not None:
        checks.shape("items.bias", bias, (len(v),), "(N,)")
        bias = bias.astype(dtype)
    first_id = checks.integer("first_id", first_id, 0, len(v))
    targets = given["target_ids"]
    if targets is None:
        targets = np.empty(0, np.int64)
    else:
        checks.integral("target_ids", targets)
        checks.shape("target_ids", targets, (len(u),), "(B,)")
        if len(targets) and not (first_id <= targets.min() and targets.max() < len(v)):
            raise ValueError(
                f"target_ids: expected ids from {first_id} to {len(v) - 1}, got "
                f"{targets.min()} to {targets.max()}"
            )
    excluded = None if exclude is None else csr("exclude", exclude, len(u))
    catalog = _Catalog(
        np.ascontiguousarray(u, dtype),
        np.ascontiguousarray(v, dtype),
        bias,
        as_temperature(temperature),
        first_id,
        excluded,
        place,
    )
    return catalog, targets.astype(np.int64, copy=False)


def scores(queries: Array, items: Array | Candidates, *, temperature: float | Array = 1.0) -> Array:
    """(u·v + b)/τ of every query with every item: (B, N), which the caller must have room for.

    Parameters
    ----------
    queries : (B, D).
    items : (N, D), row = id, or `Candidates` with embeddings and bias.
    """
    catalog, _ = _catalog(queries, items, temperature)
    return catalog.place.give(catalog.block(slice(None), slice(None)))


def top_k(
    queries: Array,
    items: Array | Candidates,
    k: int,
    *,
    temperature: float | Array = 1.0,
    first_id: int = 0,
    exclude: Csr | None = None,
) -> TopK:
    """The k best items of each query, best first, without forming (B, N).

    Parameters
    ----------
    queries : (B, D).
    items : (N, D), row = id, or `Candidates` with embeddings and bias.
    k : 1 to N − first_id.
    first_id : items below it are reserved, and never returned.
    exclude : ragged ids to leave out of each query's list, (indptr (B + 1,), ids): items already
        seen, say.

    Returns
    -------
    `TopK` of ids and scores (B, k). Equal scores stand by ascending id, though which of several
    at the last place is in the list is open. Where fewer than k items are left the score is −inf.

    Examples
    --------
    >>> import numpy as np
    >>> top_k(np.eye(3), np.eye(3), 1).ids.tolist()
    [[0], [1], [2]]
    """
    catalog, _ = _catalog(queries, items, temperature, first_id, exclude)
    k = checks.integer("k", k, 1, max(1, len(catalog.items) - first_id))
    num_queries = len(catalog.queries)
    best_ids = np.zeros((num_queries, k), np.int64)
    best = np.full((num_queries, k), -np.inf, catalog.queries.dtype)
    for rows in catalog.rows():
        ids, values = best_ids[rows], best[rows]
        for columns in catalog.columns():
            z = catalog.block(rows, columns)
            catalog.exclude(z, rows, columns)
            # The running best and this block's best compete.
            keep = min(k, z.shape[1])
            places = np.argpartition(-z, keep - 1, axis=1)[:, :keep]
            values = np.concatenate([values, np.take_along_axis(z, places, 1)], axis=1)
            ids = np.concatenate([ids, places + columns.start], axis=1)
            places = np.lexsort((ids, -values))[:, :k]
            values, ids = np.take_along_axis(values, places, 1), np.take_along_axis(ids, places, 1)
        best_ids[rows], best[rows] = ids, values
    return TopK(catalog.place.give(best_ids), catalog.place.give(best))


def rank(
    queries: Array,
    items: Array | Candidates,
    target_ids: Array,
    *,
    first_id: int = 0,
    exclude: Csr | None = None,
) -> Ranks:
    """Where each query's target stands among all items, ties told apart from losses.

    Parameters
    ----------
    queries : (B, D).
    items : (N, D), row = id, or `Candidates` with embeddings and bias.
    target_ids : (B,).
    first_id : items below it are reserved, and not counted.
    exclude : ragged ids not to count, (indptr (B + 1,), ids); a query's target always stays.

    Notes
    -----
    A score that is NaN counts as better: a broken model must not look good.

    Examples
    --------
    >>> import numpy as np
    >>> rank(np.eye(3), np.eye(3), np.array([0, 1, 0]))
    Ranks(num_better=array([0, 0, 1]), num_tied=array([0, 0, 1]))
    """
    catalog, targets = _catalog(queries, items, 1.0, first_id, exclude, target_ids)
    better = np.zeros(len(targets), np.int64)
    tied = np.zeros(len(targets), np.int64)
    # In order of target a block of rows finds its targets in few blocks of columns. Their scores
    # are taken from the very products that are counted below: any other way of computing them
    # rounds differently, and ties would be lost.
    for rows in catalog.rows(np.argsort(targets, kind="stable")):
        score = np.empty((len(rows), 1), catalog.queries.dtype)
        for columns in catalog.columns():
            here, column = _targets_within(targets[rows], columns)
            if len(here):
                score[here, 0] = catalog.block(rows, columns)[here, column]
        for columns in catalog.columns():
            z = catalog.block(rows, columns)
            catalog.exclude(z, rows, columns)
            z[_targets_within(targets[rows], columns)] = -np.inf
            better[rows] += z.shape[1] - np.count_nonzero(z <= score, axis=1)
            tied[rows] += np.count_nonzero(z == score, axis=1)
    return Ranks(catalog.place.give(better), catalog.place.give(tied))


def full_softmax_loss(
    queries: Array,
    items: Array | Candidates,
    target_ids: Array,
    *,
    temperature: float | Array = 1.0,
    first_id: int = 0,
) -> Array:
    """Exact cross-entropy of each target over the whole catalog, in nats, without forming (B, N).

    L = logsumexp_k (u·v_k + b_k)/τ − (u·v_target + b_target)/τ

    Parameters
    ----------
    queries : (B, D).
    items : (N, D), row = id, or `Candidates` with embeddings and bias.
    target_ids : (B,).
    first_id : items below it are reserved, and not in the sum.

    Returns
    -------
    (B,) losses, float64 if any embedding is, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> full_softmax_loss(np.zeros((2, 4)), np.ones((8, 4)), np.array([0, 5])).round(4)
    array([2.0794, 2.0794])
    """
    catalog, targets = _catalog(queries, items, temperature, first_id, None, target_ids)
    loss = np.empty(len(targets), catalog.queries.dtype)
    for rows in catalog.rows():
        score = np.empty(len(rows), loss.dtype)
        shift = np.full(len(rows), -np.inf, loss.dtype)
        total = np.zeros_like(shift)
        for columns in catalog.columns():
            z = catalog.block(rows, columns)
            here, column = _targets_within(targets[rows], columns)
            score[here] = z[here, column]
            new_shift = np.maximum(shift, z.max(axis=1))
            total *= np.exp(shift - new_shift)
            z -= new_shift[:, None]
            total += np.exp(z, out=z).sum(axis=1)
            shift = new_shift
        loss[rows] = np.log(total) + shift - score
    return catalog.place.give(loss)
