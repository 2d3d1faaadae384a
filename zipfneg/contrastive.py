"""The head: sampler, false negatives, loss and metrics in one frozen value."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import checks, retrieval
from .candidates import Candidates, as_candidates, as_temperature
from .checks import NDArray
from .cpu import rows as row_kernels
from .interop import Array, as_array, borrow
from .loss import CORRECTIONS, check_loss, prepare
from .masking import Csr
from .metrics import ranking_metrics
from .sampling import Draw, MixtureSampler, merge_repeats


class RowGrads(NamedTuple):
    """Gradients of the rows of a table that a step touched, each id once, ascending.

    ids (M,), rows (M, D), and bias (M,) where the items have biases.
    """

    ids: Array
    rows: Array
    bias: Array | None = None


class ContrastiveGrads(NamedTuple):
    """Gradients of the head's loss: `items` where a table was given, else `positives`."""

    queries: Array
    items: RowGrads | None
    positives: Candidates | None
    temperature: Array


class Contrastive(NamedTuple):
    """One step of the head: the mean loss, its gradients, metrics by name, negative ids (S,)."""

    loss: Array
    grads: ContrastiveGrads
    metrics: dict[str, float]
    negative_ids: Array | None


@dataclass(frozen=True)
class ContrastiveOutput:
    """Contrastive output of a retrieval model: samples negatives and gives loss and gradients.

    Parameters
    ----------
    samplers : one sampler, or several, whose negatives stand side by side with the log q of the
        whole (`MixtureSampler`). One that draws for each query its own (`per_query`) needs a table.
    temperature, correction, loss, loss_parameter : as for `sampled_softmax_loss`; "hinge" and
        "top1" go with correction="none", since samplers bring log q.
    mask_accidental_hits : drop negatives equal to the row's positive. Keep the hits (False) with
        `PopularitySampler(unique=False)`: log(S·p) is then exact for every S.
    top_ks : the k of the metrics, which rank the positive among the sampled negatives by the
        uncorrected score; () for none.
    store_negative_ids : return the negatives' ids with each step.

    Notes
    -----
    Where the softmax is corrected and no metrics are asked for, negatives that a sampler repeats
    are merged into one (`merge_repeats`): the same loss and gradients, with less work.

    Metrics among sampled negatives are higher than those over the catalog, and order models
    differently (Krichene & Rendle 2020, On sampled metrics for item recommendation): watch
    training by them, and judge by `zipfneg.rank`.

    Examples
    --------
    Weight tying, with a table of item embeddings whose row 0 is padding:

    >>> import numpy as np
    >>> from zipfneg import ContrastiveOutput, LogUniform, PopularitySampler
    >>> rng = np.random.default_rng(0)
    >>> table, queries = rng.normal(size=(1001, 16)), rng.normal(size=(32, 16))
    >>> head = ContrastiveOutput(PopularitySampler(LogUniform(1000, first_id=1), 64))
    >>> out = head(queries, rng.integers(1, 1001, 32), items=table, step=0)
    >>> table[out.grads.items.ids] -= 0.1 * out.grads.items.rows
    >>> sorted(out.metrics)
    ['map@10', 'mrr@10', 'ndcg@10', 'precision@10', 'recall@10']

    Two towers, with the batch's items as negatives:

    >>> from zipfneg import InBatchSampler
    >>> head = ContrastiveOutput(InBatchSampler(LogUniform(1000)), temperature=0.05)
    >>> out = head(queries, rng.integers(0, 1000, 32), positives=rng.normal(size=(32, 16)))
    >>> out.grads.positives.embeddings.shape
    (32, 16)
    """

    samplers: Any
    temperature: float | Array = field(default=1.0, kw_only=True)
    correction: str = field(default="both", kw_only=True)
    mask_accidental_hits: bool = field(default=True, kw_only=True)
    loss: str = field(default="softmax", kw_only=True)
    loss_parameter: float | None = field(default=None, kw_only=True)
    top_ks: tuple[int, ...] = field(default=(10,), kw_only=True)
    store_negative_ids: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.samplers, list | tuple):
            samplers = tuple(self.samplers)
            object.__setattr__(self, "samplers", samplers)
            if not samplers:
                raise ValueError("samplers: expected at least one, got none")
        for sampler in self._sources():
            if not hasattr(sampler, "sample"):
                raise TypeError(f"samplers: expected objects with sample(), got {sampler!r}")
        object.__setattr__(self, "temperature", as_temperature(self.temperature))
        checks.one_of("correction", self.correction, CORRECTIONS)
        check_loss(self.loss, self.loss_parameter)
        if isinstance(self.top_ks, int):
            raise TypeError(f"top_ks: expected a sequence of integers, got {self.top_ks}")
        top_ks = tuple(checks.integer("top_ks", k, 1, 2**40) for k in self.top_ks)
        object.__setattr__(self, "top_ks", top_ks)

    @property
    def sampler(self) -> Any:
        """The one sampler, or the mixture of several."""
        if not isinstance(self.samplers, tuple):
            return self.samplers
        return self.samplers[0] if len(self.samplers) == 1 else MixtureSampler(self.samplers)

    def _sources(self) -> tuple[Any, ...]:
        """The samplers, mixtures taken apart."""
        given = self.samplers if isinstance(self.samplers, tuple) else (self.samplers,)
        return tuple(
            s for x in given for s in (x.samplers if isinstance(x, MixtureSampler) else (x,))
        )

    def __call__(
        self,
        queries: Array,
        positive_ids: Array,
        *,
        items: Array | Candidates | None = None,
        positives: Array | Candidates | None = None,
        step: int = 0,
        stream: int = 0,
        known_positives: Csr | None = None,
        sample_weight: Array | None = None,
    ) -> Contrastive:
        """Sample negatives for a batch; its loss, gradients and metrics.

        Parameters
        ----------
        queries : (B, D).
        positive_ids : (B,), the id of each query's item.
        items : the table (N, D), row = id, or `Candidates` with embeddings (N, D) and bias (N,).
            Positives and negatives are its rows.
        positives : instead of a table, the positives' own embeddings (B, D), or `Candidates` with
            embeddings and bias, for samplers whose negatives come with embeddings
            (`InBatchSampler`, `CachedSampler`). What a sampler brings from elsewhere is a
            constant.
        step, stream : the training step and, say, the worker's rank: negatives are a pure function
            of the sampler and them.
        known_positives, sample_weight : as for `sampled_softmax_loss`.

        Returns
        -------
        `Contrastive`, its arrays of the inputs' framework.
        """
        if (items is None) == (positives is None):
            raise ValueError("items, positives: expected exactly one of them")
        tied = items is not None
        name = "items" if tied else "positives"
        side = as_candidates(name, items if tied else positives)
        if side.ids is not None or side.log_q is not None:
            raise ValueError(
                f"{name}: expected embeddings and bias alone, got ids or log_q too; ids are "
                f"positive_ids, and log q comes from the samplers"
            )
        place, given = borrow(
            {
                "queries": queries,
                "positive_ids": positive_ids,
                f"{name}.embeddings": side.embeddings,
                f"{name}.bias": side.bias,
                "sample_weight": sample_weight,
            }
        )
        ids = given["positive_ids"]
        embeddings, bias = given[f"{name}.embeddings"], given[f"{name}.bias"]
        if ids is None:
            raise ValueError("positive_ids: expected an array (B,), got None")
        if embeddings is None or embeddings.ndim != 2:
            raise ValueError(
                f"{name}: expected embeddings {'(N, D)' if tied else '(B, D)'}, got "
                f"{None if embeddings is None else embeddings.shape}"
            )
        checks.floating(name, embeddings)
        if bias is not None:
            checks.shape(f"{name}.bias", bias, embeddings.shape[:1], f"as {name}.embeddings")

        checks.integral("positive_ids", ids)
        if ids.ndim != 1:
            raise ValueError(f"positive_ids: expected shape (B,), got {ids.shape}")
        ids = ids.astype(np.int64, copy=False)
        draws: list[Draw] = []
        negatives: Any
        # Without one, a sampler need not know streams.
        when: dict[str, Any] = {"step": step} | ({"stream": stream} if stream else {})
        if tied:
            draw = self._draw_rows(ids, embeddings, when)
            negatives, v = draw.negatives, embeddings
            if self._may_merge and negatives.log_q is not None and negatives.ids.ndim == 1:
                negatives = merge_repeats(negatives)
            rows = negatives.ids
            p, p_bias = embeddings[ids], None if bias is None else bias[ids]
            v_bias = None if bias is None else bias[rows]
            if rows.ndim == 1:
                v = embeddings[rows]
        else:
            checks.shape("positives", embeddings, (len(ids), embeddings.shape[1]), "(B, D)")
            draw, draws = self._draw_embeddings(Candidates(ids, embeddings, bias=bias), when)
            negatives, p, p_bias = draw.negatives, embeddings, bias
            rows, v, v_bias = negatives.ids, negatives.embeddings, negatives.bias
        drawn_ids: Any = draw.negatives.ids
        own_log_q = None if draw.positives is None else draw.positives.log_q
        hits = self.mask_accidental_hits
        compare = hits or known_positives is not None
        prepared = prepare(
            given["queries"],
            Candidates(ids if hits else None, p, own_log_q, p_bias),
            # Rows (B, S) of a table need their ids in any case.
            Candidates(rows if compare or rows.ndim == 2 else None, v, negatives.log_q, v_bias),
            temperature=self.temperature,
            known_positives=known_positives,
            sample_weight=given["sample_weight"],
            correction=self.correction,
            loss=self.loss,
            loss_parameter=self.loss_parameter,
        )
        result, gradients = prepared.engine.value_and_gradients(
            prepared.problem, prepared.weight, ranks=bool(self.top_ks)
        )
        metrics = {}
        if self.top_ks:
            metrics = ranking_metrics(result.num_better, self.top_ks, num_tied=result.num_tied)

        def back(gradient: NDArray, like: NDArray | None) -> Array:
            return None if like is None else place.give(gradient.astype(like.dtype, copy=False))

        item_grads = positive_grads = None
        if tied:
            unique_ids, place_of = places(
                np.concatenate([ids, rows.ravel().astype(np.int64)]), len(embeddings)
            )
            at, of_rows = place_of[: len(ids)], place_of[len(ids) :].reshape(rows.shape)
            d_rows = np.zeros((len(unique_ids), p.shape[1]), gradients.queries.dtype)
            row_kernels.add_rows(d_rows, at, gradients.positives)
            if rows.ndim == 1:
                row_kernels.add_rows(d_rows, of_rows, gradients.negatives)
            else:
                weights = gradients.negative_bias
                row_kernels.add_products(d_rows, of_rows, weights, prepared.scores.queries)
            d_bias = np.concatenate([gradients.positive_bias, gradients.negative_bias.ravel()])
            d_bias = np.bincount(place_of, d_bias, len(unique_ids))
            item_grads = RowGrads(
                place.give(unique_ids), back(d_rows, embeddings), back(d_bias, bias)
            )
        else:
            d_p, d_bias, start = gradients.positives, gradients.positive_bias, 0
            for part in draws:
                stop = start + len(as_array(part.negatives.ids))
                if part.negatives.embeddings is embeddings:  # the batch's own stand on both sides
                    d_p = d_p + gradients.negatives[start:stop]
                    d_bias = d_bias + gradients.negative_bias[start:stop]
                start = stop
            positive_grads = Candidates(embeddings=back(d_p, embeddings), bias=back(d_bias, bias))
        return Contrastive(
            loss=place.give(prepared.loss(result)),
            grads=ContrastiveGrads(
                queries=back(gradients.queries, given["queries"]),
                items=item_grads,
                positives=positive_grads,
                temperature=place.give(gradients.temperature),
            ),
            metrics=metrics,
            negative_ids=place.give(drawn_ids) if self.store_negative_ids else None,
        )

    @property
    def _may_merge(self) -> bool:
        """Whether repeated negatives may stand once, with log q less log of their copies.

        So they may in the softmax. Ranks count copies.
        """
        return self.loss == "softmax" and self.correction != "none" and not self.top_ks

    def _draw_rows(self, ids: NDArray, table: NDArray, when: dict[str, Any]) -> Draw:
        """Negatives whose ids are rows of the table."""
        for law in (s.law for s in self._sources() if hasattr(s, "law")):
            if law.first_id + law.num_items > len(table):
                raise ValueError(
                    f"items: expected a row for every id of the samplers' laws, "
                    f"{law.first_id + law.num_items} rows or more, got {len(table)}"
                )
        draw = self.sampler.sample(Candidates(ids=ids), **when)
        _check_draw(draw, (1, 2), "(S,) or (B, S)")
        for drawn in (ids, draw.negatives.ids):
            if drawn.size and not (drawn.min() >= 0 and drawn.max() < len(table)):
                raise ValueError(
                    f"items: expected a row for every id drawn or given, {drawn.min()} to "
                    f"{drawn.max()}, got {len(table)} rows"
                )
        return draw

    def _draw_embeddings(self, batch: Candidates, when: dict[str, Any]) -> tuple[Draw, list[Draw]]:
        """Negatives that come with embeddings, whole and by source."""
        sampler = self.sampler
        if isinstance(sampler, MixtureSampler):
            draws = sampler.draws(batch, **when)
            draw = sampler.join(draws, batch)
        else:
            draw = sampler.sample(batch, **when)
            draws = [draw]
        if draw.negatives.embeddings is None:
            raise ValueError(
                f"samplers: {type(sampler).__name__} gives ids without embeddings; pass "
                f"items=table, or use InBatchSampler or CachedSampler with positives="
            )
        _check_draw(draw, (1,), "(S,)")
        return draw, draws

    def scores(self, queries: Array, items: Array | Candidates) -> Array:
        """(u·v + b)/τ against the full catalog, (B, N): see `zipfneg.scores`."""
        return retrieval.scores(queries, items, temperature=self.temperature)

    def top_k(
        self, queries: Array, items: Array | Candidates, k: int, *, exclude: Csr | None = None
    ) -> retrieval.TopK:
        """The k best items of each query: see `zipfneg.top_k`.

        Ids that the samplers reserve (below every law's first_id) are left out.
        """
        return retrieval.top_k(
            queries,
            items,
            k,
            temperature=self.temperature,
            first_id=min(map(_first_id, self._sources())),
            exclude=exclude,
        )


