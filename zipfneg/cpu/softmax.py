"""The sampled softmax in tiles of logits that stand in cache: value, ranks and gradients.

A tile holds the logits of HEIGHT rows against WIDTH negatives, transposed: each row's shift, sum
and weight is then a lane of a vector, and one layout serves all three products. A block of tiles,
some rows against all negatives, is filled by rows (logits, exponentials, the gradient of the
queries) and then read by columns (the gradient of the negatives). Threads share nothing but
whole rows or columns, and the division into tiles and blocks depends on shapes alone: so results
do not depend on the number of threads.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from ..checks import NDArray
from ..scalar import exp, exp_float32
from . import kernel
from .masking import drop_row, drop_tile, first_drops
from .product import COLUMNS, ROWS, product
from .ranks import tie_tolerance
from .threads import for_spans

HEIGHT, WIDTH = 128, 240  # of a tile; the width in whole tiles of a product, of 6 or 8 rows
# Rows of a transposed tile are a cache line further apart than their length: a power of two would
# map a column of them to a few sets of the cache.
PITCH = HEIGHT + 16
# Bytes of a block of tiles.
BLOCK = 48 * 2**20
# Rows of tiles that a block holds at least, for threads to share: where it cannot hold so many
# against all negatives, a first pass finds the normalisers, and the second takes some columns at
# a time.
BLOCK_ROWS = 8


class Problem(NamedTuple):
    """Checked arrays in the dtype of accumulation; per-query negatives are converted blockwise."""

    queries: NDArray  # (B, D)
    positives: NDArray  # (B, D)
    negatives: NDArray  # (S, D), (B, S, D), or the table (N, D) of `negative_rows`
    positive_bias: NDArray | None  # (B,)
    negative_bias: NDArray | None  # (S,) or (B, S)
    positive_log_q: NDArray | None  # (B,)
    negative_log_q: NDArray | None  # (S,) or (B, S)
    drop: Any  # `FalseNegatives`
    temperature: float
    negative_rows: NDArray | None = None  # (B, S) int64

    @property
    def num_sampled(self) -> int:
        rows = self.negative_rows
        return self.negatives.shape[-2] if rows is None else rows.shape[1]

    @property
    def shared(self) -> bool:
        return self.negatives.ndim == 2 and self.negative_rows is None


class Pass(NamedTuple):
    """What the logits give of each row."""

    # logsumexp_j z_j = shift + log(total). Kept apart: their sum, rounded, would lose digits of
    # the weights e^(z − shift)/total where scores are large.
    shift: NDArray  # (B,)
    total: NDArray  # (B,); 0 where no negative is left
    excess: NDArray  # (B,) D = logsumexp_j z_j − z_0, so that L = softplus(D)
    # If ranks are asked for:
    num_better: NDArray  # (B,) negatives that score above the positive
    num_tied: NDArray  # (B,) negatives that score the same
    num_dropped: NDArray  # (B,) negatives that are dropped, or score −inf
    squares: NDArray  # (B,) Σ_j e^(2·(z_j − shift))

    @property
    def loss(self) -> NDArray:
        return softplus(self.excess)


class Gradients(NamedTuple):
    """Of Σ_i d_i·L_i, in the dtype of accumulation."""

    queries: NDArray  # (B, D)
    positives: NDArray  # (B, D)
    negatives: NDArray  # (S, D) or (B, S, D); empty for rows of a table: each has negative_bias·u
    positive_bias: NDArray  # (B,)
    negative_bias: NDArray  # (S,) or (B, S); 0 where the problem has none, but for a table's rows
    temperature: NDArray  # ()


class Given(NamedTuple):
    """A problem as the kernels take it: read-only contiguous arrays, empty where there is none."""

    queries: NDArray
    positives: NDArray
    positive_bias: NDArray
    negative_bias: NDArray
    positive_log_q: NDArray
    negative_log_q: NDArray
    drop: Any  # `FalseNegatives`
    tolerance: NDArray  # (B,) of a tie; empty where ranks are not asked for
    d_loss: NDArray  # (B,)
    temperature: float


class Rows(NamedTuple):
    """What the kernels write of each row: gradients are empty where they are not asked for."""

    result: Pass
    weight: NDArray  # (B,) d·σ(D)/(total·τ): the derivative by a_j is this times e^(z_j − shift)
    d_positive_bias: NDArray  # (B,)
    d_queries: NDArray  # (B, D)
    d_positives: NDArray  # (B, D)
    d_temperature: NDArray  # (B,) Σ_d u·dU


def _exp(x):
    """e**x of x ≤ 0, and 0 far below."""
    return np.exp(x)


@overload(_exp)
def _exp_of(x):
    if x == types.float32:
        return exp_float32
    return lambda x: 0.0 if x < -700.0 else exp(-700.0 if x < -700.0 else x)


@partial(kernel, fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@partial(kernel, fastmath={"contract", "reassoc"})
def _short_dot(x, y):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@kernel
def _positive_score(given, row):
    """a_0."""
    score = _dot(given.queries[row], given.positives[row])
    if given.positive_bias.size:
        score += given.positive_bias[row]
    return score / given.temperature


@kernel
def _finish_row(given, rows, row, shift, total, known):
    """The row's loss from its normaliser, and what its gradients are multiplied by."""
    if not known:
        z_0 = _positive_score(given, row)
        if given.positive_log_q.size:
            z_0 -= given.positive_log_q[row]
        rows.result.shift[row], rows.result.total[row] = shift, total
        rows.result.excess[row] = shift - z_0 + np.log(total)
    if rows.weight.size:
        # g_0 = −d·σ(D) and g_j = d·σ(D)·softmax_j.
        d = (
            given.d_loss[row]
            / (1.0 + np.exp(-np.float64(rows.result.excess[row])))
            / given.temperature
        )
        rows.d_positive_bias[row] = -d
        rows.weight[row] = d / total if total != 0.0 else 0.0


