"""Samplers: which negatives, with which log q."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import checks, logq
from .candidates import Candidates
from .checks import NDArray
from .interop import NUMPY, Array, Home, as_array, borrow, view_of
from .popularity import Empirical, Law, stream_words, uniforms


class Draw(NamedTuple):
    """A sample of negatives, with log q for both sides.

    `positives` are the given ones with their log q (None if none were given), `negatives` hold
    ids and log q, and embeddings where the source has them. `num_tries` counts the draws made.
    """

    positives: Candidates | None
    negatives: Candidates
    num_tries: int


def _given(
    positives: Candidates | Array | None, device: str | None
) -> tuple[Home, Candidates | None, NDArray | None]:
    """The positives as Candidates, a view of their ids, and where results go."""
    checks.one_of("device", device, (None, "cpu"))  # type: ignore[arg-type]
    if positives is None:
        return NUMPY, None, None
    if not isinstance(positives, Candidates):
        positives = Candidates(ids=positives)
    if positives.ids is None:
        raise ValueError("positives.ids: expected an array (B,), got None")
    place, views = borrow({"positives.ids": positives.ids})
    ids = views["positives.ids"]
    checks.integral("positives.ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"positives.ids: expected shape (B,), got {ids.shape}")
    return place, positives, ids


@dataclass(frozen=True)
class PopularitySampler:
    """Negatives from a popularity law, shared by the batch.

    Parameters
    ----------
    law : `LogUniform`, `ZipfMandelbrot`, `Uniform` or `Empirical`.
    num_sampled : S, the number of negatives.
    unique : True draws S distinct ids (draw with replacement, skip what is already there); their
        log q is the log inclusion probability. False keeps repeats; log q = log(S·p).
    seed : of all draws, 0 to 2**64 − 1.

    Raises
    ------
    ValueError
        For unique=True where the law has fewer than S ids of positive probability.

    Notes
    -----
    Unique sampling never hangs: where rejection would take more than 4·N tries, an exponential race
    over all ids (Efraimidis & Spirakis 2006) gives the same law, in time and memory of order N, and
    S = N is a random permutation. `num_tries` is then the race's clock, which has the same mean,
    and at least S. A steep law over a huge N makes either slow: little of it can be reached.

    The sampler does not avoid the positives: the loss drops accidental hits by their ids.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> sampler = PopularitySampler(LogUniform(1_000_000, first_id=1), 8192)
    >>> draw = sampler.sample(np.array([1, 40_000]), step=3)
    >>> draw.negatives.ids.shape, len(np.unique(draw.negatives.ids))
    ((8192,), 8192)
    >>> draw.positives.log_q.round(2)
    array([ 0.  , -3.57])
    """

    law: Law
    num_sampled: int
    unique: bool = field(default=True, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            raise TypeError(f"law: expected a popularity law, got {self.law!r}")
        size = checks.integer("num_sampled", self.num_sampled, 1, 2**40)
        object.__setattr__(self, "num_sampled", size)
        checks.integer("seed", self.seed, 0, 2**64 - 1)
        if self.unique:
            prob, weights = self.law.spectrum()
            available = round(float(weights[prob > 0].sum()))
            if size > available:
                raise ValueError(
                    f"num_sampled: expected at most {available}, the ids that the law can draw, "
                    f"for unique=True, got {size}"
                )

    @cached_property
    def _time(self) -> float:
        return logq.sampling_time(*self.law.spectrum(), self.num_sampled)

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """Draw the negatives of one step: a pure function of (seed, step, stream).

        Parameters
        ----------
        positives : ids (B,) or `Candidates` with ids, to receive their log q: −inf for ids that
            the law cannot draw, which the loss refuses. Their framework is that of the result;
            NumPy if None.
        step : training step, 0 to 2**32 − 1.
        device : None (where the positives are) or "cpu".
        stream : for instance the worker's rank, 0 to 2**32 − 1.
        """
        place, positives, positive_ids = _given(positives, device)
        words = stream_words(self.seed, step, stream)
        if self.unique:
            ids, num_tries = self._unique(words)
        else:
            ids, num_tries = np.empty(self.num_sampled, np.int64), self.num_sampled
            self.law._fill(ids, words)
        negatives = Candidates(ids=place.give(ids), log_q=place.give(self.log_q(ids)))
        if positives is not None and positive_ids is not None:
            positives = positives._replace(log_q=place.give(self.log_q(positive_ids)))
        return Draw(positives, negatives, num_tries)

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log of the expected number of times each id is among the negatives, in float64.

        For unique sampling the log inclusion probability, else log(S·p); −inf for ids outside
        the law. `batch_size` is taken for the samplers' common signature, and not used.
        """
        if self.unique:
            return self.law.log_inclusion(ids, self._time)
        place, view = view_of("ids", ids)
        return place.give(logq.log_count(self.law.log_prob(view), self.num_sampled))

    def _unique(self, words: tuple[Any, ...]) -> tuple[NDArray, int]:
        if self._time > 4 * self.law.num_items + 64:
            return self._race(words)
        ids, law, kernel = np.empty(self.num_sampled, np.int64), self.law, self.law._kernel
        slots = max(16, 1 << (2 * ids.size).bit_length())
        marks = law.num_items // 64 + 1
        if 8 * marks <= 4 * slots:  # the smaller of the two sets, which is the faster
            draw, seen = kernel.draw_unique_marked, np.zeros(marks, np.uint64)
        else:
            draw = kernel.draw_unique_hashed
            seen = np.full(slots, -1, np.int32 if law.num_items < 2**31 else np.int64)
        return ids, draw(ids, seen, *words, law.first_id, *law._rank_parameters())

    def _race(self, words: tuple[Any, ...]) -> tuple[NDArray, int]:
        """Each id arrives after an exponential time of rate p; the first S are the sample."""
        ids = np.arange(self.law.first_id, self.law.first_id + self.law.num_items)
        with np.errstate(divide="ignore"):
            arrival = np.log(-np.log(uniforms(ids.size, words))) - self.law.log_prob(ids)
        first = np.argpartition(arrival, self.num_sampled - 1)[: self.num_sampled]
        first = first[np.argsort(arrival[first], kind="stable")]
        clock = float(np.exp(min(arrival[first[-1]], 43.0)))  # 43: within an int64
        return ids[first], max(self.num_sampled, round(clock))


