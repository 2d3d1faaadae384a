"""Scalar mathematics shared by the CPU and the CUDA kernels.

Each function takes and returns scalars, compiles under Numba for either target and also runs as
plain Python. Every literal is cast: Numba promotes ``uint64`` with ``int64`` to ``float64``.
"""

import numpy as np
from numba.extending import register_jitable

u64, i64, f64 = np.uint64, np.int64, np.float64
i32, f32 = np.int32, np.float32

# Products and sums fuse, as CUDA's compiler has it by default: half the time of a polynomial. A
# division that may raise is a branch, and no loop around it vectorises.
jitable = register_jitable(fastmath={"contract"}, error_model="numpy", forceinline=True)

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
def expm1_reduced(f):
    """e**f − 1 for |f| <= log(2)/2: its Chebyshev interpolant, within 2e-17 of it, times f."""
    s = f64(2.510520638458724e-08)
    s = s * f + f64(2.762635725527078e-07)
    s = s * f + f64(2.7557255425720897e-06)
    s = s * f + f64(2.480150434696448e-05)
    s = s * f + f64(0.00019841269874800512)
    s = s * f + f64(0.0013888888932488625)
    s = s * f + f64(0.008333333333326141)
    s = s * f + f64(0.04166666666657314)
    s = s * f + f64(0.1666666666666667)
    s = s * f + f64(0.5000000000000006)
    s = s * f + f64(1.0)
    return s * f


@jitable
def exp2_nonnegative(x):
    """2**x for 0 <= x < 62, to two units in the last place: 2**n · e**f, n the nearest integer.

    n is added to the exponent's bits, so that the same operations run on every target.
    """
    n = i64(x + f64(0.5))
    f = (x - f64(n)) * f64(0.6931471805599453)
    bits = f64(expm1_reduced(f) + f64(1.0)).view(i64)
    return i64(bits + (n << i64(52))).view(f64)


@jitable
def _power_and_rest(x):
    """2**n and e**f − 1 with x = n·log(2) + f, |f| <= log(2)/2, for |x| <= 700."""
    n = i64(x * f64(1.4426950408889634) + f64(1024.5)) - i64(1024)
    # log(2) in two parts: n times the first is exact.
    f = (x - f64(n) * f64(6.93147180369123816490e-01)) - f64(n) * f64(1.90821492927058770002e-10)
    return i64((n + i64(1023)) << i64(52)).view(f64), expm1_reduced(f)


@jitable
def exp(x):
    """e**x for |x| <= 700, to two units in the last place."""
    power, rest = _power_and_rest(x)
    return power * rest + power


@jitable
def expm1(x):
    """e**x − 1 for |x| <= 700, to three units in the last place."""
    power, rest = _power_and_rest(x)
    return power * rest + (power - f64(1.0))


@jitable
def log(x):
    """log(x) of a positive normal number, to one unit in the last place.

    x = 2**n·(1 + f) with 1 + f in [√½, √2), and log(1 + f) = 2·artanh(f/(2 + f)): fdlibm's e_log.c.
    """
    bits = f64(x).view(i64)
    n = (bits - i64(0x3FE6A09E667F3BCD)) >> i64(52)
    f = i64(bits - (n << i64(52))).view(f64) - f64(1.0)
    s = f / (f64(2.0) + f)
    z = s * s
    r = f64(1.479819860511658591e-01)
    r = r * z + f64(1.531383769920937332e-01)
    r = r * z + f64(1.818357216161805012e-01)
    r = r * z + f64(2.222219843214978396e-01)
    r = r * z + f64(2.857142874366239149e-01)
    r = r * z + f64(3.999999999940941908e-01)
    r = r * z + f64(6.666666666666735130e-01)
    half = f64(0.5) * f * f
    low = s * (half + r * z) + f64(n) * f64(1.90821492927058770002e-10)
    return f64(n) * f64(6.93147180369123816490e-01) - ((half - low) - f)


@jitable
def log1p(x):
    """log(1 + x) for x > −1, to two units in the last place: what 1 + x rounds off is put back."""
    u = f64(1.0) + x
    return log(u) + (x - (u - f64(1.0))) / u


@jitable
def exp_float32(x):
    """e**x in float32 for x < 88, to about one unit in the last place; 0 below −87; vectorises.

    e**x = 2**n · e**f with n the integer next to x/log(2). Adding and taking away 1.5·2**23 rounds
    to it, and log(2) in two parts keeps the digits of f. e**f = 1 + f + f²·p(f), |f| <= log(2)/2:
    p interpolates at Chebyshev's points, with a relative error of 1.1e-8.
    """
    inside = f32(-87.0) if x < f32(-87.0) else x  # where 2**n is a normal number; NaN stays
    n = (inside * f32(1.4426950408889634) + f32(12582912.0)) - f32(12582912.0)
    f = inside - n * f32(0.693359375)
    f = f - n * f32(-2.12194440e-4)
    p = f32(0.0013926213466221367)
    p = p * f + f32(0.008363202971574273)
    p = p * f + f32(0.04166655443768698)
    p = p * f + f32(0.16666576845993994)
    p = p * f + f32(0.5)
    p = p * f * f + f + f32(1.0)
    power = i32((i32(n) + i32(127)) << i32(23)).view(f32)
    return f32(0.0) if x < f32(-87.0) else p * power


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


