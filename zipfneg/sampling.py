"""Samplers: which negatives, with which log q."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import checks, logq
from .candidates import Candidates
from .checks import NDArray
from .cpu import sampling as kernels
from .cpu.threads import for_spans
from .interop import NUMPY, Array, Home, as_array, borrow, on_device, view_of
from .popularity import Empirical, Law, Words, poisson, stream_words, uniforms, words_on_cuda

# Unique draws that take more, or a race over more than a sixteenth of that, take minutes.
MAX_TRIES = 2**31


class Draw(NamedTuple):
    """A sample of negatives, with log q for both sides.

    `positives` are the given ones with their log q (None if none were given), `negatives` hold
    ids and log q, and embeddings where the source has them. `num_tries` counts the draws made.
    """

    positives: Candidates | None
    negatives: Candidates
    num_tries: Any  # an int; of unique draws on CUDA an array () there


def given_positives(
    positives: Candidates | Array | None, device: str | None, *, cuda: bool = False
) -> tuple[Home, Candidates | None, NDArray | None]:
    """The positives as Candidates, a view of their ids, and where results go.

    `cuda`: the caller draws there, too.
    """
    if not cuda:
        checks.one_of("device", device, (None, "cpu"))  # type: ignore[arg-type]
    asked = NUMPY if device is None else on_device(device)
    if positives is None:
        return asked, None, None
    if not isinstance(positives, Candidates):
        positives = Candidates(ids=positives)
    if positives.ids is None:
        raise ValueError("positives.ids: expected an array (B,), got None")
    place, views = borrow({"positives.ids": positives.ids}, cuda=cuda and device != "cpu")
    if asked.on_cuda:
        place = asked.that_of("positives.ids", positives.ids)
    ids = views["positives.ids"]
    checks.integral("positives.ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"positives.ids: expected shape (B,), got {ids.shape}")
    return place, positives, ids


@dataclass(frozen=True)
class PopularitySampler:
    """Negatives from a popularity law, shared by the batch or for each query its own.

    Parameters
    ----------
    law : `LogUniform`, `ZipfMandelbrot`, `Uniform` or `Empirical`.
    num_sampled : S, the number of negatives.
    unique : True draws S distinct ids (draw with replacement, skip what is already there); their
        log q is the log inclusion probability. False keeps repeats; log q = log(S·p). "poisson"
        includes every id independently of all others: the number of negatives then varies about S,
        with at most √S of standard deviation, and log q is exact for every S.
    seed : of all draws, 0 to 2**64 − 1.
    exclude : ids that are never drawn: padding within the law, items out of stock.
    per_query : True gives every positive S negatives of its own: ids and log q (B, S).
    by_tries : take log q of unique negatives from the draw's own num_tries, by TensorFlow's formula
        (`zipfneg.logq.log_count_by_tries`): for parity, and noisier.

    Raises
    ------
    ValueError
        For unique=True where fewer than S ids can be drawn.

    Notes
    -----
    Unique sampling never hangs: where rejection would take more than 4·N tries, an exponential race
    over all ids (Efraimidis & Spirakis 2006) gives the same law, in time and memory of order N, and
    S = N is a random permutation. `num_tries` is then the race's clock, which has the same mean,
    and at least S. What would take more than 2**31 draws, as a large part of a steep law over a
    huge N does, is an error.

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
    unique: bool | str = field(default=True, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    exclude: Any = field(default=(), kw_only=True)
    per_query: bool = field(default=False, kw_only=True)
    by_tries: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            raise TypeError(f"law: expected a popularity law, got {self.law!r}")
        size = checks.integer("num_sampled", self.num_sampled, 1, 2**40)
        object.__setattr__(self, "num_sampled", size)
        object.__setattr__(self, "seed", checks.integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("unique", "per_query", "by_tries"):
            value = getattr(self, name)
            if isinstance(value, bool | np.bool_):
                object.__setattr__(self, name, bool(value))
            elif name != "unique" or value != "poisson":
                also = ' or "poisson"' if name == "unique" else ""
                raise ValueError(f"{name}: expected True, False{also}, got {value!r}")
        if self.unique == "poisson" and self.per_query:
            raise ValueError('per_query: expected False for unique="poisson", got True: its rows '
                             "would be of different lengths")  # fmt: skip
        if self.by_tries and (self.unique is not True or self.per_query):
            raise ValueError(
                "by_tries: expected False but for unique=True shared by the batch, got True"
            )
        object.__setattr__(self, "exclude", tuple(self._in_law(self.exclude).tolist()))
        self._check_available(self._excluded)

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
        exclude: Array | None = None,
    ) -> Draw:
        """Draw the negatives of one step: a pure function of (seed, step, stream).

        Parameters
        ----------
        positives : ids (B,) or `Candidates` with ids, to receive their log q: −inf for ids that
            the law cannot draw, which the loss refuses. Their framework is that of the result;
            NumPy if None.
        step : training step, 0 to 2**32 − 1; on CUDA also an integer array of one element there,
            which is read when the draw is made.
        device : None (where the positives are), "cpu", "cuda" or, for instance, "cuda:1". Without
            positives, results on CUDA are CuPy's.
        stream : for instance the worker's rank, 0 to 2**32 − 1.
        exclude : ids not to draw in this step, for instance the batch's positives. A positive that
            is excluded has log q 0: it stands among its query's candidates once, for certain.
        """
        place, positives, positive_ids = given_positives(positives, device, cuda=True)
        if place.on_cuda:
            if exclude is not None:
                raise NotImplementedError("exclude: expected None on CUDA in this version")
            return self._sample_on_cuda(place, positives, positive_ids, step, stream)
        words = stream_words(self.seed, step, stream)
        excluded, time = self._conditions(exclude)
        race = self.unique and time > 4 * self.law.num_items + 64
        if self.unique and (16 * self.law.num_items if race else time) > MAX_TRIES:
            raise ValueError(
                f"num_sampled: expected a number of distinct ids that {MAX_TRIES:.0e} draws give, "
                f"got {self.num_sampled}, which take about {time:.0e} from {self.law}; sample "
                f"fewer, or from fewer items or a flatter law"
            )
        if self.per_query:
            if positive_ids is None:
                raise ValueError("positives: expected the batch's items for per_query, got None")
            ids, num_tries = self._rows(len(positive_ids), words, excluded, time)
        elif self.unique == "poisson":
            ids, num_tries = self._poisson(words, excluded, time)
        elif self.unique or excluded.size:
            ids, num_tries = self._unseen(self.num_sampled, words, excluded, time)
        else:
            ids, num_tries = np.empty(self.num_sampled, np.int64), self.num_sampled
            self.law._fill(ids, words)

        def log_q(ids: NDArray) -> NDArray:
            return self._log_q(ids, time, num_tries)

        negatives = Candidates(ids=place.give(ids), log_q=place.give(log_q(ids)))
        if positives is not None and positive_ids is not None:
            of_positives = log_q(positive_ids)
            if excluded.size:
                of_positives = np.where(np.isin(positive_ids, excluded), 0.0, of_positives)
            positives = positives._replace(log_q=place.give(of_positives))
        return Draw(positives, negatives, num_tries)

    def _sample_on_cuda(
        self,
        place: Home,
        positives: Candidates | None,
        positive_ids: NDArray | None,
        step: Any,
        stream: int,
    ) -> Draw:
        from .cuda import sampling as cuda

        if self.exclude or self.per_query or self.by_tries or self.unique == "poisson":
            raise NotImplementedError(
                'exclude, per_query, by_tries and unique="poisson" are for the CPU in this version'
            )
        with place.current():
            words = words_on_cuda(place, self.seed, step, stream)
            sample = cuda.sample_unique if self.unique else cuda.sample_repeated
            draw = sample(self, self.law, self.num_sampled, self._time, words, positive_ids)
            negatives = Candidates(ids=place.give(draw.ids), log_q=place.give(draw.log_q))
            num_tries = place.give(draw.num_tries) if self.unique else self.num_sampled
            if positives is not None:
                positives = positives._replace(log_q=place.give(draw.positive_log_q))
        return Draw(positives, negatives, num_tries)

    def log_q(
        self,
        ids: Array,
        *,
        batch_size: int | None = None,
        exclude: Array | None = None,
        num_tries: int | None = None,
    ) -> Array:
        """log of the expected number of times each id is among the negatives, in float64.

        For unique sampling the log inclusion probability, else log(S·p); −inf for ids outside the
        law and excluded ones. `num_tries`, of a draw, is what `by_tries` needs. `batch_size` is
        taken for the samplers' common signature, and not used.
        """
        place, view = view_of("ids", ids)
        excluded, time = self._conditions(exclude)
        if self.by_tries:
            if num_tries is None:
                raise ValueError("num_tries: expected that of a draw for by_tries, got None")
            num_tries = checks.integer("num_tries", num_tries, self.num_sampled, 2**62)
        log_q = self._log_q(view, time, num_tries)
        if excluded.size:
            log_q = np.where(np.isin(view, excluded), -np.inf, log_q)
        return place.give(log_q)

    def _log_q(self, ids: NDArray, time: float, num_tries: int | None) -> NDArray:
        if self.by_tries and num_tries is not None:
            return logq.log_count_by_tries(self.law.log_prob(ids), self.num_sampled, num_tries)
        if self.unique:
            return logq.log_inclusion(self.law, ids, time)
        return logq.log_count(self.law.log_prob(ids), time)

    # The ids left out, and the time: the number of draws that keeping S of the others takes.

    @cached_property
    def _excluded(self) -> NDArray:
        return np.array(self.exclude, np.int64)

    @cached_property
    def _time(self) -> float:
        return self._time_without(self._excluded)

    def _conditions(self, exclude: Array | None) -> tuple[NDArray, float]:
        if exclude is None:
            return self._excluded, self._time
        excluded = np.union1d(self._excluded, self._in_law(exclude))
        self._check_available(excluded)
        return excluded, self._time_without(excluded)

    def _in_law(self, ids: Array) -> NDArray:
        """Those that the law can draw, ascending, each once."""
        ids = () if ids is None else list(ids) if isinstance(ids, set | frozenset) else ids
        view = view_of("exclude", ids)[1]
        view = np.unique(view.astype(np.int64) if not view.size else view)
        checks.integral("exclude", view)
        return view[self.law.log_prob(view) > -np.inf].astype(np.int64)

    def _check_available(self, excluded: NDArray) -> None:
        prob, weights = self.law.spectrum()
        available = round(float(weights[prob > 0].sum())) - len(excluded)
        if self.num_sampled > available and self.unique is not False:
            raise ValueError(
                f"num_sampled: expected at most {available}, the ids that the law can draw, "
                f"for unique={self.unique!r}, got {self.num_sampled}"
            )

    def _time_without(self, excluded: NDArray) -> float:
        left_out = np.exp(self.law.log_prob(excluded))
        if self.unique:
            prob, weights = self.law.spectrum()
            prob = np.concatenate([prob, left_out])
            weights = np.concatenate([weights, np.full(len(left_out), -1.0)])
            return logq.sampling_time(prob, weights, self.num_sampled)
        share = 1 - left_out.sum()
        if share < 1e-3:
            raise ValueError(
                f"exclude: expected to leave a thousandth of the law's probability or more, left "
                f"{share:.2g}; draw from Empirical(counts) of what is left instead"
            )
        return self.num_sampled / share

    # Draws that skip what was seen.

    def _seen(self, size: int, excluded: NDArray) -> tuple[int, NDArray]:
        """A set that holds the excluded ranks and has room for `size` more, and of which kind."""
        law, ranks = self.law, excluded - self.law.first_id
        slots = max(16, 1 << (2 * (size + len(excluded))).bit_length())
        marks = law.num_items // 64 + 1
        if 8 * marks <= 4 * slots:  # the smaller of the two, which is the faster
            seen = np.zeros(marks, np.uint64)
            kernels.see_in_bits(seen, ranks)
            return 0, seen
        seen = np.full(slots, -1, np.int32 if law.num_items < 2**31 else np.int64)
        kernels.see_in_table(seen, ranks)
        return 1, seen

    def _unseen(
        self, size: int, words: Words, excluded: NDArray, time: float, max_tries: int = 2**62
    ) -> tuple[NDArray, int]:
        """The first `size` ids, of at most `max_tries` draws, that are not excluded or repeated."""
        if self.unique and time > 4 * self.law.num_items + 64:
            return self._race(words, excluded)
        law, ids = self.law, np.empty(size, np.int64)
        kind, seen = self._seen(size, excluded)
        kept, num_tries = law._kernel.draw_unseen[kind](
            ids, seen, bool(self.unique), max_tries, 0, *words, law.first_id,
            *law._rank_parameters()
        )  # fmt: skip
        return ids[:kept], num_tries

    def _rows(
        self, num_rows: int, words: Words, excluded: NDArray, time: float
    ) -> tuple[NDArray, int]:
        """(B, S), each row on counters of its own, and all rows' draws."""
        law, ids = self.law, np.empty((num_rows, self.num_sampled), np.int64)
        tries = np.zeros(num_rows, np.int64)
        if self.unique and time > 4 * law.num_items + 64:
            for row in range(num_rows):
                ids[row], tries[row] = self._race(words, excluded, row)
        else:
            kind, seen = self._seen(self.num_sampled, excluded)
            kernel, parameters = law._kernel.draw_unseen_rows[kind], law._rank_parameters()
            for_spans(
                lambda start, stop: kernel(
                    ids, start, stop, tries, seen, bool(self.unique), *words, law.first_id,
                    *parameters
                ),
                num_rows,
                16,
            )  # fmt: skip
        return ids, int(tries.sum())

    def _poisson(self, words: Words, excluded: NDArray, time: float) -> tuple[NDArray, int]:
        """The distinct ids of a Poisson number of draws: each arrives at its own rate."""
        if time > 4 * self.law.num_items + 64:
            ids, arrival = self._arrivals(words, excluded)
            by_then = arrival < np.log(time)
            ids = ids[by_then][np.argsort(arrival[by_then], kind="stable")]
            return ids, max(len(ids), round(min(time, 2.0**62)))
        num_tries = poisson(time, words)
        size = self.num_sampled + 8 * int(self.num_sampled**0.5) + 16
        while True:
            ids, _ = self._unseen(size, words, excluded, time, num_tries)
            if len(ids) < size:  # else the draws may have ended before their number
                return ids, num_tries
            size *= 2

    def _arrivals(self, words: Words, excluded: NDArray, row: int = 0) -> tuple[NDArray, NDArray]:
        """All ids, and log of the exponential time at which each arrives, at the rate P(id)."""
        ids = np.arange(self.law.first_id, self.law.first_id + self.law.num_items)
        arrival = np.log(-np.log(uniforms(ids.size, words, row=row))) - self.law.log_prob(ids)
        arrival[excluded - self.law.first_id] = np.inf
        return ids, arrival

    def _race(self, words: Words, excluded: NDArray, row: int = 0) -> tuple[NDArray, int]:
        """The first S to arrive."""
        ids, arrival = self._arrivals(words, excluded, row)
        first = np.argpartition(arrival, self.num_sampled - 1)[: self.num_sampled]
        first = first[np.argsort(arrival[first], kind="stable")]
        clock = float(np.exp(min(arrival[first[-1]], 43.0)))  # 43: within an int64
        return ids[first], max(self.num_sampled, round(clock))


def merge_repeats(negatives: Candidates) -> Candidates:
    """The distinct negatives of a sample with repeats, each with log q less log of its copies.

    A candidate that stands m times adds m·e^(a − log q) to the sum of the softmax; once, with
    log q − log m, it adds the same: same loss and gradients, for as many columns as there are
    distinct ids. 8,192 draws from the log-uniform law over a million ids hold about 4,650. Copies
    whose log q differ are taken together just so: log q = −log Σ_copies 1/q.

    Parameters
    ----------
    negatives : ids (S,) and log_q (S,), as from `PopularitySampler(unique=False)`. Embeddings and
        bias, where given, must be equal for equal ids: those of one copy stay. So must log_q be on
        CUDA.

    Returns
    -------
    `Candidates` of the distinct ids, ascending. On CUDA, where nothing waits to know their number,
    in the order of their first copies and padded to (S,): what is left repeats the first column
    with log q +inf, so its logit is −inf, and it adds nothing to a softmax or to a gradient.

    Examples
    --------
    >>> import numpy as np
    >>> merged = merge_repeats(Candidates(np.array([7, 2, 7]), log_q=np.zeros(3)))
    >>> merged.ids, np.exp(-merged.log_q).round(6)
    (array([2, 7]), array([1., 2.]))
    """
    place, given = borrow({f"negatives.{k}": x for k, x in negatives._asdict().items()}, cuda=True)
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
    with place.current(), np.errstate(divide="ignore", invalid="ignore"):
        if place.on_cuda:
            from .cuda import sampling as cuda

            distinct, first, copies, _ = cuda.merge_repeats(ids)
            distinct, least = distinct.astype(ids.dtype, copy=False), log_q[first]
        else:
            distinct, first, place_of = np.unique(ids, return_index=True, return_inverse=True)
            least = np.full(len(distinct), np.inf)
            np.minimum.at(least, place_of, log_q)
            weight = np.ones(ids.shape)  # of a copy, beside the heaviest
            np.exp(least[place_of] - log_q, out=weight, where=least[place_of] != log_q)
            copies = np.bincount(place_of, weight, len(distinct))

        def kept(name: str) -> Array:
            x = given[f"negatives.{name}"]
            return None if x is None else place.give(x[first])

        return Candidates(
            ids=place.give(distinct),
            embeddings=kept("embeddings"),
            log_q=place.give((least - np.log(copies)).astype(log_q.dtype)),
            bias=kept("bias"),
        )


def as_popularity(x: Any) -> Any:
    """A law, a `FrequencyEstimator` or None as they are; counts as the law of their shares."""
    if isinstance(x, logq.FrequencyEstimator) and x.mode != "count":
        raise ValueError(
            f'popularity: expected a FrequencyEstimator with mode="count", since repeats are kept, '
            f"got mode={x.mode!r}"
        )
    known = x is None or hasattr(x, "log_prob") or hasattr(x, "log_q")
    return x if known else Empirical(x)


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
        object.__setattr__(self, "popularity", as_popularity(self.popularity))

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """The positives, with their log q, on both sides. `step` and `stream` change nothing."""
        place, positives, ids = given_positives(positives, device)
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
        for sampler in self.samplers:
            if not hasattr(sampler, "sample"):
                raise TypeError(f"samplers: expected objects with sample(), got {sampler!r}")
            if getattr(sampler, "by_tries", False) or getattr(sampler, "per_query", False):
                raise ValueError(
                    "samplers: expected sources shared by the batch, whose log q is that of the "
                    f"law: by_tries and per_query cannot be mixed, got {sampler!r}"
                )

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """All sources' negatives, one after the other; arguments as for `PopularitySampler`.

        They have embeddings where all sources give them, biases likewise.
        """
        draws = self.draws(positives, step=step, device=device, stream=stream)
        return self.join(draws, positives)

    def draws(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> list[Draw]:
        """Each source's own draw, with its own log q."""
        members = len(self.samplers)
        stream = checks.integer("stream", stream, 0, 2**32 // members - 1)
        return [
            sampler.sample(positives, step=step, device=device, stream=members * stream + k)
            for k, sampler in enumerate(self.samplers)
        ]

    def join(self, draws: Sequence[Draw], positives: Candidates | Array | None) -> Draw:
        """The one draw that the sources' `draws` for these positives make together."""
        place, positives, positive_ids = given_positives(positives, None)

        def joined(name: str) -> NDArray | None:
            parts = [getattr(d.negatives, name) for d in draws]
            if any(x is None for x in parts):
                return None
            return np.concatenate([as_array(x, f"negatives.{name}") for x in parts])

        ids = joined("ids")
        if ids is None or ids.ndim != 1:
            raise ValueError("samplers: expected each to give ids (S,), shared by the batch")
        batch_size = None if positive_ids is None else len(positive_ids)
        embeddings, bias = joined("embeddings"), joined("bias")
        with_bias = [d.negatives.bias is not None for d in draws]
        if embeddings is not None and any(with_bias) and not all(with_bias):
            raise ValueError(
                f"samplers: expected all sources to give a bias or none, got {with_bias}: the same "
                f"item would be scored in two ways"
            )
        negatives = Candidates(
            ids=place.give(ids),
            embeddings=None if embeddings is None else place.give(embeddings),
            log_q=place.give(self.log_q(ids, batch_size=batch_size)),
            bias=None if bias is None else place.give(bias),
        )
        if positives is not None and positive_ids is not None:
            log_q = np.asarray(self.log_q(positive_ids, batch_size=batch_size))
            # Excluded from all sources that could give it: it stands there once, for certain.
            excluded = [s._excluded for s in self.samplers if isinstance(s, PopularitySampler)]
            certain = np.isin(positive_ids, np.concatenate([*excluded, []])) & (log_q == -np.inf)
            positives = positives._replace(log_q=place.give(np.where(certain, 0.0, log_q)))
        return Draw(positives, negatives, sum(d.num_tries for d in draws))

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log Σ_sources (expected count of each id), in float64."""
        place, view = view_of("ids", ids)
        parts = [np.asarray(s.log_q(view, batch_size=batch_size)) for s in self.samplers]
        return place.give(np.logaddexp.reduce(parts))
