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
    """Which negatives each row drops, ready to be applied to a block of rows at a time."""

    negative_ids: NDArray | None  # (S,) ascending if shared, else (B, S)
    order: NDArray | None  # (S,) the columns of the ascending ids; None if per query
    drop_ids: tuple[tuple[NDArray, NDArray], ...]  # ragged sets, each dropped from its row
    mask: NDArray | None  # (S,) or (B, S); True drops

    @classmethod
    def find(
        cls,
        negative_ids: Array | None,
        positive_ids: Array | None,
        known_positives: Csr | None,
        mask: Array | None,
        num_queries: int,
    ) -> "FalseNegatives":
        drop_ids: list[tuple[NDArray, NDArray]] = []
        if negative_ids is not None and positive_ids is not None:
            drop_ids.append((np.arange(num_queries + 1), positive_ids.astype(np.int64, copy=False)))
        if known_positives is not None:
            if negative_ids is None:
                raise ValueError("known_positives: needs negatives.ids to compare with, got None")
            drop_ids.append(csr("known_positives", known_positives, num_queries))
        order = None
        if drop_ids and negative_ids is not None:
            negative_ids = negative_ids.astype(np.int64, copy=False)
            if negative_ids.ndim == 1:
                order = np.argsort(negative_ids, kind="stable")
                negative_ids = negative_ids[order]
        return cls(negative_ids, order, tuple(drop_ids), mask)

    def drop(self, logits: NDArray, first_row: int) -> None:
        """Write −inf over the dropped ones of logits (r, S), rows first_row…first_row + r − 1."""
        if self.mask is not None:
            rows = self.mask if self.mask.ndim == 1 else self.mask[first_row:][: len(logits)]
            np.copyto(logits, -np.inf, where=rows)
        for indptr, ids in self.drop_ids:
            if self.order is not None:
                kernels.drop_shared(logits, first_row, indptr, ids, self.negative_ids, self.order)
            else:
                kernels.drop_per_query(logits, first_row, indptr, ids, self.negative_ids)