def merge_repeats(negatives: Candidates) -> Candidates:
    """The distinct negatives of a sample with repeats, each with log q less log of its copies.

    A candidate that stands m times adds m·e^(a − log q) to the sum of the softmax; once, with
    log q − log m, it adds the same: same loss and gradients, for as many columns as there are
    distinct ids. 8,192 draws from the log-uniform law over a million ids hold about 4,650.

    Parameters
    ----------
    negatives : ids (S,) and log_q (S,), as from `PopularitySampler(unique=False)`. log_q, and
        embeddings and bias where given, must be equal for equal ids: those of one copy stay.

    Returns
    -------
    `Candidates` of the distinct ids, ascending.

    Examples
    --------
    >>> import numpy as np
    >>> merged = merge_repeats(Candidates(np.array([7, 2, 7]), log_q=np.zeros(3)))
    >>> merged.ids, np.exp(-merged.log_q).round(6)
    (array([2, 7]), array([1., 2.]))
    """
    place, given = borrow({f"negatives.{k}": x for k, x in negatives._asdict().items()})
    ids, log_q = given["negatives.ids"], given["negatives.log_q"]
    if ids is None or log_q is None or ids.ndim != 1:
        raise ValueError(
            f"negatives: expected ids and log_q of shape (S,), got "
            f"{None if ids is None else ids.shape} and {None if log_q is None else log_q.shape}"
        )
    checks.integral("negatives.ids", ids)
    checks.floating("negatives.log_q", log_q)
    for name, x in given.items():
        if x is not None:
            checks.shape(name, x[..., 0] if x.ndim > 1 else x, ids.shape, "(S,) as negatives.ids")
    distinct, first, copies = np.unique(ids, return_index=True, return_counts=True)

    def kept(name: str) -> Array:
        x = given[f"negatives.{name}"]
        return None if x is None else place.give(x[first])

    return Candidates(
        ids=place.give(distinct),
        embeddings=kept("embeddings"),
        log_q=place.give((log_q[first] - np.log(copies)).astype(log_q.dtype)),
        bias=kept("bias"),
    )


