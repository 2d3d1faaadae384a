"""Kernels that write −inf over dropped negatives, in place."""

import numpy as np

from . import kernel


@kernel
def drop_shared(logits, first_row, indptr, drop_ids, sorted_ids, order):
    """logits (r, S) of rows first_row…: drop where the negative's id is in the row's drop_ids.

    `sorted_ids` (S,) are the shared negatives' ids in ascending order, `order` their columns: a
    row costs a binary search for each id it drops, not a comparison with every negative.
    """
    for r in range(logits.shape[0]):
        row = first_row + r
        for i in range(indptr[row], indptr[row + 1]):
            at = np.searchsorted(sorted_ids, drop_ids[i])
            while at < sorted_ids.size and sorted_ids[at] == drop_ids[i]:
                logits[r, order[at]] = -np.inf
                at += 1


@kernel
def drop_per_query(logits, first_row, indptr, drop_ids, negative_ids):
    """The same for negatives of each query's own, negative_ids (B, S)."""
    for r in range(logits.shape[0]):
        row = first_row + r
        dropped = np.sort(drop_ids[indptr[row] : indptr[row + 1]])
        for j in range(logits.shape[1]):
            at = np.searchsorted(dropped, negative_ids[row, j])
            if at < dropped.size and dropped[at] == negative_ids[row, j]:
                logits[r, j] = -np.inf
