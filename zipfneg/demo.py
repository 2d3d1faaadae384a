"""The demonstration: word bigrams, sampled softmax with and without the logQ correction.

The pairs are the 286,358 English bigrams with their counts that the `wordsegment` package ships
(258,437 different ones: some stand in several lines): given a word, retrieve the next one among
19,252.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from .checks import NDArray
from .contrastive import ContrastiveOutput
from .data import by_frequency, codes
from .files import replacing
from .popularity import LogUniform
from .retrieval import top_k
from .sampling import PopularitySampler
from .training import Pairs, Report, Tables, Trainer, evaluate, initial_tables, log_losses


class Bigrams(NamedTuple):
    """Pairs of words as frequency ranks, with counts; the words by rank."""

    pairs: Pairs
    left: list[str]
    right: list[str]

    def unigram_loss(self) -> float:
        """Log loss of always predicting the right words' frequencies, in nats."""
        return self._log_loss(np.bincount(self.pairs.item_ids, self._weights)[self.pairs.item_ids])

    def entropy_floor(self) -> float:
        """Log loss of the pairs' own conditional frequencies: no model does better."""
        given = np.bincount(self.pairs.query_ids, self._weights)[self.pairs.query_ids]
        # Some pairs stand in several lines: what counts is their sum.
        number = self.pairs.query_ids * len(self.right) + self.pairs.item_ids
        _, row = np.unique(number, return_inverse=True)
        return self._log_loss(np.bincount(row, self._weights)[row] / given)

    @property
    def _weights(self) -> NDArray:
        assert self.pairs.counts is not None
        return self.pairs.counts / self.pairs.counts.sum()

    def _log_loss(self, prob: NDArray) -> float:
        return float(-(self._weights * np.log(prob)).sum())


def load_bigrams() -> Bigrams:
    import wordsegment

    table = pa.csv.read_csv(
        Path(wordsegment.__file__).with_name("bigrams.txt"),
        pa.csv.ReadOptions(column_names=["words", "count"]),
        pa.csv.ParseOptions(delimiter="\t", quote_char=False),
    )
    counts = table["count"].to_numpy().astype(np.float64)
    words = pc.split_pattern(table["words"], " ")

    def numbered(position: int) -> tuple[NDArray, list[str]]:
        number, names = codes(pc.list_element(words, position))
        rank, order = by_frequency(np.bincount(number, counts))
        return rank[number], names.take(pa.array(order)).to_pylist()

    (left_ids, left), (right_ids, right) = numbered(0), numbered(1)
    return Bigrams(Pairs(left_ids, right_ids, counts), left, right)


class Run(NamedTuple):
    """One training run: exact log loss at some steps, and the figures at the end."""

    name: str
    steps: list[int]
    log_losses: list[float]
    report: Report
    tables: Tables


def train(
    bigrams: Bigrams,
    *,
    correction: str,
    steps: int,
    num_sampled: int,
    dim: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[range, str], Any],
) -> Run:
    """Train with draws with replacement, repeats and hits kept: exact for every number of them."""
    tables = initial_tables(len(bigrams.left), len(bigrams.right), dim, seed)
    sampler = PopularitySampler(
        LogUniform(len(bigrams.right)), num_sampled, unique=False, seed=seed
    )
    head = ContrastiveOutput(sampler, correction=correction, mask_accidental_hits=False, top_ks=())
    trainer = Trainer(tables, bigrams.pairs, head, batch_size, learning_rate, seed)
    name = "without logQ" if correction == "none" else "with logQ"
    looks = sorted({steps, *(int(steps * share) for share in (0.03, 0.1, 0.2, 0.35, 0.5, 0.75))})
    seen, losses = [], []
    for _ in progress(range(steps), f"training {name}"):
        trainer.step()
        if trainer.steps_done in looks:
            loss = np.average(log_losses(tables, bigrams.pairs), weights=bigrams.pairs.counts)
            seen.append(trainer.steps_done)
            losses.append(float(loss))
    return Run(name, seen, losses, evaluate(tables, bigrams.pairs), tables)


def next_words(bigrams: Bigrams, tables: Tables, words: list[str], k: int) -> dict[str, list[str]]:
    """The k most probable next words."""
    rows = np.array([bigrams.left.index(word) for word in words])
    ids = top_k(tables.queries[rows], tables.items, k).ids
    return {word: [bigrams.right[i] for i in row] for word, row in zip(words, ids, strict=True)}


def similar_words(
    bigrams: Bigrams, tables: Tables, words: list[str], k: int
) -> dict[str, list[str]]:
    """The k nearest right words, by the cosine of their embeddings."""
    items = tables.items / np.linalg.norm(tables.items, axis=1, keepdims=True)
    rows = np.array([bigrams.right.index(word) for word in words])
    ids = top_k(items[rows], items, k + 1).ids[:, 1:]  # the nearest is the word itself
    return {word: [bigrams.right[i] for i in row] for word, row in zip(words, ids, strict=True)}


def draw_picture(path: Path, bigrams: Bigrams, runs: list[Run], num_draws: int = 10**7) -> None:
    """Loss curves, and drawn against expected frequencies of the log-uniform law."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(runs, ("o-", "s--"), strict=True):
        left.plot(run.steps, run.log_losses, style, label=f"{run.name}: {run.report.log_loss:.3f}")
    for value, name, style in (
        (bigrams.unigram_loss(), "unigram", ":"),
        (bigrams.entropy_floor(), "entropy floor", "-."),
    ):
        left.axhline(value, color="grey", linestyle=style, label=f"{name}: {value:.3f}")
    left.set(
        xlabel="training step",
        ylabel="log loss over all words (nats)",
        title="Next word: exact full-softmax loss",
    )
    left.legend()

    law = LogUniform(len(bigrams.right))
    counts = np.bincount(law.draw(num_draws, seed=0), minlength=law.num_items)
    ids = np.arange(law.num_items)
    right.loglog(
        ids + 1, counts, ".", markersize=2, alpha=0.4, label=f"drawn, {num_draws:,} in all"
    )
    right.loglog(ids + 1, num_draws * np.exp(law.log_prob(ids)), "k-", label="expected")
    right.set(
        xlabel="popularity rank (id + 1)", ylabel="times drawn", title="Log-uniform negatives"
    )
    right.legend(markerscale=4)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
