"""Draws from the popularity laws, on CUDA: the ids of `zipfneg.cpu.sampling`.

The arguments of the draws are those of the CPU's kernels, and one more: where `step_at` holds a
number, it is the step, read when the kernel runs, so that a captured graph can be replayed.
"""

from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from ..checks import NDArray
from ..scalar import (
    LANES,
    LOW,
    alias_rank,
    f64,
    i32,
    i64,
    jitable,
    log_uniform_log_prob,
    log_uniform_rank,
    philox,
    table_log_prob,
    u64,
    uniform_53,
    uniform_log_prob,
    uniform_rank,
    zipf_mandelbrot_log_prob,
    zipf_mandelbrot_rank,
)
from ..scalar import log_inclusion as log_inclusion_of
from . import launch
from .launch import BLOCK, Kernel, arrays, beside

# A free slot of a hash table: later than every try.
FREE = i32(2**31 - 1)


@jitable
def _counters(size):
    """How many Philox counters `size` draws take, two a counter in whole groups of LANES."""
    return (size + 2 * LANES - 1) // (2 * LANES) * LANES


@jitable
def _first_draw(counter):
    """The index of a counter's first draw; that of its second is LANES more.

    Unsigned, as an index that may be negative costs a comparison.
    """
    return u64(2) * u64(counter) - (u64(counter) & u64(LANES - 1))


@jitable
def _uniforms(counter, k0, k1, step, stream):
    """A counter's two uniforms."""
    counter = u64(counter)
    w0, w1, w2, w3 = philox(counter & LOW, counter >> u64(32), step, stream, k0, k1)
    return uniform_53(w0, w1), uniform_53(w2, w3)


@jitable
def _uniform(index, k0, k1, step, stream):
    """The uniform of one draw."""
    group, within = index // (2 * LANES), index % (2 * LANES)
    u, v = _uniforms(group * LANES + within % LANES, k0, k1, step, stream)
    return u if within < LANES else v


@jitable
def _step(step, step_at):
    return u64(step_at[0]) if step_at.size > 0 else step


def _draw_uniforms(out, k0, k1, step, stream, step_at):
    step = _step(step, step_at)
    for counter in range(cuda.grid(1), _counters(out.size), cuda.gridsize(1)):
        u, v = _uniforms(counter, k0, k1, step, stream)
        i = _first_draw(counter)
        if i < u64(out.size):
            out[i] = u
        if i + u64(LANES) < u64(out.size):
            out[i + u64(LANES)] = v


draw_uniforms = Kernel(_draw_uniforms)


# Unique draws. Many tries are drawn at once; a hash table keeps, for each id, the first try that
# gave it; these are numbered by a prefix sum, and the first S are the sample. An id's slot depends
# on which thread came first, but nothing that is read from the table does.


@jitable
def _home(x, size):
    """Where the search for an id begins, by Fibonacci hashing: it spreads neighbours."""
    mixed = (((u64(x) ^ (u64(x) >> u64(32))) & LOW) * u64(0x9E3779B1)) & LOW
    return i64((mixed * u64(size)) >> u64(32))


@jitable
def _slot(x, ids, table):
    """The slot of an id, or the free one where it is missing."""
    slot = _home(x, table.size)
    while table[slot] != FREE and ids[table[slot]] != x:
        slot = slot + 1 if slot + 1 < table.size else 0
    return slot


def _find_first(ids, num_tries, table, slots):
    """table: the first try of each of the ids[:num_tries]; slots: where each try's id stands."""
    for i in range(cuda.grid(1), num_tries, cuda.gridsize(1)):
        x = ids[i]
        slot = _home(x, table.size)
        while True:
            # What a plain read sees may be old: free, or a later try of the same id. Both are
            # settled by the atomics, and frequent ids seldom come to them.
            first = table[slot]
            if first == FREE:
                first = cuda.atomic.cas(table, slot, FREE, i32(i))
            if first == FREE or ids[first] == x:
                break
            slot = slot + 1 if slot + 1 < table.size else 0
        if i < first and first != FREE:
            cuda.atomic.min(table, slot, i32(i))
        slots[i] = slot


