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
from .sampling import MixtureSampler


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
        whole (`MixtureSampler`).
    temperature, correction, loss, loss_parameter : as for `sampled_softmax_loss`; "hinge" and
        "top1" go with correction="none", since samplers bring log q.
    mask_accidental_hits : drop negatives equal to the row's positive. Keep the hits (False) with
        `PopularitySampler(unique=False)`: log(S·p) is then exact for every S.
    top_ks : the k of the metrics, which rank the positive among the sampled negatives by the
        uncorrected score; () for none.
    store_negative_ids : return the negatives' ids with each step.

    Notes
    -----
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
        return tuple(MixtureSampler(given).samplers) if given else ()

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

        # Without one, a sampler need not know streams.
        when: dict[str, Any] = {"step": step} | ({"stream": stream} if stream else {})
        if tied:
            for law in (s.law for s in self._sources() if hasattr(s, "law")):
                if law.first_id + law.num_items > len(embeddings):
                    raise ValueError(
                        f"items: expected a row for every id of the samplers' laws, "
                        f"{law.first_id + law.num_items} rows or more, got {len(embeddings)}"
                    )
            draw = self.sampler.sample(Candidates(ids=ids), **when)
            ids = ids.astype(np.int64, copy=False)
            both = np.concatenate([ids, draw.negatives.ids])  # (B + S,)
            if len(both) and not (both.min() >= 0 and both.max() < len(embeddings)):
                raise ValueError(
                    f"items: expected a row for every id drawn or given, 0 to {both.max()}, got "
                    f"{len(embeddings)} rows"
                )
            p, v = embeddings[ids], embeddings[draw.negatives.ids]
            p_bias = None if bias is None else bias[ids]
            v_bias = None if bias is None else bias[draw.negatives.ids]
        else:
            checks.shape("positives", embeddings, (len(ids), embeddings.shape[1]), "(B, D)")
            batch, sampler = Candidates(ids, embeddings, bias=bias), self.sampler
            if isinstance(sampler, MixtureSampler):
                draws = sampler.draws(batch, **when)
                draw = sampler.join(draws, batch)
            else:
                draws = [sampler.sample(batch, **when)]
                draw = draws[0]
            if draw.negatives.embeddings is None:
                raise ValueError(
                    f"samplers: {type(sampler).__name__} gives ids without embeddings; pass "
                    f"items=table, or use InBatchSampler or CachedSampler with positives="
                )
            p, v, p_bias, v_bias = embeddings, draw.negatives.embeddings, bias, draw.negatives.bias

        if draw.positives is None or np.ndim(draw.negatives.ids) != 1:
            raise ValueError(
                "samplers: expected a draw of the positives and of negatives with ids (S,), got "
                f"positives {draw.positives} and ids of shape {np.shape(draw.negatives.ids)}"
            )
        hits = self.mask_accidental_hits
        compare = hits or known_positives is not None
        prepared = prepare(
            given["queries"],
            Candidates(ids if hits else None, p, draw.positives.log_q, p_bias),
            Candidates(draw.negatives.ids if compare else None, v, draw.negatives.log_q, v_bias),
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
            unique_ids, d_rows, row = sum_by_id(both, gradients.positives, gradients.negatives)
            d_bias = np.concatenate([gradients.positive_bias, gradients.negative_bias])
            d_bias = np.bincount(row, d_bias, len(unique_ids))
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
            negative_ids=place.give(draw.negatives.ids) if self.store_negative_ids else None,
        )

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


def sum_by_id(ids: NDArray, *parts: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Sum rows of equal id: the ids ascending, their sums, and where each given id went.

    `parts` are arrays of rows that follow one another as `ids` do.
    """
    unique_ids, row = np.unique(ids, return_inverse=True)
    total = np.zeros((len(unique_ids), parts[0].shape[1]), parts[0].dtype)
    start = 0
    for part in parts:
        row_kernels.add_rows(total, row[start : start + len(part)], part)
        start += len(part)
    return unique_ids, total, row


def _first_id(sampler: Any) -> int:
    """The lowest id of its law; 0 where it has none."""
    law = getattr(sampler, "law", None) or getattr(sampler, "popularity", None)
    return getattr(law, "first_id", 0)