@kernel
def _finish_gradients(given, rows, row, d_u):
    """d_u (D,): Σ_j e^(z_j − shift)·v_j."""
    weight, g_0 = rows.weight[row], rows.d_positive_bias[row]
    for d in range(given.queries.shape[1]):
        rows.d_queries[row, d] = weight * d_u[d] + g_0 * given.positives[row, d]
        rows.d_positives[row, d] = g_0 * given.queries[row, d]
    rows.d_temperature[row] = _dot(given.queries[row], rows.d_queries[row])


@kernel
def _offsets(offset, given, column, row):
    """z_j − u·v_j/τ of a tile's columns, for per-query negatives those of the row."""
    offset[:] = 0
    if given.negative_bias.size:
        offset += given.negative_bias[row, column : column + offset.size] / given.temperature
    if given.negative_log_q.size:
        offset -= given.negative_log_q[row, column : column + offset.size]


@kernel
def _count(z, given, rows, row, column, scores):
    """Better, tied and dropped negatives of each row, by the uncorrected score."""
    better = np.zeros(scores.size, np.int32)
    worse = np.zeros(scores.size, np.int32)
    dropped = np.zeros(scores.size, np.int32)
    for j in range(z.shape[0]):
        bias = z.dtype.type(0)
        if given.negative_bias.size:
            bias = z.dtype.type(given.negative_bias[0, column + j] / given.temperature)
        for i in range(scores.size):
            a, tolerance = z[j, i] + bias, given.tolerance[row + i]
            better[i] += not a <= scores[i] + tolerance  # NaN too: a broken model is not good
            worse[i] += a < scores[i] - tolerance
            dropped[i] += a == -np.inf
    for i in range(scores.size):
        rows.result.num_better[row + i] += better[i]
        rows.result.num_tied[row + i] += z.shape[0] - better[i] - worse[i]
        rows.result.num_dropped[row + i] += dropped[i]


@kernel
def _count_row(z, given, rows, row, score):
    """The same for negatives (S,) of the row's own."""
    tolerance = given.tolerance[row]
    for j in range(z.size):
        a = z[j]
        if given.negative_bias.size:
            a += z.dtype.type(given.negative_bias[row, j] / given.temperature)
        rows.result.num_better[row] += not a <= score + tolerance
        rows.result.num_tied[row] += score - tolerance <= a and a <= score + tolerance
        rows.result.num_dropped[row] += a == -np.inf


@kernel
def _raise(shift, z, offset):
    """shift_i = max(shift_i, max_j z_ij): a choice, which is made of vectors, not a branch."""
    for j in range(z.shape[0]):
        for i in range(shift.size):
            x = z[j, i] + offset[j]
            shift[i] = x if x > shift[i] else shift[i]