@jitable
def _span(num_tries):
    """The tries of this block: whole rounds of its threads."""
    rounds = (num_tries + cuda.gridDim.x * BLOCK - 1) // (cuda.gridDim.x * BLOCK)
    start = cuda.blockIdx.x * rounds * BLOCK
    return start, start + rounds * BLOCK


@jitable
def _is_first(i, num_tries, table, slots):
    return i < num_tries and table[slots[i]] == i


def _count_first(num_tries, table, slots, counts):
    """counts: how many of each block's tries gave an id for the first time."""
    start, stop = _span(num_tries)
    count = 0
    for round_start in range(start, stop, BLOCK):
        i = round_start + cuda.threadIdx.x
        count += cuda.syncthreads_count(i32(1 if _is_first(i, num_tries, table, slots) else 0))
    if cuda.threadIdx.x == 0:
        counts[cuda.blockIdx.x] = count


@jitable
def _scan(value, shared):
    """The sum of the values of the block's earlier threads, and that of all."""
    t = cuda.threadIdx.x
    shared[t] = value
    reach = 1
    while reach < BLOCK:
        cuda.syncthreads()
        before = shared[t - reach] if t >= reach else 0
        cuda.syncthreads()
        shared[t] += before
        reach *= 2
    cuda.syncthreads()
    through, total = shared[t], shared[BLOCK - 1]
    cuda.syncthreads()
    return through - value, total


@jitable
def _keep_first(out, tries, ids, num_tries, table, slots, counts, columns, shared):
    """The distinct ids in the order of their first tries, as far as `out` takes them.

    tries: how many it took to come to each. columns: the place of each first try, beyond `out` too.
    Returns the number of distinct ids.
    """
    earlier = total = 0
    for block in range(cuda.threadIdx.x, cuda.gridDim.x, BLOCK):
        earlier += counts[block] if block < cuda.blockIdx.x else 0
        total += counts[block]
    _, column = _scan(earlier, shared)
    _, total = _scan(total, shared)
    start, stop = _span(num_tries)
    for round_start in range(start, stop, BLOCK):
        i = round_start + cuda.threadIdx.x
        first = _is_first(i, num_tries, table, slots)
        before, found = _scan(1 if first else 0, shared)
        if first:
            columns[i] = column + before
            if column + before < out.size:
                out[column + before] = ids[i]
                tries[column + before] = i + 1
        column += found
    return total


def _keep_distinct(out, tries, num_distinct, ids, num_tries, table, slots, counts, columns):
    """Without a cut: what is left of `out` repeats ids[0], and of `tries` 1."""
    shared = cuda.shared.array(BLOCK, np.int64)
    total = _keep_first(out, tries, ids, num_tries, table, slots, counts, columns, shared)
    for column in range(total + cuda.grid(1), out.size, cuda.gridsize(1)):
        out[column] = ids[0]
        tries[column] = 1
    if cuda.grid(1) == 0:
        num_distinct[0] = total


def _count_copies(copies, num_tries, table, slots, columns):
    """copies: zero at first; how many tries gave the id of each column."""
    for i in range(cuda.grid(1), num_tries, cuda.gridsize(1)):
        cuda.atomic.add(copies, columns[table[slots[i]]], 1)


find_first = Kernel(_find_first)
count_first = Kernel(_count_first)
keep_distinct = Kernel(_keep_distinct)
count_copies = Kernel(_count_copies)


class LawKernels(NamedTuple):
    """What a law's functions compile to: its inverse distribution and its log probability."""

    draw: Kernel
    draw_tries: Kernel
    keep_unique: Kernel
    log_prob: Kernel
    log_inclusion: Kernel
    log_q: Kernel


