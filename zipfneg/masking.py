"""False negatives: negatives that are a query's own positive, or known to be one."""

from typing import Any, NamedTuple

import numpy as np

from . import checks
from .checks import NDArray
from .cpu import masking as kernels
from .interop import Array, as_array

# Ragged sets of ids, one a query: (indptr (B + 1,), ids (nnz,)), row i being
# ids[indptr[i]:indptr[i + 1]]; or anything with `indptr` and `indices`, as SciPy's csr_array.
Csr = Any


def csr(name: str, value: Csr, num_rows: int) -> tuple[NDArray, NDArray]:
    """The checked (indptr, ids) of ragged ids."""
    if hasattr(value, "indptr") and hasattr(value, "indices"):
        if getattr(value, "format", "csr") != "csr":
            raise TypeError(f"{name}: expected rows (CSR), got {value.format}; pass .tocsr()")
        value = (value.indptr, value.indices)
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"{name}: expected the pair (indptr, ids) or a matrix with indptr and indices, got "
            f"{type(value).__name__}"
        )
    indptr = as_array(value[0], f"{name}.indptr")
    ids = as_array(value[1], f"{name}.ids")
    checks.integral(f"{name}.indptr", indptr)
    checks.integral(f"{name}.ids", ids)
    checks.shape(f"{name}.indptr", indptr, (num_rows + 1,), "(B + 1,)")
    indptr = indptr.astype(np.int64, copy=False)  # differences of unsigned numbers would wrap
    if ids.ndim != 1 or indptr[0] != 0 or indptr[-1] != ids.size or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"{name}: expected indptr to rise from 0 to the number of ids {ids.size}, got "
            f"{indptr[0]} to {indptr[-1]}"
        )
    return indptr, ids.astype(np.int64, copy=False)


class FalseNegatives(NamedTuple):
    """Which negatives each row drops, as the kernels take it: read-only, empty where not given."""

    negative_ids: NDArray  # (1, S) ascending if shared, else (B, S)
    order: NDArray  # (S,) the columns of the ascending ids; empty if per query
    indptr: NDArray  # (B + 1,) of the ragged drop_ids, each dropped from its row
    drop_ids: NDArray
    mask: NDArray  # (B, S), or (1, S) for all rows; True drops

    @classmethod
    def find(
        cls,
        negative_ids: Array | None,
        positive_ids: Array | None,
        known_positives: Csr | None,
        mask: Array | None,
        num_queries: int,
    ) -> "FalseNegatives":
        order = indptr = drop_ids = np.empty(0, np.int64)
        if negative_ids is not None:  # before they are sorted: wide unsigned ids become negative
            negative_ids = negative_ids.astype(np.int64, copy=False)
        if positive_ids is not None:
            positive_ids = positive_ids.astype(np.int64, copy=False)
        if known_positives is not None:
            if negative_ids is None:
                raise ValueError("known_positives: needs negatives.ids to compare with, got None")
            indptr, drop_ids = csr("known_positives", known_positives, num_queries)
        if negative_ids is not None and positive_ids is not None:
            # Each row's own positive goes before its known ones.
            known = indptr if indptr.size else np.zeros(num_queries + 1, np.int64)
            drop_ids = np.insert(drop_ids, known[:-1], positive_ids)
            indptr = known + np.arange(num_queries + 1)
        if not indptr.size or negative_ids is None:
            negative_ids = np.empty((0, 0), np.int64)
        elif negative_ids.ndim == 1:
            order = np.argsort(negative_ids, kind="stable")
            negative_ids = negative_ids[order][None]
        mask = np.empty((0, 0), np.bool_) if mask is None else np.atleast_2d(mask)
        arrays = [
            np.ascontiguousarray(x, x.dtype if x.dtype == np.bool_ else np.int64).view()
            for x in (negative_ids, order, indptr, drop_ids, mask)
        ]
        for x in arrays:
            x.flags.writeable = False
        return cls(*arrays)

    def __call__(self, logits: NDArray, first_row: int) -> None:
        """Write −inf over the dropped ones of logits (r, S), rows first_row…first_row + r − 1."""
        if self.order.size:
            drops = kernels.first_drops(self, first_row, len(logits), 0)
            kernels.drop_tile(logits.T, self, first_row, len(logits), 0, drops)
        else:
            for row, z in enumerate(logits, first_row):
                kernels.drop_row(z, self, row)