@kernel
def _exponentiate(z, offset, shift, total):
    """z ← e^(z − shift), and its sum over j added to `total`, in short sums for accuracy."""
    sums = np.empty_like(shift)
    for start in range(0, z.shape[0], 16):
        sums[:] = 0
        for j in range(start, min(start + 16, z.shape[0])):
            for i in range(shift.size):
                e = _exp((z[j, i] + offset[j]) - shift[i])
                z[j, i] = e
                sums[i] += e
        for i in range(shift.size):
            total[i] += sums[i]


@kernel
def _add_squares(e, squares):
    for j in range(e.shape[0]):
        for i in range(squares.size):
            squares[i] += e[j, i] * e[j, i]


@kernel
def _fill(start, stop, given, negatives, rows, block, shifts, first_row, columns, known):
    """Tiles of e^(z − shift) by rows, with all that they give of each row.

    The shift is the largest logit of a row so far, and what was summed before is scaled when it
    rises; `shifts` keeps that of each tile.
    """
    gradients = rows.weight.size > 0
    num_queries, dim = given.queries.shape
    num_sampled = negatives.shape[0]
    padded = -(-dim // COLUMNS) * COLUMNS
    # Zeros, since what is left in memory may be slow to compute with.
    copied = np.zeros((WIDTH, padded), block.dtype)
    queries = np.zeros((dim, PITCH), block.dtype)
    d_queries = np.empty((HEIGHT + ROWS, padded), block.dtype)
    tiles = block if gradients else np.empty((1, WIDTH, PITCH), block.dtype)
    first_column, last_column = columns
    for piece in range(start, stop):
        row = first_row + piece * HEIGHT
        n = min(HEIGHT, num_queries - row)
        for i in range(n):
            for d in range(dim):
                queries[d, i] = given.queries[row + i, d] / given.temperature
        shift, finite, total = np.empty(n, block.dtype), np.empty(n, block.dtype), np.zeros(n)
        shift[:] = -np.inf
        if known:
            shift[:] = rows.result.shift[row : row + n]
        if gradients:
            d_queries[:] = 0
            if first_column:
                d_queries[:n, :dim] = rows.d_queries[row : row + n]
        scores = np.empty(given.tolerance[row : row + n].size, block.dtype)
        squares = np.zeros(scores.size)
        for i in range(scores.size):
            scores[i] = _positive_score(given, row + i)
        drops = first_drops(given.drop, row, n, first_column)

        for column in range(first_column, last_column, WIDTH):
            c = min(WIDTH, last_column - column)
            offset = np.empty(c, block.dtype)
            v, v_0, pitch = negatives, column * dim, dim
            if c % ROWS or dim % COLUMNS:  # there would be no room for a whole last tile
                copied[:c, :dim] = negatives[column : column + c]
                v, v_0, pitch = copied, 0, padded
            number = (column - first_column) // WIDTH
            slot, at = (piece, number * WIDTH) if gradients else (0, 0)
            e_0 = (slot * tiles.shape[1] + at) * PITCH
            z = tiles[slot, at : at + c]
            product(v, v_0, pitch, 1, queries, 0, PITCH, tiles, e_0, PITCH, (c, n, dim), False)
            drop_tile(z, given.drop, row, n, column, drops)
            if scores.size:
                _count(z, given, rows, row, column, scores)
            _offsets(offset, given, column, 0)
            if not known:
                before = shift.copy()
                _raise(shift, z, offset)
                for i in range(n):
                    if shift[i] > before[i]:
                        factor = _exp(before[i] - shift[i])
                        total[i] *= factor
                        if scores.size:
                            squares[i] *= np.float64(factor) * factor
                        if gradients:
                            d_queries[i] *= factor
            for i in range(n):
                finite[i] = shift[i] if shift[i] > -np.inf else 0
            _exponentiate(z, offset, finite, total)
            _add_squares(z, squares)
            if gradients:
                shifts[piece, number, :n] = shift
                product(
                    tiles, e_0, 1, PITCH, v, v_0, pitch, d_queries, 0, padded, (n, dim, c), True
                )

        rows.result.squares[row : row + scores.size] += squares
        for i in range(n):
            if known:
                top, sum_ = rows.result.shift[row + i], np.float64(rows.result.total[row + i])
            else:
                top, sum_ = shift[i] if shift[i] > -np.inf else shift.dtype.type(0), total[i]
            _finish_row(given, rows, row + i, top, sum_, known)
            if gradients and last_column == num_sampled:
                _finish_gradients(given, rows, row + i, d_queries[i, :dim])
            elif gradients:
                rows.d_queries[row + i] = d_queries[i, :dim]


@kernel
def _collect(start, stop, given, rows, block, shifts, first_row, columns, d_negatives, d_bias):
    """The gradient of the negatives by columns: each tile's share, in the order of the rows."""
    num_queries, dim = given.queries.shape
    padded = -(-dim // COLUMNS) * COLUMNS
    num_rows = min(block.shape[0] * HEIGHT, num_queries - first_row)
    queries = np.zeros((HEIGHT, padded), block.dtype)
    d_items = np.empty((WIDTH, padded), block.dtype)
    first_column, last_column = columns
    for number in range(start, stop):
        column = first_column + number * WIDTH
        c = min(WIDTH, last_column - column)
        for piece in range(-(-num_rows // HEIGHT)):
            row = first_row + piece * HEIGHT
            n = min(HEIGHT, num_queries - row)
            factor = np.empty(n, block.dtype)
            for i in range(n):
                factor[i] = rows.weight[row + i] * _exp(
                    shifts[piece, number, i] - rows.result.shift[row + i]
                )
                for d in range(dim):
                    queries[i, d] = factor[i] * given.queries[row + i, d]
            e_0 = (piece * block.shape[1] + number * WIDTH) * PITCH
            add = piece > 0
            product(block, e_0, PITCH, 1, queries, 0, padded, d_items, 0, padded, (c, dim, n), add)
            if given.negative_bias.size:
                for j in range(c):
                    e = block[piece, number * WIDTH + j, :n]
                    d_bias[0, column + j] += _short_dot(e, factor)
        d_negatives[column : column + c] += d_items[:c, :dim]


@kernel
def _own(given, v, rows, row, known, d_negatives, d_bias):
    """All of a row whose negatives v (S, D) are its own, while they stand in cache.

    d_negatives (S, D) and d_bias (S,) are empty where they are not asked for.
    """
    num_sampled, dim = v.shape
    z, offset = np.empty(num_sampled, v.dtype), np.empty(num_sampled, v.dtype)
    u, d_u = np.empty(dim, z.dtype), np.zeros(dim, z.dtype)
    u[:] = given.queries[row] / given.temperature
    for j in range(num_sampled):
        z[j] = _short_dot(u, v[j])
    drop_row(z, given.drop, row)
    _offsets(offset, given, 0, row)
    if given.tolerance.size:
        score = z.dtype.type(_positive_score(given, row))
        _count_row(z, given, rows, row, score)
    shift, total = rows.result.shift[row] if known else z.dtype.type(-np.inf), 0.0
    for j in range(num_sampled):
        z[j] += offset[j]
        if not known and z[j] > shift:
            shift = z[j]
    if shift == -np.inf:
        shift = z.dtype.type(0)
    for j in range(num_sampled):
        z[j] = _exp(z[j] - shift)
    for j in range(num_sampled):
        total += z[j]
    if given.tolerance.size:
        for j in range(num_sampled):
            rows.result.squares[row] += np.float64(z[j]) * z[j]
    total = np.float64(rows.result.total[row]) if known else total
    _finish_row(given, rows, row, shift, total, known)
    if not rows.weight.size:
        return
    u[:] = given.queries[row]
    for j in range(num_sampled):
        g = rows.weight[row] * z[j]
        if d_bias.size:
            d_bias[j] = g
        for d in range(dim):
            d_u[d] += z[j] * v[j, d]
        if d_negatives.size:
            for d in range(dim):
                d_negatives[j, d] = g * u[d]
    _finish_gradients(given, rows, row, d_u)


@kernel
def _each(start, stop, given, negatives, rows, d_negatives, d_bias, first_row, known):
    """Rows with negatives (r, S, D)."""
    for at in range(start, stop):
        row = first_row + at
        _own(given, negatives[at], rows, row, known, d_negatives[at], d_bias[row])


@kernel
def _each_of_table(start, stop, given, table, negative_rows, rows, d_bias, known):
    """Rows whose negatives are rows of a table."""
    num_sampled, dim = negative_rows.shape[1], table.shape[1]
    v, nothing = np.empty((num_sampled, dim), table.dtype), np.empty((0, dim), table.dtype)
    for row in range(start, stop):
        for j in range(num_sampled):
            for d in range(dim):
                v[j, d] = table[negative_rows[row, j], d]
        _own(given, v, rows, row, known, nothing, d_bias[row])


def positive_scores(problem: Problem) -> tuple[NDArray, NDArray]:
    """a_0 and z_0 = a_0 − log q_0, both (B,)."""
    a_0 = np.einsum("bd,bd->b", problem.queries, problem.positives)
    if problem.positive_bias is not None:
        a_0 += problem.positive_bias
    a_0 /= problem.temperature
    return a_0, a_0 if problem.positive_log_q is None else a_0 - problem.positive_log_q


def softplus(x: NDArray) -> NDArray:
    """log(1 + e^x), without overflow."""
    with np.errstate(invalid="ignore"):  # NaN passes through, unannounced as elsewhere
        return np.logaddexp(0, x)


def value(problem: Problem, *, ranks: bool = False) -> Pass:
    return _run(problem, None, None, ranks)[0]


def value_and_gradients(
    problem: Problem, d_loss: NDArray, *, known: Pass | None = None, ranks: bool = False
) -> tuple[Pass, Gradients]:
    """`d_loss` (B,) weighs the rows. A `known` pass saves the row maximum and sum.

    `value`, then this with its result, is the exact forward and backward for any upstream gradient.
    """
    result, gradients = _run(problem, d_loss, known, ranks)
    assert gradients is not None
    return result, gradients


def _run(
    problem: Problem, d_loss: NDArray | None, known: Pass | None, ranks: bool
) -> tuple[Pass, Gradients | None]:
    v, dtype, shared = problem.negatives, problem.queries.dtype, problem.shared
    (num_queries, dim), num_sampled = problem.queries.shape, problem.num_sampled
    tile_rows, tile_columns = -(-num_queries // HEIGHT), -(-num_sampled // WIDTH)
    height, columns = _block_shape(tile_rows, tile_columns, dtype)
    if shared and d_loss is not None and known is None and columns < tile_columns:
        known, ranks = _run(problem, None, None, ranks)[0], False

    def empty(*shape: int) -> NDArray:
        return np.empty(shape, dtype)

    counts = *np.zeros((3, num_queries), np.int64), np.zeros(num_queries)
    if known is None:
        result = Pass(empty(num_queries), empty(num_queries), empty(num_queries), *counts)
    else:
        result = Pass(*known[:3], *counts) if ranks else known
    num_weighed = 0 if d_loss is None else num_queries
    rows = Rows(
        result,
        weight=empty(num_weighed),
        d_positive_bias=empty(num_weighed),
        d_queries=empty(num_weighed, dim),
        d_positives=empty(num_weighed, dim),
        d_temperature=np.empty(num_weighed),
    )
    # Zeros cost nothing before they are written to.
    none = d_loss is None or problem.negative_rows is not None
    d_v = np.zeros((0,) * v.ndim if none else v.shape, v.dtype)
    of_bias = np.zeros((num_sampled,) if shared else (num_weighed, num_sampled), dtype)
    d_bias = of_bias[None] if shared else of_bias
    given = _given(problem, d_loss, ranks)
    if shared:
        if d_loss is None:
            height, columns = max(1, tile_rows), max(1, tile_columns)
        v = _read_only(v, dtype, 2)
        with _tiles(0 if d_loss is None else height, columns, dtype) as (block, shifts):
            for column in range(0, max(1, num_sampled), columns * WIDTH):
                part = column, min(column + columns * WIDTH, num_sampled)
                for row in range(0, tile_rows, height):
                    where = rows, block, shifts, row * HEIGHT, part
                    filled = min(height, tile_rows - row)
                    for_spans(_fill, filled, 1, given, v, *where, known is not None)
                    if d_loss is not None:
                        width = -(-(part[1] - column) // WIDTH)
                        for_spans(_collect, width, 1, given, *where, d_v, d_bias)
    elif problem.negative_rows is None:
        kept = d_bias if problem.negative_bias is not None else d_bias[:, :0]
        _run_each(given, v, rows, d_v, kept, known is not None)
    else:
        table, index = _read_only(v, dtype, 2), problem.negative_rows
        kernel_arguments = given, table, index, rows, d_bias, known is not None
        for_spans(_each_of_table, num_queries, 1, *kernel_arguments)

    if d_loss is None:
        return result, None
    # Σ g·a = Σ u·dU + Σ b·db, because a = (u·v + b)/τ: no second look at the logits.
    g_a = rows.d_temperature.sum()
    if problem.positive_bias is not None:
        g_a += np.vdot(problem.positive_bias, rows.d_positive_bias)
    if problem.negative_bias is not None:
        g_a += np.vdot(problem.negative_bias, of_bias)
    return result, Gradients(
        rows.d_queries,
        rows.d_positives,
        d_v,
        rows.d_positive_bias,
        of_bias,
        np.asarray(-g_a / problem.temperature, dtype),
    )


def _run_each(
    given: Given, v: NDArray, rows: Rows, d_v: NDArray, d_bias: NDArray, known: bool
) -> None:
    """Negatives of each query's own, converted some rows at a time where they must be."""
    dtype = given.queries.dtype
    height = max(1, len(v))
    if v.dtype != dtype or not v.flags.c_contiguous:
        height = max(1, BLOCK * height // (2 * max(1, v.size) * dtype.itemsize))
    for row in range(0, len(v), height):
        block = _read_only(v[row : row + height], dtype, 3)
        out = d_v[row : row + height]
        if out.dtype != dtype:
            out = np.empty(out.shape, dtype)
        for_spans(_each, len(block), 1, given, block, rows, out, d_bias, row, known)
        if out.dtype != d_v.dtype:
            d_v[row : row + height] = out


def _read_only(x: NDArray | None, dtype: np.dtype[Any], ndim: int) -> NDArray:
    """Of one type for the compiler, whoever owns it."""
    x = np.empty((0,) * ndim, dtype) if x is None else np.ascontiguousarray(x, dtype)
    view = x.view() if x.ndim == ndim else x.reshape(1, -1)
    view.flags.writeable = False
    return view


def _given(problem: Problem, d_loss: NDArray | None, ranks: bool) -> Given:
    dtype = problem.queries.dtype
    read_only = partial(_read_only, dtype=dtype)
    tolerance = None
    if ranks:
        a_0, _ = positive_scores(problem)
        tolerance = np.empty_like(a_0)
        for lo in range(0, len(a_0), WIDTH):
            part = slice(lo, lo + WIDTH)
            u, p = problem.queries[part], problem.positives[part]
            tolerance[part] = tie_tolerance(u, p, a_0[part], problem.temperature)
    return Given(
        read_only(problem.queries, ndim=2),
        read_only(problem.positives, ndim=2),
        read_only(problem.positive_bias, ndim=1),
        read_only(problem.negative_bias, ndim=2),
        read_only(problem.positive_log_q, ndim=1),
        read_only(problem.negative_log_q, ndim=2),
        problem.drop,
        read_only(tolerance, ndim=1),
        read_only(d_loss, ndim=1),
        float(problem.temperature),
    )


def _block_shape(num_rows: int, num_columns: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Rows and columns of tiles in a block: all columns, if that leaves room for BLOCK_ROWS."""
    tiles = max(1, BLOCK // (WIDTH * PITCH * dtype.itemsize))
    columns = max(1, min(num_columns, tiles // max(1, min(num_rows, BLOCK_ROWS))))
    rows = max(1, tiles // columns)
    return max(1, min(num_rows, rows - rows % BLOCK_ROWS or rows)), columns


# The memory of the last block: new memory must be cleared by the system, which takes a good part
# of the time of a small call.
_spare: list[NDArray] = []


@contextmanager
def _tiles(
    num_rows: int, num_columns: int, dtype: np.dtype[Any]
) -> Iterator[tuple[NDArray, NDArray]]:
    """A block of tiles, and room for their shifts."""
    shape = num_rows, num_columns * WIDTH, PITCH
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = _spare.pop()
    except IndexError:  # the first call, or one beside another
        memory = np.empty(0, np.uint8)
    if memory.nbytes < size:
        memory = np.empty(size, np.uint8)
    block = memory[:size].view(dtype).reshape(shape)
    yield block, np.empty((num_rows, num_columns, HEIGHT), dtype)
    _spare[:] = [memory]