def _check_draw(draw: Any, ndims: tuple[int, ...], shapes: str) -> None:
    """Samplers may be the user's own."""
    if not isinstance(draw, Draw) or draw.positives is None or draw.negatives.ids is None:
        raise ValueError(
            f"samplers: expected a Draw of the positives and of negatives with ids, got {draw!r}"
        )
    ids = draw.negatives.ids
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in ndims:
        raise ValueError(
            f"samplers: expected negatives with an integer NumPy array of ids {shapes}, as the "
            f"positives came in NumPy, got {type(ids).__name__} of shape {np.shape(ids)}"
        )


def places(ids: NDArray, num_items: int) -> tuple[NDArray, NDArray]:
    """The distinct ids, ascending, and the place of each given one among them."""
    if num_items > 64 * ids.size:
        distinct, place = np.unique(ids, return_inverse=True)
        return distinct, place
    # By a table over all items: a sort takes longer.
    seen = np.zeros(num_items, np.bool_)
    seen[ids] = True
    distinct = np.flatnonzero(seen)
    place = np.empty(num_items, np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[ids]


def _first_id(sampler: Any) -> int:
    """The lowest id of its law; 0 where it has none."""
    law = getattr(sampler, "law", None) or getattr(sampler, "popularity", None)
    return getattr(law, "first_id", 0)
