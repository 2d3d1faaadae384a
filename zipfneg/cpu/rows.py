"""Rows of a table, gathered and scattered by id."""

from . import kernel


@kernel
def add_rows(table, index, rows):
    """table[index[i]] += rows[i], in order of i, repeats included."""
    for i in range(index.size):
        for d in range(rows.shape[1]):
            table[index[i], d] += rows[i, d]


@kernel
def adagrad(table, accumulator, ids, gradients, learning_rate):
    """AdaGrad (Duchi et al. 2011) of the given rows, in place: h += g², w −= η·g/√h."""
    for i in range(ids.size):
        for d in range(table.shape[1]):
            g = gradients[i, d]
            accumulator[ids[i], d] += g * g
            if g != 0.0:
                table[ids[i], d] -= learning_rate * g / accumulator[ids[i], d] ** 0.5