def _kernels(rank, log_prob_of_rank):
    @jitable
    def fill(out, size, k0, k1, step, stream, first_id, law):
        for counter in range(cuda.grid(1), _counters(size), cuda.gridsize(1)):
            u, v = _uniforms(counter, k0, k1, step, stream)
            i = _first_draw(counter)
            if i < u64(size):
                out[i] = first_id + rank(u, *law)
            if i + u64(LANES) < u64(size):
                out[i + u64(LANES)] = first_id + rank(v, *law)

    def draw(out, k0, k1, step, stream, step_at, first_id, *law):
        fill(out, out.size, k0, k1, _step(step, step_at), stream, first_id, law)

    def draw_tries(ids, num_tries, table, k0, k1, step, stream, step_at, first_id, *law):
        """The tries, and an empty table for them."""
        for slot in range(cuda.grid(1), table.size, cuda.gridsize(1)):
            table[slot] = FREE
        fill(ids, num_tries, k0, k1, _step(step, step_at), stream, first_id, law)

    def keep_unique(
        out, tries, ids, num_tries, table, slots, counts, columns,
        k0, k1, step, stream, step_at, first_id, *law,
    ):  # fmt: skip
        """The first out.size distinct ids; further tries are made where these are not enough.

        ids and columns have room for out.size more than num_tries.
        """
        shared = cuda.shared.array(BLOCK, np.int64)
        column = _keep_first(out, tries, ids, num_tries, table, slots, counts, columns, shared)
        if cuda.grid(1) == 0:
            # One by one: num_tries is chosen such that this is never seen. Other blocks are not
            # disturbed, since only free slots change.
            step, i, last = _step(step, step_at), num_tries, num_tries
            while column < out.size:
                x = first_id + rank(_uniform(i, k0, k1, step, stream), *law)
                i += 1
                slot = _slot(x, ids, table)
                if table[slot] == FREE:
                    ids[last], columns[last] = x, column
                    table[slot] = last
                    out[column], tries[column] = x, i
                    column += 1
                    last += 1

    @jitable
    def log_prob_of(x, first_id, num_items, law):
        inside = x >= first_id and x - first_id < num_items
        log_p = log_prob_of_rank(f64(x - first_id if inside else 0), *law)
        return log_p if inside else f64(-np.inf)

    @jitable
    def log_inclusion_at(x, time, first_id, num_items, law):
        log_p = log_prob_of(x, first_id, num_items, law)
        return log_inclusion_of(log_p, time) if log_p > f64(-np.inf) else log_p

    def log_prob(out, ids, first_id, num_items, *law):
        for i in range(cuda.grid(1), ids.size, cuda.gridsize(1)):
            out[i] = log_prob_of(i64(ids[i]), first_id, num_items, law)

    def log_inclusion(out, ids, time, first_id, num_items, *law):
        for i in range(cuda.grid(1), ids.size, cuda.gridsize(1)):
            out[i] = log_inclusion_at(i64(ids[i]), time, first_id, num_items, law)

    def log_q(
        negative_log_q, positive_log_q, hit_columns, negative_ids, positive_ids,
        ids, table, columns, time, first_id, num_items, *law,
    ):  # fmt: skip
        """Log inclusion of both sides, and the column of the negative that equals each positive.

        hit_columns: −1 where there is none. ids, table and columns: of the unique draw.
        """
        num_sampled = negative_ids.size
        both = num_sampled + positive_ids.size
        for j in range(cuda.grid(1), both, cuda.gridsize(1)):
            if j < num_sampled:
                x = negative_ids[j]
                negative_log_q[j] = log_inclusion_at(x, time, first_id, num_items, law)
            else:
                x = i64(positive_ids[j - num_sampled])
                log_p = log_inclusion_at(x, time, first_id, num_items, law)
                positive_log_q[j - num_sampled] = log_p
                first = table[_slot(x, ids, table)]
                column = columns[first] if first != FREE else i32(-1)
                hit_columns[j - num_sampled] = column if column < num_sampled else -1

    return LawKernels(
        draw=Kernel(draw),
        draw_tries=Kernel(draw_tries),
        keep_unique=Kernel(keep_unique),
        log_prob=Kernel(log_prob),
        log_inclusion=Kernel(log_inclusion),
        log_q=Kernel(log_q),
    )


