"""Scalar mathematics shared by the CPU and the CUDA kernels.

Each function takes and returns scalars, compiles under Numba for either target and also runs as
plain Python. Every literal is cast: Numba promotes ``uint64`` with ``int64`` to ``float64``.
"""

import math

import numpy as np
from numba.extending import register_jitable

u64, i64, f64 = np.uint64, np.int64, np.float64

# Products and sums fuse, as CUDA's compiler has it by default: half the time of a polynomial.
jitable = register_jitable(fastmath={"contract"})

# Draws are dealt out in groups of LANES consecutive counters, so that a CUDA warp computes one
# counter a lane and still writes whole cache lines.
LANES = 32


# Philox works on 32-bit words. Here they are the lower halves of 64-bit ones, whose upper halves
# hold anything: a 64-bit lane is what vector units multiply, and only results need a mask.
LOW = u64(0xFFFFFFFF)


@jitable
def philox_five_rounds(c0, c1, c2, c3, k0, k1):
    """Half of Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3).

    The second half is the same function on the result, with the key advanced by
    `philox_advance_key`. Five rounds in one expression are what the compiler still vectorises.
    """
    for _ in range(5):
        p0 = u64(0xD2511F53) * (c0 & LOW)
        p1 = u64(0xCD9E8D57) * (c2 & LOW)
        c0, c1, c2, c3 = (p1 >> u64(32)) ^ c1 ^ k0, p1, (p0 >> u64(32)) ^ c3 ^ k1, p0
        k0 += u64(0x9E3779B9)
        k1 += u64(0xBB67AE85)
    return c0, c1, c2, c3


@jitable
def philox_advance_key(k0, k1):
    """The key of round 5, given that of round 0."""
    return k0 + u64(5 * 0x9E3779B9), k1 + u64(5 * 0xBB67AE85)


@jitable
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four 32-bit words, each a uint64, of a counter under the key (k0, k1)."""
    c0, c1, c2, c3 = philox_five_rounds(c0, c1, c2, c3, k0, k1)
    k0, k1 = philox_advance_key(k0, k1)
    c0, c1, c2, c3 = philox_five_rounds(c0, c1, c2, c3, k0, k1)
    return c0 & LOW, c1 & LOW, c2 & LOW, c3 & LOW


@jitable
def uniform_53(high, low):
    """The centre of one of 2**52 equal cells of (0, 1): exact, so never 0 and never 1."""
    return (f64(((high << u64(32)) | (low & LOW)) >> u64(12)) + f64(0.5)) * f64(2.0**-52)


@jitable
def exp2_nonnegative(x):
    """2**x for 0 <= x < 62, to about one unit in the last place; vectorises, unlike libm's.

    2**x = 2**n · √2 · e**f with n = floor(x) and |f| <= log(2)/2; e**f by its Taylor series, whose
    first omitted term is below 5e-18. The integer power is a shift, so that the same operations
    run on every target.
    """
    n = i64(x)
    f = (x - f64(n) - f64(0.5)) * f64(0.6931471805599453)
    s = f64(1.0 / 6227020800.0)
    s = s * f + f64(1.0 / 479001600.0)
    s = s * f + f64(1.0 / 39916800.0)
    s = s * f + f64(1.0 / 3628800.0)
    s = s * f + f64(1.0 / 362880.0)
    s = s * f + f64(1.0 / 40320.0)
    s = s * f + f64(1.0 / 5040.0)
    s = s * f + f64(1.0 / 720.0)
    s = s * f + f64(1.0 / 120.0)
    s = s * f + f64(1.0 / 24.0)
    s = s * f + f64(1.0 / 6.0)
    s = s * f + f64(0.5)
    s = s * f + f64(1.0)
    s = s * f + f64(1.0)
    return f64(i64(1) << n) * (s * f64(1.4142135623730951))


@jitable
def log_uniform_rank(u, log2_total, num_items):
    """Inverse of the log-uniform law: floor((N + 1)**u) − 1, with log2_total = log2(N + 1)."""
    rank = i64(exp2_nonnegative(u * log2_total)) - i64(1)
    # (N + 1)**u can round up to N + 1 when u is the last cell.
    return max(i64(0), min(rank, num_items - i64(1)))


@jitable
def uniform_rank(u, num_items):
    """Inverse of the uniform law: floor(N·u)."""
    return min(i64(u * f64(num_items)), num_items - i64(1))


@jitable
def zipf_mandelbrot_rank(u, num_items, head, exponent, offset, scale, lead):
    """Inverse of P(k) ∝ (k + offset)**−exponent: the head by search, the rest in closed form.

    `head` holds the first cumulative probabilities. Behind it, Σ_{j ≤ k} f(j) is ∫ f up to
    y = k + 1/2 + offset, less f′/24 and smaller terms (the midpoint rule's Euler-Maclaurin sum).
    With x where the tail starts, the integral is x·f(x)·expm1(e·log(y/x))/e, e = 1 − exponent, and
    is inverted exactly; f′/24 then moves y by exponent/(24·y). `scale` is the sum over all ids in
    units of x·f(x), `lead` the small terms at x in the same unit.
    """
    last = head.size - 1
    if u <= head[last]:
        low, high = 0, last
        while low < high:
            middle = (low + high) // 2
            if head[middle] < u:
                low = middle + 1
            else:
                high = middle
        return i64(low)
    x = f64(head.size) - f64(0.5) + offset
    e = f64(1.0) - exponent
    log_ratio = (u - head[last]) * scale + lead
    if e != f64(0.0):
        log_ratio = math.log1p(max(e * log_ratio, f64(-1.0 + 2.0**-53))) / e
    y = min(x * math.exp(min(log_ratio, f64(700.0))), f64(num_items) + offset)
    y -= exponent / (f64(24.0) * y)
    rank = i64(math.floor(y - offset + f64(0.5)))
    return max(i64(head.size), min(rank, num_items - i64(1)))


@jitable
def alias_rank(u, num_items, threshold, alias):
    """Walker's alias method: one uniform gives the column and, by its remainder, the side."""
    x = u * f64(num_items)
    column = min(i64(x), num_items - i64(1))
    if x - f64(column) < threshold[column]:
        return column
    return i64(alias[column])
