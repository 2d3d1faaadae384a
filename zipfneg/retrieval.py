"""The full catalog, block by block: scores, top-k, ranks, exact softmax."""

from typing import NamedTuple

import numpy as np

from . import checks
from .candidates import Candidates, as_candidates, as_temperature
from .checks import NDArray
from .cpu import softmax
from .cpu.best import best
from .cpu.rows import add_rows
from .cpu.threads import for_spans
from .interop import Array, Home, as_array, borrow
from .loss import prepare
from .masking import Csr, FalseNegatives, csr


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

    def target_scores(self, targets: NDArray) -> NDArray:
        score = np.einsum("bd,bd->b", self.queries, self.items[targets])
        if self.bias is not None:
            score += self.bias[targets]
        return score / score.dtype.type(self.temperature)

    def problem(self, targets: NDArray | None = None) -> softmax.Problem:
        """The targets, if any, among all other items that are not excluded."""
        first = self.first_id
        ids = np.arange(first, len(self.items))
        bias = self.bias
        return softmax.Problem(
            queries=self.queries,
            positives=self.queries if targets is None else self.items[targets],
            negatives=self.items[first:],
            positive_bias=None if bias is None or targets is None else bias[targets],
            negative_bias=None if bias is None else bias[first:],
            positive_log_q=None,
            negative_log_q=None,
            drop=FalseNegatives.find(ids, targets, self.excluded, None, len(self.queries)),
            temperature=self.temperature,
        )


def _catalog(
    queries: Array,
    items: Array | Candidates,
    temperature: float | Array = 1.0,
    first_id: int = 0,
    exclude: Csr | None = None,
    **more: Array,
) -> tuple[_Catalog, dict[str, NDArray]]:
    """The checked catalog, and views of the arrays in `more`, from the same place."""
    items = as_candidates("items", items)
    place, given = borrow(
        {
            "queries": queries,
            "items.embeddings": items.embeddings,
            "items.bias": items.bias,
            **more,
        }
    )
    u, v, bias = given["queries"], given["items.embeddings"], given["items.bias"]
    for name, x in (("queries", u), ("items", v)):
        if x is None:
            raise ValueError(f"{name}: expected an array, got None")
        checks.floating(name, x)
        if x.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {x.shape}")
    checks.shape("items", v, (len(v), u.shape[1]), "(N, D) with D as queries")
    dtype = np.dtype(np.float64 if np.float64 in (u.dtype, v.dtype) else np.float32)
    if bias is not None:
        checks.shape("items.bias", bias, (len(v),), "(N,)")
        checks.floating("items.bias", bias)
        bias = bias.astype(dtype)
        checks.finite("items.bias", bias, "; to leave items out use exclude or first_id")
    catalog = _Catalog(
        np.ascontiguousarray(u, dtype),
        np.ascontiguousarray(v, dtype),
        bias,
        as_temperature(temperature),
        checks.integer("first_id", first_id, 0, len(v)),
        None if exclude is None else csr("exclude", exclude, len(u)),
        place,
    )
    return catalog, given


