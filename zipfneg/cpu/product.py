"""Products of matrices that stand in cache, for kernels to run between their other passes.

A BLAS divides work over threads of its own and copies its operands. Here the caller has divided
the work and laid out the operands already.
"""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import kernel

_FEATURES = llvmlite.binding.get_host_cpu_features()
_VECTOR_BYTES = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx2") else 16
# The sums of a tile stay in registers, two vectors a row: 16 of the 32 of AVX-512 and NEON, or 12
# of 16. The others hold the factors.
_VECTORS = 2
ROWS = 8 if _FEATURES.get("avx512f") or _FEATURES.get("neon") else 6
# The widest tile of any machine: what rows are padded to.
COLUMNS = 32


@intrinsic
def _tile(typing_context, a, a_0, a_i, a_k, b, b_0, b_k, c, c_0, c_i, size, add):
    """One tile of `product`, as vectors: sums in loops over arrays would not stay in registers."""
    index, dtype = types.intp, c.dtype
    lanes, align = 8 * _VECTOR_BYTES // dtype.bitwidth, dtype.bitwidth // 8

    def generate(context, builder, signature, values):
        a_0, a_i, a_k, b_0, b_k, c_0, c_i = (values[n] for n in (1, 2, 3, 5, 6, 8, 9))
        vector = ir.VectorType(context.get_value_type(dtype), lanes)
        undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(vector, None)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)

        def constant(number):
            return ir.Constant(context.get_value_type(index), number)

        def rows(n, start, stride):
            data = context.make_array(signature.args[n])(context, builder, values[n]).data
            for m in range(ROWS):
                offset = builder.add(start, builder.mul(stride, constant(m)))
                yield builder.gep(data, [offset])

        def vectors(row):
            for n in range(_VECTORS):
                yield builder.bitcast(builder.gep(row, [constant(n * lanes)]), vector.as_pointer())

        a_rows, c_rows = list(rows(0, a_0, a_i)), list(rows(7, c_0, c_i))
        b_start = next(rows(4, b_0, b_k))
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(_VECTORS)] for _ in a_rows]
        with cgutils.for_range(builder, values[10]) as loop:
            row = builder.gep(b_start, [builder.mul(loop.index, b_k)])
            factors = [builder.load(at, align=align) for at in vectors(row)]
            offset = builder.mul(loop.index, a_k)
            for a_row, row_sums in zip(a_rows, sums, strict=True):
                x = builder.load(builder.gep(a_row, [offset]))
                x = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
                x = builder.shuffle_vector(x, undefined, first_lane)
                for factor, total in zip(factors, row_sums, strict=True):
                    term = builder.fmul(x, factor, flags=("contract",))
                    term = builder.fadd(builder.load(total), term, flags=("contract",))
                    builder.store(term, total)
        with builder.if_then(values[11]):
            for c_row, row_sums in zip(c_rows, sums, strict=True):
                for at, total in zip(vectors(c_row), row_sums, strict=True):
                    x = builder.load(at, align=align)
                    builder.store(builder.fadd(builder.load(total), x), total)
        for c_row, row_sums in zip(c_rows, sums, strict=True):
            for at, total in zip(vectors(c_row), row_sums, strict=True):
                builder.store(builder.load(total), at, align=align)
        return context.get_dummy_value()

    arguments = (a, index, index, index, b, index, index, c, index, index, index, types.boolean)
    return types.void(*arguments), generate


@kernel
def product(a, a_0, a_i, a_k, b, b_0, b_k, c, c_0, c_i, shape, add):
    """c[i, j] = Σ_k a[i, k]·b[k, j], or += where `add`, with shape = (i, j, k).

    Arrays are C-contiguous and addressed by an offset and a stride for each index but the last,
    which for b and c is 1. c is written, and a and b read, up to the next multiple of ROWS in i
    and of COLUMNS in j: there must be room, of any content. The order of summation is that of k.
    """
    rows, columns, size = shape
    for j in range(0, columns, _VECTORS * _VECTOR_BYTES // c.itemsize):
        for i in range(0, rows, ROWS):
            c_at = c_0 + i * c_i + j
            _tile(a, a_0 + i * a_i, a_i, a_k, b, b_0 + j, b_k, c, c_at, c_i, size, add)  # type: ignore[call-arg]
