"""In-batch softmax in both directions: each query finds its item, and each item its query."""

from typing import Any, NamedTuple

import numpy as np

from . import checks
from .candidates import Candidates, as_candidates
from .checks import NDArray
from .interop import Array, borrow
from .loss import Prepared, prepare


class SymmetricGrads(NamedTuple):
    """Gradients of both sides, `Candidates` with embeddings and bias, and of the temperature."""

    queries: Candidates
    items: Candidates
    temperature: Array


def symmetric_softmax_value_and_grad(
    queries: Candidates | Array,
    items: Candidates | Array,
    *,
    temperature: float | Array = 1.0,
    sample_weight: Array | None = None,
    correction: str = "both",
    reduction: str = "mean",
) -> tuple[Array, SymmetricGrads]:
    """The two-tower loss of a batch of pairs, in both directions, and its gradients.

    With a_ij = (u_i·v_j)/τ, the mean of two sampled softmaxes over the batch::

        L_i = ½·[ log Σ_j e^(a_ij − log q_j) − (a_ii − log q_i) ]     query i among the items
            + ½·[ log Σ_j e^(a_ji − log r_j) − (a_ii − log r_i) ]     item i among the queries

    with log q of the items, log r of the queries, each among the batch's. This is CLIP's loss
    (Radford et al. 2021), with a correction for popularity on either side.

    Parameters
    ----------
    queries, items : `Candidates` of B pairs: embeddings (B, D) and, where known, ids, log_q and
        bias (B,). Plain arrays mean embeddings alone. An item's bias counts where items compete, a
        query's where queries do.
    temperature, correction, sample_weight, reduction : as for `sampled_softmax_loss`. log q is
        subtracted on each side that has it.

    Returns
    -------
    loss, and `SymmetricGrads`; with reduction "none" the loss is (B,), and the gradients are those
    of its sum.

    Notes
    -----
    Pairs that share a query or an item are no negatives of each other: where ids are given, such
    combinations are dropped in both directions, in time and memory of the sum of the squares of the
    numbers of equal ids.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import Candidates, symmetric_softmax_value_and_grad
    >>> u, v = np.eye(4), np.eye(4)
    >>> loss, grads = symmetric_softmax_value_and_grad(u, v, temperature=0.5)
    >>> float(loss.round(4)), grads.items.embeddings.shape
    (0.3408, (4, 4))
    >>> items = Candidates(ids=np.array([7, 7, 2, 3]), embeddings=v)
    >>> loss, _ = symmetric_softmax_value_and_grad(u, items, temperature=0.5)
    >>> float(loss.round(4))
    0.2901
    """
    queries, items = as_candidates("queries", queries), as_candidates("items", items)
    place, given = borrow(
        {
            **{f"queries.{name}": x for name, x in queries._asdict().items()},
            **{f"items.{name}": x for name, x in items._asdict().items()},
            "sample_weight": sample_weight,
        }
    )
    u, v = (
        Candidates(*(given[f"{side}.{name}"] for name in Candidates._fields))
        for side in ("queries", "items")
    )
    for side, x in (("queries", u.embeddings), ("items", v.embeddings)):
        if x is None or x.ndim != 2:
            raise ValueError(
                f"{side}: expected embeddings (B, D), got {None if x is None else x.shape}"
            )
        checks.floating(side, x)
    shape = np.asarray(u.embeddings).shape
    checks.shape("items", np.asarray(v.embeddings), shape, "(B, D) as queries")
    same = _same_pairs(u.ids, v.ids, shape[0])

    def direction(anchors: Candidates, found: Candidates, side: str) -> tuple[Prepared, Any, Any]:
        """Each anchor's own among all that are to be found."""
        for name in ("log_q", "bias"):
            x = getattr(found, name)
            if x is not None:
                checks.shape(f"{side}.{name}", x, shape[:1], f"(B,) as {side}.embeddings")
                checks.finite(f"{side}.{name}", x.astype(np.float64))
        prepared = prepare(
            anchors.embeddings,
            found._replace(ids=None),
            found._replace(ids=np.arange(shape[0])),
            temperature=temperature,
            known_positives=same,
            sample_weight=given["sample_weight"],
            correction=correction,
            reduction=reduction,
        )
        return prepared, *prepared.engine.value_and_gradients(prepared.problem, prepared.weight / 2)

    found_items, items_result, of_items = direction(u, v, "items")
    found_queries, queries_result, of_queries = direction(v, u, "queries")
    loss = found_items.loss(items_result) / 2 + found_queries.loss(queries_result) / 2

    def back(side: Candidates, anchor: Any, own: Any) -> Candidates:
        """As anchors; and as what is found, once each query's own and once among the others."""

        def given(total: NDArray, like: NDArray | None) -> Array:
            return None if like is None else place.give(total.astype(like.dtype, copy=False))

        return Candidates(
            embeddings=given(anchor.queries + own.positives + own.negatives, side.embeddings),
            bias=given(own.positive_bias + own.negative_bias, side.bias),
        )

    return place.give(np.asarray(loss)), SymmetricGrads(
        back(u, of_items, of_queries),
        back(v, of_queries, of_items),
        place.give(of_items.temperature + of_queries.temperature),
    )


def _same_pairs(
    query_ids: NDArray | None, item_ids: NDArray | None, size: int
) -> tuple[NDArray, NDArray]:
    """For each pair, the positions of those with its query or its item, itself among them."""
    rows, columns = [np.arange(size)], [np.arange(size)]
    for side, ids in (("queries", query_ids), ("items", item_ids)):
        if ids is None:
            continue
        checks.integral(f"{side}.ids", ids)
        checks.shape(f"{side}.ids", ids, (size,), "(B,)")
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(ids[order]) != 0][:size])
        for group in np.split(order, starts[1:]):
            if len(group) > 1:
                rows.append(np.repeat(group, len(group)))
                columns.append(np.tile(group, len(group)))
    row, column = np.concatenate(rows), np.concatenate(columns)
    counts = np.bincount(row, minlength=size)
    return np.concatenate([[0], np.cumsum(counts)]), column[np.argsort(row, kind="stable")]
