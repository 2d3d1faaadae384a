"""Draws from the popularity laws."""

from typing import Any, NamedTuple

import numpy as np

from ..scalar import (
    LANES,
    alias_rank,
    f64,
    jitable,
    log_uniform_log_prob,
    log_uniform_rank,
    philox_advance_key,
    philox_five_rounds,
    table_log_prob,
    u64,
    uniform_53,
    uniform_log_prob,
    uniform_rank,
    zipf_mandelbrot_head,
    zipf_mandelbrot_log_prob,
    zipf_mandelbrot_tail,
)
from ..scalar import log_inclusion as log_inclusion_of
from . import kernel

# Counters in a tile: its words stay in the first-level cache between the passes below.
COUNTERS = 512
# Draws in a tile.
TILE = 2 * COUNTERS
# Fewer draws than this are not worth a second thread.
THREAD_GRAIN = 16 * TILE


@kernel
def _fill_words(words, first_counter, k0, k1, step, stream):
    """words (4, COUNTERS) uint64: the Philox words of consecutive counters, in the lower halves.

    Ten rounds in one loop are left scalar by the compiler; two passes of five are not.
    """
    for t in range(COUNTERS):
        counter = u64(first_counter) + u64(t)
        words[0, t], words[1, t], words[2, t], words[3, t] = philox_five_rounds(
            counter, counter >> u64(32), step, stream, k0, k1
        )
    k0, k1 = philox_advance_key(k0, k1)
    for t in range(COUNTERS):
        words[0, t], words[1, t], words[2, t], words[3, t] = philox_five_rounds(
            words[0, t], words[1, t], words[2, t], words[3, t], k0, k1
        )