# The ranks of a Zipf-Mandelbrot law that are summed one by one.
HEAD = 64


@jitable
def zipf_mandelbrot_tail(u, num_items, head, exponent, offset, scale, lead):
    """Inverse of P(k) ∝ (k + offset)**−exponent where k ≥ HEAD; for smaller u, HEAD.

    Σ_{j ≤ k} f(j) is ∫ f up to y = k + 1/2 + offset, less f′/24 and smaller terms (the midpoint
    rule's Euler-Maclaurin sum). With x where the tail starts, the integral is
    x·f(x)·expm1(e·log(y/x))/e, e = 1 − exponent, and is inverted exactly; f′/24 then moves y by
    exponent/(24·y). `scale` is the sum over all ids in units of x·f(x), `lead` the small terms at x
    in the same unit.
    """
    x = f64(HEAD) - f64(0.5) + offset
    e = f64(1.0) - exponent
    log_ratio = max(u - head[HEAD - 1], f64(0.0)) * scale + lead
    if e != f64(0.0):
        log_ratio = log1p(max(e * log_ratio, f64(-1.0 + 2.0**-53))) / e
    y = min(x + x * expm1(min(log_ratio, f64(700.0))), f64(num_items) + offset)
    y -= exponent / (f64(24.0) * y)
    return max(i64(HEAD), min(i64(y - offset + f64(0.5)), num_items - i64(1)))


@jitable
def zipf_mandelbrot_head(u, in_tail, head):
    """The first k with u ≤ head[k], where there is one, by search; else the rank in the tail.

    `head` holds the first HEAD cumulative probabilities, 1 where there are no more ids.
    """
    k = u64(0)
    for half in (u64(32), u64(16), u64(8), u64(4), u64(2), u64(1)):
        k += half * u64(head[k + half - u64(1)] < u)  # a branch could not be predicted
    return in_tail + (i64(k) - in_tail) * i64(u <= head[HEAD - 1])


@jitable
def zipf_mandelbrot_rank(u, num_items, head, exponent, offset, scale, lead):
    """Inverse of P(k) ∝ (k + offset)**−exponent, from its two parts."""
    in_tail = zipf_mandelbrot_tail(u, num_items, head, exponent, offset, scale, lead)
    return zipf_mandelbrot_head(u, in_tail, head)


@jitable
def alias_rank(u, num_items, threshold, alias):
    """Walker's alias method: one uniform gives the column and, by its remainder, the side."""
    x = u * f64(num_items)
    column = min(i64(x), num_items - i64(1))
    if x - f64(column) < threshold[column]:
        return column
    return i64(alias[column])


@jitable
def log_uniform_log_prob(rank, log_total):
    """log P(k) = log(log1p(1/(k + 1))) − log_total, with log_total = log(log1p(N))."""
    return log(log1p(f64(1.0) / (rank + f64(1.0)))) - log_total


@jitable
def uniform_log_prob(rank, log_total):
    """log P(k) = −log(N)."""
    return -log_total


@jitable
def zipf_mandelbrot_log_prob(rank, exponent, offset, log_total):
    """log P(k) = −exponent·log((k + offset)/offset) − log_total, f being 1 at rank 0."""
    return -exponent * log1p(rank / offset) - log_total


@jitable
def table_log_prob(rank, prob):
    """log of a table's entry, −inf where it is 0."""
    p = prob[u64(rank)]
    tiny = p < f64(2.0**-1000)  # perhaps not a normal number
    log_p = log(max(p * f64(2.0**60) if tiny else p, f64(2.0**-1022)))
    log_p -= f64(60 * 0.6931471805599453) if tiny else f64(0.0)
    return log_p if p > f64(0.0) else f64(-np.inf)


@jitable
def log_inclusion(log_prob, time):
    """log(1 − e^(−p·t)) for a finite time t; log(p·t) where p is too small to tell."""
    p = exp(max(log_prob, f64(-700.0)))
    log_q = log(-expm1(-min(p * time, f64(40.0))))
    return log_q if log_prob > f64(-700.0) else min(log_prob + log(time), f64(0.0))


@jitable
def decay(x):
    """e^(−|x|), 0 beyond 700."""
    size = abs(f64(x))
    e = exp(-size if size < f64(700.0) else f64(-700.0))
    # NaN is neither near nor far.
    return e if size < f64(700.0) else f64(0.0) if size >= f64(700.0) else size


@jitable
def softplus(x):
    """log(1 + e^x), without overflow."""
    return max(f64(x), f64(0.0)) + log1p(decay(x))


@jitable
def sigmoid(x):
    """1/(1 + e^(−x)), accurate in both tails: 1 − σ(x) is σ(−x)."""
    e = decay(x)
    return (f64(1.0) if x >= f64(0.0) else e) / (f64(1.0) + e)


@jitable
def d_sigmoid(x):
    """dσ/dx = σ(x)·σ(−x)"""
    e = decay(x)
    return e / ((f64(1.0) + e) * (f64(1.0) + e))
