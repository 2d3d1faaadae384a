"""Rows of a table, gathered and scattered by id."""

import numpy as np

from . import kernel


@kernel
def add_rows(table, index, rows):
    """table[index[i]] += rows[i], in order of i, repeats included."""
    for i in range(index.size):
        for d in range(rows.shape[1]):
            table[index[i], d] += rows[i, d]


# Keeps 0/√0, of a row that never had a gradient, at 0.
TINY = 1e-30


@kernel
def adagrad(table, squares, ids, gradients, learning_rate):
    """AdaGrad (Duchi et al. 2011) of the given rows, in place: h += g², w −= η·g/√h.

    Where `squares` has one column, h is a row's: its mean of g².
    """
    for i in range(ids.size):
        row, h, gradient = table[ids[i]], squares[ids[i]], gradients[i]
        if h.size == row.size:
            for d in range(row.size):
                h[d] += gradient[d] * gradient[d]
                row[d] -= learning_rate * gradient[d] / np.sqrt(max(h[d], h.dtype.type(TINY)))
        else:
            total = h.dtype.type(0)
            for d in range(row.size):
                total += gradient[d] * gradient[d]
            h[0] += total / h.dtype.type(row.size)
            rate = learning_rate / np.sqrt(max(h[0], h.dtype.type(TINY)))
            for d in range(row.size):
                row[d] -= rate * gradient[d]


@kernel
def adam(table, means, squares, ids, gradients, learning_rate, step):
    """Adam (Kingma & Ba 2015) of the given rows alone, in place; other rows' moments stay.

    `step` counts from 1. β₁ = 0.9, β₂ = 0.999, ε = 1e-8.
    """
    real = table.dtype.type
    keep_m, keep_v = real(0.9), real(0.999)
    m_scale = real(learning_rate / (1 - 0.9**step))
    v_scale = real(1 / (1 - 0.999**step))
    for i in range(ids.size):
        row, m, v, gradient = table[ids[i]], means[ids[i]], squares[ids[i]], gradients[i]
        for d in range(row.size):
            m[d] = keep_m * m[d] + (real(1) - keep_m) * gradient[d]
            v[d] = keep_v * v[d] + (real(1) - keep_v) * gradient[d] * gradient[d]
            row[d] -= m_scale * m[d] / (np.sqrt(v_scale * v[d]) + real(1e-8))
