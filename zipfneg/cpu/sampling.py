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
    zipf_mandelbrot_log_prob,
    zipf_mandelbrot_rank,
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
def draw_uniforms(out, start, stop, k0, k1, step, stream):
    """out[start:stop]; `start` is a multiple of TILE."""
    u = np.empty(TILE)
    words = np.empty((4, COUNTERS), np.uint64)
    for first in range(start, stop, TILE):
        _fill_uniforms(u, words, first // TILE, k0, k1, step, stream)
        tile = out[first : min(first + TILE, stop)]
        for i in range(tile.size):
            tile[i] = u[i]


class Kernel(NamedTuple):
    """What a law's functions compile to: its inverse distribution and its log probability."""

    draw: Any
    draw_unique_marked: Any  # what was drawn before kept in a bit set
    draw_unique_hashed: Any  # or in a hash set
    invert: Any
    log_prob: Any
    log_inclusion: Any


@jitable
def _not_yet_marked(marks, rank):
    """Mark a rank in a bit set, `marks` uint64; whether it was not marked before."""
    word, bit = u64(rank) >> u64(6), u64(1) << (u64(rank) & u64(63))
    before = marks[word]
    marks[word] = before | bit
    return (before & bit) == u64(0)


@jitable
def _not_yet_in(table, rank):
    """The same for a hash set with open addressing, a power of two in size, −1 where free."""
    slots = u64(table.size - 1)
    # Fibonacci hashing spreads neighbouring ranks, which are the likely ones.
    slot = (u64(rank) * u64(0x9E3779B97F4A7C15)) >> u64(20)
    while table[slot & slots] >= 0 and table[slot & slots] != rank:
        slot += u64(1)
    free = table[slot & slots] < 0
    table[slot & slots] = rank
    return free


def _draw_unique(rank, first_sight):
    @kernel
    def draw_unique(out, seen, k0, k1, step, stream, first_id, *law):
        """The first out.size distinct ids of the draws, in their order; returns the draws taken.

        `seen` is the empty set that `first_sight` fills.
        """
        u = np.empty(TILE)
        words = np.empty((4, COUNTERS), np.uint64)
        ranks = np.empty(TILE, np.int64)
        num_kept = tile = 0
        while True:
            _fill_uniforms(u, words, tile, k0, k1, step, stream)
            for i in range(TILE):
                ranks[i] = rank(u[i], *law)
            for i in range(TILE):
                # No branch on what is seen for the first time: it could not be predicted.
                out[num_kept] = first_id + ranks[i]
                num_kept += first_sight(seen, ranks[i])
                if num_kept == out.size:
                    return tile * TILE + i + 1
            tile += 1

    return draw_unique


def _kernel(rank, log_prob_of_rank):
    @kernel
    def draw(out, start, stop, k0, k1, step, stream, first_id, *law):
        u = np.empty(TILE)
        words = np.empty((4, COUNTERS), np.uint64)
        for first in range(start, stop, TILE):
            _fill_uniforms(u, words, first // TILE, k0, k1, step, stream)
            tile = out[first : min(first + TILE, stop)]
            for i in range(tile.size):
                tile[i] = first_id + rank(u[i], *law)

    @kernel
    def invert(out, u, *law):
        for i in range(u.size):
            out[i] = rank(u[i], *law)

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

    return Kernel(
        draw=draw,
        draw_unique_marked=_draw_unique(rank, _not_yet_marked),
        draw_unique_hashed=_draw_unique(rank, _not_yet_in),
        invert=invert,
        log_prob=log_prob,
        log_inclusion=log_inclusion,
    )


log_uniform = _kernel(log_uniform_rank, log_uniform_log_prob)
uniform = _kernel(uniform_rank, uniform_log_prob)
zipf_mandelbrot = _kernel(zipf_mandelbrot_rank, zipf_mandelbrot_log_prob)
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