log_uniform = _kernels(log_uniform_rank, log_uniform_log_prob)
uniform = _kernels(uniform_rank, uniform_log_prob)
zipf_mandelbrot = _kernels(zipf_mandelbrot_rank, zipf_mandelbrot_log_prob)
alias = _kernels(alias_rank, table_log_prob)


# What follows launches kernels for a law of `zipfneg.popularity`.


def _kernels_of(law: Any) -> LawKernels:
    return globals()[law._kernels]


def _on_device(parameters: tuple[Any, ...]) -> tuple[Any, ...]:
    moved = tuple(arrays().asarray(x) if isinstance(x, np.ndarray) else x for x in parameters)
    if not launch.SIMULATED:  # other streams, too, will read it
        arrays().cuda.get_current_stream().synchronize()
    return moved


def _rank_law(law: Any) -> tuple[Any, ...]:
    """What the kernels take after `first_id`."""
    return law.first_id, *beside(law, "rank", lambda: _on_device(law._rank_parameters()))


def _prob_law(law: Any) -> tuple[Any, ...]:
    parameters = beside(law, "log_prob", lambda: _on_device(law._log_prob_parameters()))
    return law.first_id, law.num_items, *parameters


@cache
def _no_step() -> NDArray:
    return arrays().empty(0, np.int64)


def device_words(words: tuple[Any, ...], step_at: NDArray | None = None) -> tuple[Any, ...]:
    """`zipfneg.popularity.stream_words`, and where the step stands if it is device data."""
    return *words, _no_step() if step_at is None else step_at.reshape(-1)


def _flat(x: NDArray) -> NDArray:
    return arrays().ascontiguousarray(x).reshape(-1)