@dataclass(frozen=True)
class InBatchSampler:
    """The batch's positives as negatives for one another.

    Parameters
    ----------
    popularity : how often each item is a positive: a law or counts indexed by id, which give
        log q = log(B·f), repeats in the batch being slots of their own; or a
        `FrequencyEstimator`, which estimates that count itself. None leaves log q unknown:
        nothing is then subtracted, and popular items are pushed down for being popular.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import Candidates, InBatchSampler
    >>> positives = Candidates(ids=np.array([0, 2, 0]), embeddings=np.ones((3, 8)))
    >>> draw = InBatchSampler(np.array([6, 3, 1])).sample(positives)
    >>> np.exp(draw.negatives.log_q).round(3)
    array([1.8, 0.3, 1.8])
    """

    popularity: Any = None

    def __post_init__(self) -> None:
        if self.popularity is not None and not (
            hasattr(self.popularity, "log_prob") or hasattr(self.popularity, "log_q")
        ):
            object.__setattr__(self, "popularity", Empirical(self.popularity))

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """The positives, with their log q, on both sides. `step` and `stream` change nothing."""
        place, positives, ids = _given(positives, device)
        if positives is None or ids is None:
            raise ValueError("positives: expected the batch's items, got None")
        if self.popularity is not None:
            log_q = self.log_q(ids, batch_size=len(ids))
            positives = positives._replace(log_q=place.give(log_q))
        return Draw(positives, positives, len(ids))

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log(B·f) of each id, in float64; `batch_size` is B."""
        if self.popularity is None:
            raise ValueError("InBatchSampler has no popularity, hence no log q: pass popularity=")
        if hasattr(self.popularity, "log_q"):
            return self.popularity.log_q(ids)
        if batch_size is None:
            raise ValueError("batch_size: expected the number of items in a batch, got None")
        place, view = view_of("ids", ids)
        return place.give(logq.log_count(self.popularity.log_prob(view), batch_size))


@dataclass(frozen=True)
class MixtureSampler:
    """Negatives from several sources at once, with the log q of the whole.

    Every candidate's log q is the log of the sum of all sources' expected counts of its id,
    whichever source it came from (Yang et al. 2020, Mixed negative sampling, for in-batch and
    uniform negatives).

    Parameters
    ----------
    samplers : the sources, in the order in which their negatives stand. Source k of M draws from
        stream M·stream + k, so equal seeds do not make equal draws.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import InBatchSampler, LogUniform, MixtureSampler, PopularitySampler
    >>> law = LogUniform(1000)
    >>> sampler = MixtureSampler([InBatchSampler(law), PopularitySampler(law, 64)])
    >>> sampler.sample(np.array([3, 14, 15])).negatives.ids.shape
    (67,)
    """

    samplers: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.samplers, Sequence):
            raise TypeError(f"samplers: expected a sequence of samplers, got {self.samplers!r}")
        # Mixtures within are taken apart: every source then has a stream of its own.
        members: list[Any] = []
        for sampler in self.samplers:
            inner = sampler.samplers if isinstance(sampler, MixtureSampler) else (sampler,)
            members.extend(inner)
        object.__setattr__(self, "samplers", tuple(members))
        if not self.samplers:
            raise ValueError("samplers: expected at least one, got none")

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """All sources' negatives, one after the other; arguments as for `PopularitySampler`."""
        place, positives, positive_ids = _given(positives, device)
        members = len(self.samplers)
        stream = checks.integer("stream", stream, 0, 2**32 // members - 1)
        draws = [
            sampler.sample(positives, step=step, device=device, stream=members * stream + k)
            for k, sampler in enumerate(self.samplers)
        ]
        ids = np.concatenate([as_array(d.negatives.ids) for d in draws])
        batch_size = None if positive_ids is None else len(positive_ids)
        negatives = Candidates(
            ids=place.give(ids), log_q=place.give(self.log_q(ids, batch_size=batch_size))
        )
        if positives is not None and positive_ids is not None:
            log_q = self.log_q(positive_ids, batch_size=batch_size)
            positives = positives._replace(log_q=place.give(log_q))
        return Draw(positives, negatives, sum(d.num_tries for d in draws))

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log Σ_sources (expected count of each id), in float64."""
        place, view = view_of("ids", ids)
        parts = [np.asarray(s.log_q(view, batch_size=batch_size)) for s in self.samplers]
        return place.give(np.logaddexp.reduce(parts))
