"""The best of many scores, over tiles that stand in cache."""

import numpy as np

from . import kernel
from .masking import drop_tile, first_drops
from .product import COLUMNS, ROWS, product
from .softmax import HEIGHT, PITCH, WIDTH


@kernel
def _sift(values, ids):
    """Put the first of a heap, whose least value should come first, where it belongs."""
    at, value, x = 0, values[0], ids[0]
    while True:
        below = 2 * at + 1
        if below >= values.size:
            break
        if below + 1 < values.size and values[below + 1] < values[below]:
            below += 1
        if value <= values[below]:
            break
        values[at], ids[at] = values[below], ids[below]
        at = below
    values[at], ids[at] = value, x


@kernel
def best(start, stop, queries, items, bias, dropped, first_id, values, ids):
    """values, ids (B, k): the k best of queries·itemsᵀ + bias, in no order, for pieces of rows.

    They come filled with −inf and −1. A row with a NaN among its scores has one in its values.
    """
    num_queries, dim = queries.shape
    num_items = items.shape[0]
    padded = -(-dim // COLUMNS) * COLUMNS
    copied = np.zeros((WIDTH + ROWS, padded), items.dtype)
    transposed = np.zeros((dim, PITCH), items.dtype)
    z = np.empty((WIDTH + ROWS, PITCH), items.dtype)
    for piece in range(start, stop):
        row = piece * HEIGHT
        n = min(HEIGHT, num_queries - row)
        for i in range(n):
            for d in range(dim):
                transposed[d, i] = queries[row + i, d]
        drops = first_drops(dropped, row, n, 0)
        least = values[row : row + n, 0].copy()
        for column in range(0, num_items, WIDTH):
            c = min(WIDTH, num_items - column)
            v, v_0, pitch = items, column * dim, dim
            if c % ROWS or dim % COLUMNS:
                copied[:c, :dim] = items[column : column + c]
                v, v_0, pitch = copied, 0, padded
            product(v, v_0, pitch, 1, transposed, 0, PITCH, z, 0, PITCH, (c, n, dim), False)
            drop_tile(z[:c], dropped, row, n, column, drops)
            for j in range(c):
                b = bias[column + j] if bias.size else z.dtype.type(0)
                for i in range(n):
                    if not z[j, i] + b <= least[i]:  # NaN too
                        values[row + i, 0] = z[j, i] + b
                        ids[row + i, 0] = first_id + column + j
                        if z[j, i] + b == z[j, i] + b:
                            _sift(values[row + i], ids[row + i])
                        # Once NaN comes first, nothing else goes in.
                        least[i] = values[row + i, 0]
                        if least[i] != least[i]:
                            least[i] = np.inf
