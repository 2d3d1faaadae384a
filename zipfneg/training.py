"""The standalone trainer: two tables of embeddings, sampled softmax, sparse updates.

A batch is a pure function of (seed, step), as the negatives are: a run that is stopped and
resumed from its state goes on bit for bit.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import metrics, retrieval
from .checks import NDArray
from .contrastive import ContrastiveOutput, sum_by_id
from .cpu import rows as kernels
from .files import save_arrays
from .popularity import Empirical

# Streams of one seed: 0 is the sampler's.
BATCH_STREAM = 1


class Pairs(NamedTuple):
    """Positive (query, item) pairs as row numbers (P,), and how often each was seen."""

    query_ids: NDArray
    item_ids: NDArray
    counts: NDArray | None = None


OPTIMIZERS = ("adagrad", "rowwise-adagrad", "adam")


class Tables(NamedTuple):
    """Embeddings (Q, D) and (N, D), with what their optimiser keeps of each row's gradients.

    `squares` are AdaGrad's sums of squared gradients, one column for a row's mean, or Adam's second
    moments; `means` Adam's first.
    """

    queries: NDArray
    items: NDArray
    query_squares: NDArray
    item_squares: NDArray
    query_means: NDArray | None = None
    item_means: NDArray | None = None


def initial_tables(
    num_queries: int, num_items: int, dim: int, seed: int, optimizer: str = "adagrad"
) -> Tables:
    """Normal rows of length about 1; AdaGrad starts at 0.1, so that no first step is a leap."""
    rng = np.random.default_rng(seed)
    embeddings = [
        rng.standard_normal((rows, dim), np.float32) / np.float32(dim**0.5)
        for rows in (num_queries, num_items)
    ]
    if optimizer == "adam":
        return Tables(*embeddings, *(np.zeros_like(x) for x in (*embeddings, *embeddings)))
    width = 1 if optimizer == "rowwise-adagrad" else dim
    squares = (np.full((len(x), width), 0.1, np.float32) for x in embeddings)
    return Tables(*embeddings, *squares)


@dataclass
class Trainer:
    """Trains `tables` in place on `pairs`, one `step` at a time."""

    tables: Tables
    pairs: Pairs
    head: ContrastiveOutput
    batch_size: int
    learning_rate: float
    seed: int = 0
    steps_done: int = 0

    @cached_property
    def _law(self) -> Empirical:
        return Empirical(self.pairs.counts)

    def batch(self, step: int) -> NDArray:
        """Row numbers into the pairs (B,): by their counts, or else each pair once an epoch."""
        if self.pairs.counts is not None:
            return self._law.draw(self.batch_size, seed=self.seed, step=step, stream=BATCH_STREAM)
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.pairs.query_ids), self.seed, epoch)
        return order[place * self.batch_size :][: self.batch_size]

    def step(self) -> float:
        """One step of sampling, gradients and sparse updates; returns the batch's mean loss."""
        chosen = self.batch(self.steps_done)
        query_ids, item_ids = self.pairs.query_ids[chosen], self.pairs.item_ids[chosen]
        with np.errstate(over="ignore", invalid="ignore"):  # what diverges is told below
            out = self.head(
                self.tables.queries[query_ids],
                item_ids,
                items=self.tables.items,
                step=self.steps_done,
            )
        loss = float(out.loss)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.steps_done}: training diverged; lower the "
                f"learning rate {self.learning_rate}, or raise the temperature"
            )
        unique_ids, d_rows, _ = sum_by_id(query_ids, out.grads.queries)
        assert out.grads.items is not None
        # The loss is a mean over the batch. An optimiser's step does not depend on its scale, but
        # AdaGrad's initial squares do: they are meant for a gradient summed over the batch.
        scale, t = np.float32(len(chosen)), self.tables
        self._update(t.queries, t.query_squares, t.query_means, unique_ids, d_rows * scale)
        found = out.grads.items
        self._update(t.items, t.item_squares, t.item_means, found.ids, found.rows * scale)
        self.steps_done += 1
        return loss

    def _update(
        self, table: NDArray, squares: NDArray, means: NDArray | None, ids: NDArray, rows: NDArray
    ) -> None:
        rate = np.float32(self.learning_rate)
        if means is None:
            kernels.adagrad(table, squares, ids, rows, rate)
        else:
            kernels.adam(table, means, squares, ids, rows, rate, self.steps_done + 1)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.pairs.query_ids) // self.batch_size)

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """All that a later run needs to go on; `settings` are what it must agree on."""
        agreed = {**settings, "pairs": self._fingerprint}
        tables = {name: x for name, x in self.tables._asdict().items() if x is not None}
        save_arrays(path, **tables, steps_done=self.steps_done, settings=json.dumps(agreed))

    def load(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises
        ------
        ValueError
            If the file is no checkpoint, or of another run: other settings or other pairs.
        """
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                arrays = {name: saved[name] for name in saved.files}
            agreed = json.loads(str(arrays["settings"]))
            steps_done = int(arrays["steps_done"])
            tables = Tables(**{name: arrays[name] for name in Tables._fields if name in arrays})
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a checkpoint of zipfneg train: {error}") from error
        for name, value in settings.items():
            if agreed.get(name) != value:
                raise ValueError(
                    f"{path}: expected the run's own {name}, {agreed.get(name)}, got {value}; "
                    f"resume with the same file and settings"
                )
        shapes, expected = (
            [None if x is None else x.shape for x in t] for t in (tables, self.tables)
        )
        if agreed.get("pairs") != self._fingerprint or shapes != expected:
            raise ValueError(
                f"{path}: the run had other pairs; resume with the same file and columns"
            )
        for table, saved_table in zip(self.tables, tables, strict=True):
            if table is not None:
                table[...] = saved_table
        self.steps_done = steps_done

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for ids in (self.pairs.query_ids, self.pairs.item_ids):
            digest.update(ids.tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def _permutation(size: int, seed: int, epoch: int) -> NDArray:
    return np.random.default_rng((seed, epoch)).permutation(size)


class Report(NamedTuple):
    """How a model does against the full catalog."""

    log_loss: float  # nats, exact softmax over all items
    hit_rate: float  # share of targets among the first 10
    ndcg: float
    coverage: float  # share of the catalog that stands in anyone's first 10


def log_losses(tables: Tables, targets: Pairs, *, temperature: float = 1.0) -> NDArray:
    """Exact full-softmax log loss of each target (P,), in nats; a query's normaliser is shared."""
    query_ids, row = np.unique(targets.query_ids, return_inverse=True)
    log_total = retrieval.log_normalizer(
        tables.queries[query_ids], tables.items, temperature=temperature
    )
    scores = np.einsum(
        "pd,pd->p", tables.queries[targets.query_ids], tables.items[targets.item_ids]
    )
    return log_total[row] - scores / np.float32(temperature)


def evaluate(
    tables: Tables,
    targets: Pairs,
    *,
    temperature: float = 1.0,
    seen: Pairs | None = None,
    k: int = 10,
) -> Report:
    """Full-catalog figures of the targets, weighted by their counts.

    Items that stand with a query in `seen` are left out of its ranking, but not of the loss.
    """
    loss = log_losses(tables, targets, temperature=temperature)
    ranks, tied = retrieval.rank(
        tables.queries[targets.query_ids],
        tables.items,
        targets.item_ids,
        exclude=None if seen is None else seen_items(seen, targets.query_ids),
    )
    query_ids = np.unique(targets.query_ids)
    best = retrieval.top_k(
        tables.queries[query_ids],
        tables.items,
        min(k, len(tables.items)),
        exclude=None if seen is None else seen_items(seen, query_ids),
    )

    def mean(x: NDArray) -> float:
        return float(np.average(x.astype(np.float64), weights=targets.counts))

    return Report(
        mean(loss),
        mean(metrics.recall(ranks, k, num_tied=tied)),
        mean(metrics.ndcg(ranks, k, num_tied=tied)),
        # Fewer than k items may be left to a query.
        len(np.unique(best.ids[best.scores > -np.inf])) / len(tables.items),
    )


def seen_items(seen: Pairs, query_ids: NDArray) -> tuple[NDArray, NDArray]:
    """Ragged (indptr, ids): the items that stand with each of the given queries in `seen`."""
    order = np.argsort(seen.query_ids, kind="stable")
    starts = np.searchsorted(seen.query_ids[order], query_ids)
    stops = np.searchsorted(seen.query_ids[order], query_ids, side="right")
    counts = stops - starts
    indptr = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts)
    return indptr, seen.item_ids[order[np.repeat(starts, counts) + within]]
