"""Kernels that write −inf over dropped negatives, in place.

`dropped` is what `FalseNegatives` holds, or anything with the same fields.
"""

import numpy as np

from . import kernel


@kernel
def first_drops(dropped, first_row, num_rows, first_column):
    """Where in `order` each drop id of some rows stands first, no earlier than a column.

    A row costs a binary search for each id that it drops, not a comparison with every negative.
    """
    if not dropped.indptr.size:
        return np.empty(0, np.int64)
    ids = dropped.drop_ids[dropped.indptr[first_row] : dropped.indptr[first_row + num_rows]]
    sorted_ids = dropped.negative_ids[0]
    drops = np.searchsorted(sorted_ids, ids)
    for k in range(ids.size):
        while (
            drops[k] < dropped.order.size
            and sorted_ids[drops[k]] == ids[k]
            and dropped.order[drops[k]] < first_column
        ):
            drops[k] += 1
    return drops


@kernel
def drop_tile(z, dropped, first_row, num_rows, first_column, drops):
    """z (c, r), logits of columns and rows from the first on. `drops` moves on with the columns.

    Columns of one id ascend in `order`.
    """
    if dropped.mask.size:
        for i in range(num_rows):
            mask = dropped.mask[min(first_row + i, dropped.mask.shape[0] - 1)]
            for j in range(z.shape[0]):
                if mask[first_column + j]:
                    z[j, i] = -np.inf
    if not drops.size:
        return
    start = dropped.indptr[first_row]
    for i in range(num_rows):
        for k in range(dropped.indptr[first_row + i], dropped.indptr[first_row + i + 1]):
            at = drops[k - start]
            while at < dropped.order.size and dropped.negative_ids[0, at] == dropped.drop_ids[k]:
                j = dropped.order[at] - first_column
                if j >= z.shape[0]:
                    break
                z[j, i] = -np.inf
                at += 1
            drops[k - start] = at


@kernel
def drop_row(z, dropped, row):
    """z (S,), logits of negatives of the row's own."""
    if dropped.mask.size:
        mask = dropped.mask[min(row, dropped.mask.shape[0] - 1)]
        for j in range(z.size):
            if mask[j]:
                z[j] = -np.inf
    if dropped.indptr.size:
        ids = np.sort(dropped.drop_ids[dropped.indptr[row] : dropped.indptr[row + 1]])
        for j in range(z.size):
            at = np.searchsorted(ids, dropped.negative_ids[row, j])
            if at < ids.size and ids[at] == dropped.negative_ids[row, j]:
                z[j] = -np.inf
