"""Draws from the popularity laws."""

from typing import Any, NamedTuple

import numpy as np

from ..scalar import (
    LANES,
    alias_rank,
    log_uniform_rank,
    philox_advance_key,
    philox_five_rounds,
    u64,
    uniform_53,
    uniform_rank,
    zipf_mandelbrot_rank,
)
from . import kernel

# Counters in a tile: its words stay in the first-level cache between the passes below.
COUNTERS = 512
# Draws in a tile.
TILE = 2 * COUNTERS


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
    """What a law's inverse distribution `rank(u, *law)` compiles to."""

    draw: Any
    draw_unique: Any
    invert: Any


def _kernel(rank):
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
    def draw_unique(out, table, k0, k1, step, stream, first_id, *law):
        """The first out.size distinct ids of the draws, in their order; returns the draws taken.

        `table` is a hash set of ranks with open addressing, a power of two in size, −1 where free.
        """
        u = np.empty(TILE)
        words = np.empty((4, COUNTERS), np.uint64)
        ranks = np.empty(TILE, table.dtype)
        slots = u64(table.size - 1)
        num_kept = tile = 0
        while True:
            _fill_uniforms(u, words, tile, k0, k1, step, stream)
            for i in range(TILE):
                ranks[i] = rank(u[i], *law)
            for i in range(TILE):
                # Fibonacci hashing spreads neighbouring ranks, which are the likely ones.
                slot = (u64(ranks[i]) * u64(0x9E3779B97F4A7C15)) >> u64(20)
                while table[slot & slots] >= 0 and table[slot & slots] != ranks[i]:
                    slot += u64(1)
                if table[slot & slots] < 0:
                    table[slot & slots] = ranks[i]
                    out[num_kept] = first_id + ranks[i]
                    num_kept += 1
                    if num_kept == out.size:
                        return tile * TILE + i + 1
            tile += 1

    @kernel
    def invert(out, u, *law):
        for i in range(u.size):
            out[i] = rank(u[i], *law)

    return Kernel(draw, draw_unique, invert)


log_uniform = _kernel(log_uniform_rank)
uniform = _kernel(uniform_rank)
zipf_mandelbrot = _kernel(zipf_mandelbrot_rank)
alias = _kernel(alias_rank)


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