@kernel
def _fill_uniforms(u, words, tile, k0, k1, step, stream):
    """u (TILE,): the uniforms of one tile, in the order of their index.

    Counter c belongs to group c // LANES. A group gives 2·LANES draws: those of the first two
    words of each counter, then those of the last two.
    """
    _fill_words(words, tile * COUNTERS, k0, k1, step, stream)
    for group in range(COUNTERS // LANES):
        first = group * LANES
        for half in range(2):
            for lane in range(LANES):
                u[2 * first + half * LANES + lane] = uniform_53(
                    words[2 * half, first + lane], words[2 * half + 1, first + lane]
                )


@kernel
def draw_uniforms(out, start, stop, first_tile, k0, k1, step, stream):
    """out[start:stop], out[0] being the first of a tile; `start` is a multiple of TILE."""
    u = np.empty(TILE)
    words = np.empty((4, COUNTERS), np.uint64)
    for first in range(start, stop, TILE):
        _fill_uniforms(u, words, first_tile + first // TILE, k0, k1, step, stream)
        tile = out[first : min(first + TILE, stop)]
        for i in range(tile.size):
            tile[i] = u[i]


class Kernel(NamedTuple):
    """What a law's functions compile to: its inverse distribution and its log probability."""

    draw: Any
    draw_unseen: tuple[Any, Any]  # what is seen kept in a bit set, or in a hash set
    draw_unseen_rows: tuple[Any, Any]
    invert: Any
    log_prob: Any
    log_inclusion: Any


@jitable
def _unseen_in_bits(marks, rank, remember):
    """Whether a rank is not in a set of bits, `marks` uint64; it is then, if `remember`."""
    word, bit = u64(rank) >> u64(6), u64(1) << (u64(rank) & u64(63))
    before = marks[word]
    marks[word] = before | (bit if remember else u64(0))
    return (before & bit) == u64(0)


@jitable
def _unseen_in_table(table, rank, remember):
    """The same for a hash set with open addressing, a power of two in size, −1 where free."""
    slots = u64(table.size - 1)
    # Fibonacci hashing spreads neighbouring ranks, which are the likely ones.
    slot = (u64(rank) * u64(0x9E3779B97F4A7C15)) >> u64(20)
    while table[slot & slots] >= 0 and table[slot & slots] != rank:
        slot += u64(1)
    free = table[slot & slots] < 0
    if remember:
        table[slot & slots] = rank
    return free


def _see(is_unseen):
    @kernel
    def see(seen, ranks):
        for i in range(ranks.size):
            is_unseen(seen, ranks[i], True)

    return see


see_in_bits = _see(_unseen_in_bits)
see_in_table = _see(_unseen_in_table)

# Between the rows of a draw for each query: 2**32 counters.
TILES_PER_ROW = 2**32 // COUNTERS


def _draw_unseen(fill_ranks, is_unseen):
    @kernel
    def draw_unseen(out, seen, remember, max_tries, tile, k0, k1, step, stream, first_id, *law):
        """The draws from `tile` on that are not in the set `seen`, until `out` is full.

        With `remember` each is seen once drawn. Returns how many were kept, and how many drawn: at
        most `max_tries`.
        """
        u = np.empty(TILE)
        words = np.empty((4, COUNTERS), np.uint64)
        ranks = np.empty(TILE, np.int64)
        num_kept = num_tries = 0
        while num_kept < out.size and num_tries < max_tries:
            _fill_uniforms(u, words, tile, k0, k1, step, stream)
            fill_ranks(ranks, u, 0, *law)
            for i in range(min(TILE, max_tries - num_tries)):
                num_tries += 1
                # No branch on what is seen for the first time: it could not be predicted.
                out[num_kept] = first_id + ranks[i]
                num_kept += is_unseen(seen, ranks[i], remember)
                if num_kept == out.size:
                    break
            tile += 1
        return num_kept, num_tries

    @kernel
    def draw_unseen_rows(
        out, start, stop, num_tries, seen, remember, k0, k1, step, stream, first_id, *law
    ):
        """The same for each of out[start:stop], on counters of its own; num_tries (B,)."""
        for row in range(start, stop):
            _, num_tries[row] = draw_unseen(
                out[row], seen.copy(), remember, 2**62, row * TILES_PER_ROW,
                k0, k1, step, stream, first_id, *law
            )  # fmt: skip

    return draw_unseen, draw_unseen_rows


def _kernel(rank, log_prob_of_rank):
    @kernel
    def fill_ranks(out, u, first_id, *law):
        for i in range(out.size):
            out[i] = first_id + rank(u[i], *law)

    return _kernels(fill_ranks, log_prob_of_rank)


@kernel
def _fill_zipf_mandelbrot_ranks(out, u, first_id, num_items, head, *law):
    # Two loops: the first becomes vectors, and look-ups in a table would not let it.
    for i in range(out.size):
        out[i] = zipf_mandelbrot_tail(u[i], num_items, head, *law)
    for i in range(out.size):
        out[i] = first_id + zipf_mandelbrot_head(u[i], out[i], head)


def _kernels(fill_ranks, log_prob_of_rank):
    @kernel
    def draw(out, start, stop, k0, k1, step, stream, first_id, *law):
        u = np.empty(TILE)
        words = np.empty((4, COUNTERS), np.uint64)
        for first in range(start, stop, TILE):
            _fill_uniforms(u, words, first // TILE, k0, k1, step, stream)
            fill_ranks(out[first : min(first + TILE, stop)], u, first_id, *law)

    @kernel
    def invert(out, u, *law):
        fill_ranks(out, u, 0, *law)

    @kernel
    def log_prob(out, ids, first_id, num_items, *law):
        for i in range(ids.size):
            inside = (ids[i] >= first_id) & (ids[i] - first_id < num_items)
            log_p = log_prob_of_rank(f64(ids[i] - first_id if inside else 0), *law)
            out[i] = log_p if inside else -np.inf

    @kernel
    def log_inclusion(out, ids, time, first_id, num_items, *law):
        log_prob(out, ids, first_id, num_items, *law)
        for i in range(ids.size):
            out[i] = log_inclusion_of(out[i], time) if out[i] > -np.inf else -np.inf

    in_bits = _draw_unseen(fill_ranks, _unseen_in_bits)
    in_table = _draw_unseen(fill_ranks, _unseen_in_table)
    return Kernel(
        draw=draw,
        draw_unseen=(in_bits[0], in_table[0]),
        draw_unseen_rows=(in_bits[1], in_table[1]),
        invert=invert,
        log_prob=log_prob,
        log_inclusion=log_inclusion,
    )


log_uniform = _kernel(log_uniform_rank, log_uniform_log_prob)
uniform = _kernel(uniform_rank, uniform_log_prob)
zipf_mandelbrot = _kernels(_fill_zipf_mandelbrot_ranks, zipf_mandelbrot_log_prob)
alias = _kernel(alias_rank, table_log_prob)


@kernel
def build_alias(weights, threshold, alias):
    """Vose's alias table of `weights`, which sum to their number."""
    num_items = weights.size
    small = np.empty(num_items, alias.dtype)
    large = np.empty(num_items, alias.dtype)
    num_small = num_large = 0
    for k in range(num_items):
        threshold[k] = weights[k]
        alias[k] = k
        if weights[k] < 1.0:
            small[num_small] = k
            num_small += 1
        else:
            large[num_large] = k
            num_large += 1
    while num_small and num_large:
        num_small -= 1
        s = small[num_small]
        g = large[num_large - 1]
        alias[s] = g
        threshold[g] = (threshold[g] + threshold[s]) - 1.0
        if threshold[g] < 1.0:
            num_large -= 1
            small[num_small] = g
            num_small += 1
    # What is left differs from 1 by rounding alone.
    for i in range(num_large):
        threshold[large[i]] = 1.0
    for i in range(num_small):
        threshold[small[i]] = 1.0