def _with_targets(
    queries: Array,
    items: Array | Candidates,
    target_ids: Array,
    temperature: float | Array = 1.0,
    first_id: int = 0,
    exclude: Csr | None = None,
) -> tuple[_Catalog, NDArray]:
    if target_ids is None:
        raise ValueError("target_ids: expected an array (B,), got None")
    catalog, given = _catalog(queries, items, temperature, first_id, exclude, target_ids=target_ids)
    targets = given["target_ids"]
    checks.integral("target_ids", targets)
    checks.shape("target_ids", targets, (len(catalog.queries),), "(B,)")
    last = len(catalog.items) - 1
    if len(targets) and not (first_id <= targets.min() and targets.max() <= last):
        raise ValueError(
            f"target_ids: expected ids from {first_id} to {last}, got {targets.min()} to "
            f"{targets.max()}"
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
    dtype = catalog.queries.dtype.type
    z = (catalog.queries / dtype(catalog.temperature)) @ catalog.items.T
    if catalog.bias is not None:
        z += catalog.bias / dtype(catalog.temperature)
    return catalog.place.give(z)


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
    at the last place is in the list is open. Where fewer than k items are left the id is −1 and
    the score −inf; where a score is NaN, id −1 and score NaN stand for the whole list.

    Examples
    --------
    >>> import numpy as np
    >>> top_k(np.eye(3), np.eye(3), 1).ids.tolist()
    [[0], [1], [2]]
    """
    catalog, _ = _catalog(queries, items, temperature, first_id, exclude)
    k = checks.integer("k", k, 1, max(1, len(catalog.items) - first_id))
    problem = catalog.problem()
    num_queries, dtype = len(catalog.queries), catalog.queries.dtype
    values, ids = np.full((num_queries, k), -np.inf, dtype), np.full((num_queries, k), -1)
    bias = np.empty(0, dtype) if problem.negative_bias is None else problem.negative_bias
    for_spans(
        best,
        -(-num_queries // softmax.HEIGHT),
        1,
        catalog.queries / dtype.type(catalog.temperature),
        problem.negatives,
        bias / dtype.type(catalog.temperature),
        problem.drop,
        first_id,
        values,
        ids,
    )
    order = np.lexsort((ids, -values))
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    broken = np.isnan(values).any(axis=1)
    values[broken], ids[broken] = np.nan, -1
    return TopK(catalog.place.give(ids), catalog.place.give(values))


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
    Scores that differ by no more than the rounding of their products count as tied. A score that
    is NaN counts as better: a broken model must not look good.

    Examples
    --------
    >>> import numpy as np
    >>> rank(np.eye(3), np.eye(3), np.array([0, 1, 0]))
    Ranks(num_better=array([0, 0, 1]), num_tied=array([0, 0, 1]))
    """
    catalog, targets = _with_targets(queries, items, target_ids, 1.0, first_id, exclude)
    found = softmax.value(catalog.problem(targets), ranks=True)
    return Ranks(catalog.place.give(found.num_better), catalog.place.give(found.num_tied))


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
    catalog, targets = _with_targets(queries, items, target_ids, temperature, first_id)
    return catalog.place.give(_log_normalizer(catalog) - catalog.target_scores(targets))


class CatalogGrads(NamedTuple):
    """Gradients of the exact loss: `items` are `Candidates` with embeddings (N, D) and bias."""

    queries: Array
    items: Candidates
    temperature: Array


def full_softmax_value_and_grad(
    queries: Array,
    items: Array | Candidates,
    target_ids: Array,
    *,
    temperature: float | Array = 1.0,
    first_id: int = 0,
    sample_weight: Array | None = None,
    reduction: str = "mean",
) -> tuple[Array, CatalogGrads]:
    """Exact cross-entropy over the whole catalog and its gradients, without forming (B, N).

    The sampled softmax with every other item as a negative: `full_softmax_loss`, to train by where
    the catalog is small enough, and to check a sampled loss against.

    Parameters
    ----------
    queries, items, target_ids, temperature, first_id : as for `full_softmax_loss`.
    sample_weight, reduction : as for `sampled_softmax_loss`.

    Returns
    -------
    loss, and `CatalogGrads`, each in its input's dtype; those of items below first_id are 0.

    Examples
    --------
    >>> import numpy as np
    >>> u, items = np.zeros((2, 4)), np.ones((8, 4))
    >>> loss, grads = full_softmax_value_and_grad(u, items, np.array([0, 5]))
    >>> float(loss.round(4)), grads.queries.shape, grads.items.embeddings.shape
    (2.0794, (2, 4), (8, 4))
    """
    catalog, targets = _with_targets(queries, items, target_ids, temperature, first_id)
    items = as_candidates("items", items)
    place, given = borrow(
        {"queries": queries, "items": items.embeddings, "sample_weight": sample_weight}
    )
    u, v, bias = catalog.queries, catalog.items, catalog.bias
    prepared = prepare(
        u,
        Candidates(targets, v[targets], bias=None if bias is None else bias[targets]),
        Candidates(
            np.arange(first_id, len(v)),
            v[first_id:],
            bias=None if bias is None else bias[first_id:],
        ),
        temperature=temperature,
        sample_weight=given["sample_weight"],
        reduction=reduction,
    )
    result, found = prepared.engine.value_and_gradients(prepared.problem, prepared.weight)
    d_items = np.zeros_like(v)
    d_items[first_id:] = found.negatives
    add_rows(d_items, targets, found.positives)
    d_bias = None
    if bias is not None:
        d_bias = np.bincount(targets, found.positive_bias, len(v))
        d_bias[first_id:] += found.negative_bias
        d_bias = place.give(d_bias.astype(as_array(items.bias).dtype))
    return place.give(np.asarray(prepared.loss(result))), CatalogGrads(
        place.give(found.queries.astype(given["queries"].dtype, copy=False)),
        Candidates(
            embeddings=place.give(d_items.astype(given["items"].dtype, copy=False)), bias=d_bias
        ),
        place.give(found.temperature),
    )


def log_normalizer(
    queries: Array,
    items: Array | Candidates,
    *,
    temperature: float | Array = 1.0,
    first_id: int = 0,
) -> Array:
    """logsumexp_k (u·v_k + b_k)/τ over the catalog (B,): log softmax is a score less this.

    Arguments as for `full_softmax_loss`; for queries with many targets, whose normaliser is one.
    """
    catalog, _ = _catalog(queries, items, temperature, first_id)
    return catalog.place.give(_log_normalizer(catalog))


def _log_normalizer(catalog: _Catalog) -> NDArray:
    found = softmax.value(catalog.problem())
    with np.errstate(divide="ignore"):  # an empty catalog: log 0
        return found.shift + np.log(found.total)