def fill(law: Any, out: NDArray, words: tuple[Any, ...]) -> None:
    """Draws 0 to out.size − 1 into the flat `out`."""
    _kernels_of(law).draw(out.size // 2, out, *words, *_rank_law(law))


def for_ids(law: Any, name: str, ids: NDArray, *arguments: float) -> NDArray:
    """What one of the law's kernels gives for each id, in float64."""
    out = arrays().empty(ids.shape)
    kernel = getattr(_kernels_of(law), name)
    kernel(ids.size, out.reshape(-1), _flat(ids), *arguments, *_prob_law(law))
    return out


def enough_tries(
    prob: NDArray, weights: NDArray, num_sampled: int, time: float, miss: float = 1e-12
) -> int:
    """Tries that hold `num_sampled` distinct ids, but for a probability of at most `miss`.

    With q = 1 − (1 − p)^M an id is among M tries. Whether one is tells against the others (the
    indicators are negatively associated: Dubhashi & Ranjan 1998), so Chernoff's bound holds as if
    they were independent: for every λ ≥ 0,

        log P(fewer than S distinct) ≤ λ·(S − 1) + Σ_ids log(1 − q·(1 − e^−λ)).

    `prob` and `weights` are the law's spectrum, `time` its `zipfneg.logq.sampling_time`.
    """
    prob, weights = prob[prob > 0], weights[prob > 0]
    slack = time**0.5
    while True:
        tries = int(np.ceil(time + slack))
        with np.errstate(divide="ignore"):
            q = -np.expm1(tries * np.log1p(-prob))
        excess = weights @ q - (num_sampled - 1)
        # The best λ, were the number of distinct ids Poisson's on either side of its mean.
        spread = max(weights @ (q * (1 - q)), 1e-300)
        rate = min(np.log1p(max(excess, 0.0) / spread), 30.0)
        if rate * (num_sampled - 1) + weights @ np.log1p(q * np.expm1(-rate)) <= np.log(miss):
            return tries
        slack *= 1.25


class Workspace(NamedTuple):
    """The memory of a draw whose ids are told apart."""

    ids: NDArray  # (M + S,) the tries, and room for those that M did not hold
    table: NDArray
    slots: NDArray
    columns: NDArray
    counts: NDArray  # of the blocks
    num_tries: int  # M

    @classmethod
    def of(cls, num_tries: int, num_items: int, num_sampled: int = 0) -> "Workspace":
        if num_tries + num_sampled >= FREE:
            raise ValueError(
                f"num_sampled: on CUDA distinct ids take fewer than 2**31 tries, got a draw of "
                f"{num_tries + num_sampled}"
            )
        empty = arrays().empty
        return cls(
            ids=empty(num_tries + num_sampled, np.int64),
            # At most half full.
            table=empty(2 * min(max(num_tries, num_sampled), num_items) + 1, i32),
            slots=empty(num_tries, i32),
            columns=empty(num_tries + num_sampled, i32),
            counts=empty(launch.MAX_BLOCKS, np.int64),
            num_tries=num_tries,
        )

    @property
    def found(self) -> tuple[Any, ...]:
        """What the kernels after `find_first` take."""
        return self.num_tries, self.table, self.slots, self.counts

    def find(self) -> None:
        """Number the distinct among the ids, which are there, in a table that is empty."""
        find_first(self.num_tries, self.ids, self.num_tries, self.table, self.slots)
        count_first(self.num_tries, *self.found)


class Sample(NamedTuple):
    """S negatives, and for positives their log q and, of unique ones, the column that equals each.

    `positive_log_q` and `hit_columns` are empty where no positives are given.
    """

    ids: NDArray  # (S,) int64
    log_q: NDArray  # (S,) float64
    num_tries: Any  # () int64; S with repeats
    positive_log_q: NDArray  # (B,) float64
    hit_columns: NDArray | None  # (B,) int64, −1 where no negative equals the positive


class UniqueSampler:
    """Draws of `num_sampled` distinct ids of a law, in memory that it keeps.

    What it keeps is used by one draw after the other: take one sampler for each stream. Nothing
    waits for the device but the first use of a law, whose tables are copied there, and the race.
    """

    def __init__(self, law: Any, num_sampled: int, time: float, num_tries: int | None = None):
        self.law, self.num_sampled, self.time = law, num_sampled, time
        self.race = time > 4 * law.num_items + 64
        if self.race:
            num_tries = num_sampled
        elif num_tries is None:
            prob, weights = law.spectrum()
            num_tries = enough_tries(prob, weights, num_sampled, time)
        self.workspace = Workspace.of(
            num_tries, max(law.num_items, num_sampled), 0 if self.race else num_sampled
        )

    def sample(self, words: tuple[Any, ...], positive_ids: NDArray | None = None) -> Sample:
        ids, num_tries = self._raced(words) if self.race else self._drawn(words)
        positive_ids = ids[:0] if positive_ids is None else _flat(positive_ids)
        draw = Sample(
            ids,
            arrays().empty(ids.size),
            num_tries,
            arrays().empty(positive_ids.size),
            arrays().empty(positive_ids.size, np.int64),
        )
        space = self.workspace
        _kernels_of(self.law).log_q(
            ids.size + positive_ids.size,
            draw.log_q, draw.positive_log_q, draw.hit_columns, ids, positive_ids,
            space.ids, space.table, space.columns, min(self.time, 1e300), *_prob_law(self.law),
        )  # fmt: skip
        return draw

    def _drawn(self, words: tuple[Any, ...]) -> tuple[NDArray, NDArray]:
        kernels, space = _kernels_of(self.law), self.workspace
        draw = (*words, *_rank_law(self.law))
        ids = arrays().empty(self.num_sampled, np.int64)
        tries = arrays().empty(self.num_sampled, np.int64)
        kernels.draw_tries(space.num_tries, space.ids, space.num_tries, space.table, *draw)
        space.find()
        kernels.keep_unique(
            space.num_tries, ids, tries, space.ids, *space.found, space.columns, *draw
        )
        return ids, tries[-1:].reshape(())

    def _raced(self, words: tuple[Any, ...]) -> tuple[NDArray, NDArray]:
        """Each id arrives after an exponential time of rate p; the first S are the sample."""
        xp, law, space = arrays(), self.law, self.workspace
        uniforms = xp.empty(law.num_items)
        draw_uniforms(uniforms.size // 2, uniforms, *words)
        ids = law.first_id + xp.arange(law.num_items)
        arrival = xp.log(-xp.log(uniforms)) - for_ids(law, "log_prob", ids)
        first = xp.argsort(arrival, kind="stable")[: self.num_sampled]
        clock = xp.rint(xp.exp(xp.minimum(arrival[first[-1:]], 43.0)))  # 43: within an int64
        space.ids[:] = ids[first]
        space.table.fill(FREE)
        space.columns[:] = xp.arange(self.num_sampled)
        find_first(space.num_tries, space.ids, space.num_tries, space.table, space.slots)
        num_tries = xp.maximum(clock, self.num_sampled).astype(np.int64).reshape(())
        return space.ids.copy(), num_tries


def sample_unique(
    sampler: Any,
    law: Any,
    num_sampled: int,
    time: float,
    words: tuple[Any, ...],
    positive_ids: NDArray | None,
) -> Sample:
    """By a `UniqueSampler` that is kept for as long as `sampler` lives.

    One for each stream, and for each thread, whose launches on one stream could mingle.
    """
    stream = None if launch.SIMULATED else arrays().cuda.get_current_stream().ptr
    kept = beside(sampler, (stream, get_ident()), lambda: UniqueSampler(law, num_sampled, time))
    return kept.sample(words, positive_ids)


def sample_repeated(
    sampler: Any,
    law: Any,
    num_sampled: int,
    time: float,
    words: tuple[Any, ...],
    positive_ids: NDArray | None,
) -> Sample:
    """`num_sampled` draws with repeats; log q is log(S·p)."""
    ids = arrays().empty(num_sampled, np.int64)
    fill(law, ids, words)
    log_size = float(np.log(num_sampled))
    both = (ids, ids[:0] if positive_ids is None else positive_ids)
    log_q, positive_log_q = (for_ids(law, "log_prob", x) for x in both)
    log_q += log_size
    positive_log_q += log_size
    return Sample(ids, log_q, num_sampled, positive_log_q, None)


class Merged(NamedTuple):
    """The distinct among S ids, in the order of their first copies, padded to S."""

    ids: NDArray  # (S,) int64; what is left repeats ids[0]
    first: NDArray  # (S,) where the first copy stood; what is left repeats the first
    copies: NDArray  # (S,) int64; 0 where the ids have come to an end
    num_distinct: NDArray  # () int64


def merge_repeats(ids: NDArray) -> Merged:
    """The distinct among the flat ids, with their copies, in arrays whose shape does not tell."""
    xp, size = arrays(), ids.size
    space = Workspace.of(size, size)
    space.ids[:] = ids
    space.table.fill(FREE)
    space.find()
    distinct, tries = xp.empty(size, np.int64), xp.empty(size, np.int64)
    num_distinct, copies = xp.zeros(1, np.int64), xp.zeros(size, np.int64)
    keep_distinct(size, distinct, tries, num_distinct, space.ids, *space.found, space.columns)
    count_copies(size, copies, size, space.table, space.slots, space.columns)
    return Merged(distinct, tries - 1, copies, num_distinct.reshape(()))
