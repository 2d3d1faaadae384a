from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from zipfneg import scalar
from zipfneg.cpu import sampling as kernels
from zipfneg.popularity import stream_words, uniforms
from zipfneg.scalar import f64, i64, u64

quietly = settings(derandomize=True, deadline=None, max_examples=50)
words32 = st.integers(0, 2**32 - 1)


@njit
def compiled_philox(c0, c1, c2, c3, k0, k1):
    return scalar.philox(c0, c1, c2, c3, k0, k1)


@njit
def compiled_exp2(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = scalar.exp2_nonnegative(x[i])
    return out


@njit
def compiled_log_uniform_rank(u, log2_total, num_items):
    out = np.empty(u.size, np.int64)
    for i in range(u.size):
        out[i] = scalar.log_uniform_rank(u[i], log2_total, num_items)
    return out


@njit
def compiled_uniform_rank(u, num_items):
    out = np.empty(u.size, np.int64)
    for i in range(u.size):
        out[i] = scalar.uniform_rank(u[i], num_items)
    return out


@njit
def compiled_alias_rank(u, num_items, threshold, alias):
    out = np.empty(u.size, np.int64)
    for i in range(u.size):
        out[i] = scalar.alias_rank(u[i], num_items, threshold, alias)
    return out


# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_in_integers(counter, key):
    """Philox4x32-10 as published, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + WEYL[0]) % 2**32, (k1 + WEYL[1]) % 2**32
    return c0, c1, c2, c3


def philox_inverse(words, key):
    """The counter that gives `words`."""
    c0, c1, c2, c3 = words
    for r in reversed(range(10)):
        k0, k1 = ((key[i] + r * WEYL[i]) % 2**32 for i in range(2))
        b0 = c3 * pow(MULTIPLIERS[0], -1, 2**32) % 2**32
        b2 = c1 * pow(MULTIPLIERS[1], -1, 2**32) % 2**32
        b1 = c0 ^ k0 ^ (MULTIPLIERS[1] * b2 >> 32)
        b3 = c2 ^ k1 ^ (MULTIPLIERS[0] * b0 >> 32)
        c0, c1, c2, c3 = b0, b1, b2, b3
    return c0, c1, c2, c3


def uniform_in_integers(index, seed, step, stream):
    """Uniform `index` of a stream, as a fraction: which counter, which two words, which bits."""
    group, within = divmod(index, 64)
    half, lane = divmod(within, 32)
    counter = 32 * group + lane
    words = philox_in_integers(
        (counter % 2**32, counter >> 32, step, stream), (seed % 2**32, seed >> 32)
    )
    cell = (words[2 * half] << 32 | words[2 * half + 1]) >> 12
    return Fraction(2 * cell + 1, 2**53)


# By hand


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [scalar.philox, compiled_philox], ids=["python", "compiled"])
def test_philox_known_answers(philox, counter, key, words):
    assert tuple(map(int, philox(*map(u64, counter), *map(u64, key)))) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_kernel_words_known_answers(counter, key, words):
    c0, c1, step, stream = counter
    out = np.empty((4, kernels.COUNTERS), np.uint64)
    first = np.array(c1 << 32 | c0, np.uint64).astype(np.int64)
    kernels._fill_words(out, int(first), *map(u64, key), u64(step), u64(stream))
    assert tuple((out[:, 0] & scalar.LOW).tolist()) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_integer_philox_known_answers(counter, key, words):
    assert philox_in_integers(counter, key) == words


def test_uniform_53_ends():
    ones = u64(0xFFFFFFFF)
    assert scalar.uniform_53(u64(0), u64(0)) == 2.0**-53
    assert scalar.uniform_53(ones, ones) == 1 - 2.0**-53
    # The lowest 12 bits are not used.
    assert scalar.uniform_53(u64(0x80000000), u64(0xFFF)) == 0.5 + 2.0**-53


def test_exp2_by_hand():
    assert [float(scalar.exp2_nonnegative(f64(x))) for x in (1, 3.5, 40)] == pytest.approx(
        [2, 8 * 2**0.5, 2.0**40], rel=5e-16
    )


def test_log_uniform_rank_by_hand():
    # With N = 3: 4**u is below 2 for u < 1/2 and below 3 for u < log(3)/log(4) = 0.792.
    ranks = compiled_log_uniform_rank(np.array([0.1, 0.49, 0.51, 0.79, 0.8, 0.99]), 2.0, 3)
    assert ranks.tolist() == [0, 0, 1, 1, 2, 2]


def test_alias_rank_by_hand():
    # Column 0 keeps a quarter of itself and gives the rest to 1.
    threshold, alias = np.array([0.25, 1.0]), np.array([1, 1], np.int32)
    ranks = compiled_alias_rank(np.array([0.05, 0.12, 0.13, 0.49, 0.51]), 2, threshold, alias)
    assert ranks.tolist() == [0, 0, 1, 1, 1]


# Against a statement of their own


@pytest.mark.parametrize(
    ("seed", "step", "stream"), [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (7 << 32 | 3, 5, 9)]
)
def test_uniforms_follow_the_documented_order(seed, step, stream):
    size = 2 * kernels.TILE + 77
    expected = [uniform_in_integers(i, seed, step, stream) for i in range(size)]
    got = uniforms(size, stream_words(seed, step, stream))
    assert [Fraction(u) for u in got.tolist()] == expected


def test_counters_carry_into_their_second_word():
    # A tile whose counters cross 2**32.
    tile = 2**32 // kernels.COUNTERS
    u = np.empty((2, kernels.TILE))
    words = np.empty((4, kernels.COUNTERS), np.uint64)
    for row in range(2):
        kernels._fill_uniforms(u[row], words, tile - 1 + row, *stream_words(11, 12, 13))
    u = u.ravel()
    first = (tile - 1) * kernels.TILE
    for i in (0, 63, kernels.TILE - 1, kernels.TILE, kernels.TILE + 40, u.size - 1):
        assert Fraction(u[i]) == uniform_in_integers(first + i, 11, 12, 13)


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
def test_exp2_within_two_units_in_the_last_place(compiled):
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [rng.uniform(0, 40, 1500), np.arange(41.0), np.nextafter(np.arange(1, 41.0), 0)]
    )
    got = compiled_exp2(x) if compiled else [scalar.exp2_nonnegative(v) for v in x]
    with localcontext() as context:
        context.prec = 40
        for value, power in zip(x.tolist(), map(float, got), strict=True):
            error = abs(Decimal(power) - Decimal(2) ** Decimal(value))
            assert error < 2 * Decimal(float(np.spacing(power)))


def everywhere(low, high):
    """Numbers of either sign, as there are, from `low` to `high`: large, small and in between."""
    rng = np.random.default_rng(2)
    sizes = np.exp(rng.uniform(-40, np.log(max(-low, high)), 4000))
    x = np.concatenate([sizes, -sizes, rng.uniform(low, high, 2000), [low, high]])
    return x[(x >= low) & (x <= high)]


@pytest.mark.parametrize(
    ("name", "x", "units"),
    [
        ("exp", everywhere(-700, 700), 2),
        ("expm1", everywhere(-700, 700), 3),
        ("log", np.exp(np.linspace(-700, 700, 4001)), 1),
        ("log", everywhere(0.5, 2), 1),
        ("log1p", everywhere(-1 + 2.0**-53, 1e300), 2),
        ("log1p", everywhere(-0.9, 0.9), 2),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
def test_elementary_functions_to_the_last_places(name, x, units, compiled):
    function = getattr(scalar, name)
    if compiled:
        got = njit(lambda x: np.array([function(v) for v in x]))(x)
    else:
        got = np.array([function(v) for v in x])
    exact = getattr(np, name)(x.astype(np.longdouble))
    error = np.abs(got - exact) / np.spacing(np.abs(got))
    assert error.max() < units
    assert np.finfo(np.longdouble).nmant > 60  # else this compares with float64 itself


@njit
def compiled_exp_float32(x):
    out = np.empty_like(x)
    for i in range(x.size):  # which the compiler makes vectors of
        out[i] = scalar.exp_float32(x[i])
    return out


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
def test_exp_in_float32_to_the_last_place(compiled):
    def function(x):
        return compiled_exp_float32(x) if compiled else np.array([scalar.exp_float32(v) for v in x])

    x = np.concatenate([everywhere(-87, 0.0), everywhere(-1, 80)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(function(x) - exact) / np.spacing(exact.astype(np.float32))).max() < 1
    with np.errstate(invalid="ignore"):
        edges = function(np.array([0, -0.0, -87.01, -1e30, -np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(edges, [1, 1, 0, 0, 0, np.nan])


def test_log_inclusion_against_its_equation():
    log_p = np.concatenate([-np.logspace(-3, 2.8, 400), [-703.0, -np.inf]]).astype(np.longdouble)
    for time in (1.0, 300.0, 1e15, 1e200):
        expected = np.log(-np.expm1(-np.exp(log_p[:-1]) * np.longdouble(time)))
        got = [scalar.log_inclusion(f64(x), f64(time)) for x in log_p]
        assert got[:-1] == pytest.approx(expected.astype(np.float64), rel=1e-13, abs=2e-15)
        assert got[-1] == -np.inf


EXACT = {
    "decay": lambda x: np.exp(-np.abs(x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "d_sigmoid": lambda x: 1 / (2 + np.exp(-x) + np.exp(x)),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
def test_logistic_functions_in_both_tails(name, compiled):
    function = getattr(scalar, name)
    of_array = njit(lambda x: np.array([function(v) for v in x])) if compiled else None
    x = everywhere(-699, 699)
    got = of_array(x) if compiled else np.array([function(v) for v in x])
    np.testing.assert_allclose(got, EXACT[name](x.astype(np.longdouble)), rtol=1e-15)
    ends = np.array([-np.inf, -1e300, 1e300, np.inf, np.nan])
    expected = {
        "decay": [0, 0, 0, 0, np.nan],
        "softplus": [0, 0, 1e300, np.inf, np.nan],
        "sigmoid": [0, 0, 1, 1, np.nan],
        "d_sigmoid": [0, 0, 0, 0, np.nan],
    }[name]
    with np.errstate(invalid="ignore", over="ignore"):
        got = of_array(ends) if compiled else np.array([function(v) for v in ends])
    np.testing.assert_array_equal(got, expected)


def test_a_table_of_tiny_probabilities():
    prob = np.array([1.0, 0.3, 2.0**-1000, 2.0**-1050, 5e-324, 0.0])
    with np.errstate(divide="ignore"):
        expected = np.log(prob.astype(np.longdouble)).astype(np.float64)
    got = [scalar.table_log_prob(f64(k), prob) for k in range(len(prob))]
    assert got == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("num_items", [1, 2, 5, 1000, 10**6, 10**9])
def test_log_uniform_rank_against_decimal(num_items):
    u = np.random.default_rng(num_items).uniform(0, 1, 400)
    got = compiled_log_uniform_rank(u, float(np.log2(num_items + 1.0)), num_items)
    with localcontext() as context:
        context.prec = 40
        expected = [int(Decimal(num_items + 1) ** Decimal(v)) - 1 for v in u.tolist()]
    assert got.tolist() == expected


# Invariants


@quietly
@given(counter=st.tuples(*[words32] * 4), key=st.tuples(*[words32] * 2))
def test_philox_is_a_bijection_of_its_counter(counter, key):
    # So no two counters of one key give the same four words.
    words = tuple(map(int, compiled_philox(*map(u64, counter), *map(u64, key))))
    assert words == philox_in_integers(counter, key)
    assert philox_inverse(words, key) == counter


@quietly
@given(seed=st.integers(0, 2**64 - 1), step=words32, stream=words32)
def test_seed_step_and_stream_are_recovered_from_the_words(seed, step, stream):
    # Key and upper half of the counter tell streams apart, whatever the index: counters of
    # different streams are disjoint.
    k0, k1, c2, c3 = map(int, stream_words(seed, step, stream))
    assert (k0 | k1 << 32, c2, c3) == (seed, step, stream)


@quietly
@given(high=words32, low=words32)
def test_uniform_53_is_exact(high, low):
    cell = (high << 32 | low) >> 12
    assert Fraction(float(scalar.uniform_53(u64(high), u64(low)))) == Fraction(2 * cell + 1, 2**53)


@quietly
@given(seed=st.integers(0, 2**64 - 1), step=words32, stream=words32)
def test_uniforms_do_not_repeat(seed, step, stream):
    u = uniforms(4096, stream_words(seed, step, stream))
    assert len(np.unique(u)) == u.size
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("num_items", [1, 2, 3, 7, 2**20 - 1, 10**9, 2**31, 2**40])
def test_inverses_stay_inside_for_the_extreme_uniforms(num_items):
    u = np.array([2.0**-53, 1 - 2.0**-53])
    log2_total = float(np.log2(num_items + 1.0))
    assert compiled_log_uniform_rank(u, log2_total, num_items).tolist() == [0, num_items - 1]
    assert compiled_uniform_rank(u, num_items).tolist() == [0, num_items - 1]


@quietly
@given(
    num_items=st.integers(1, 2**40),
    u=st.lists(st.floats(2.0**-53, 1 - 2.0**-53), min_size=2, max_size=50),
)
def test_inverses_rise_with_the_uniform(num_items, u):
    u = np.sort(u)
    ranks = compiled_log_uniform_rank(u, float(np.log2(num_items + 1.0)), num_items)
    assert (np.diff(ranks) >= 0).all()
    assert (np.diff(compiled_uniform_rank(u, num_items)) >= 0).all()


def log_uniform(u, num_items):
    return compiled_log_uniform_rank(u, float(np.log2(num_items + 1.0)), num_items)


def log_uniform_float32(u, num_items):
    total = np.float32(num_items + 1)
    ranks = np.power(total, u.astype(np.float32)).astype(np.int64) - 1
    return np.clip(ranks, 0, num_items - 1)


def log_uniform_one_short(u, num_items):
    return compiled_log_uniform_rank(u, float(np.log2(num_items)), num_items - 1)


def uniform_float32(u, num_items):
    ranks = (u.astype(np.float32) * np.float32(num_items)).astype(np.int64)
    return np.minimum(ranks, num_items - 1)


def uniform_one_short(u, num_items):
    return compiled_uniform_rank(u, num_items - 1)


def fits_the_grid(inverse, prob, num_points):
    """Whether each rank's share of a regular grid is within one point of its probability."""
    u = (np.arange(num_points) + 0.5) / num_points
    counts = np.bincount(inverse(u, len(prob)), minlength=len(prob))
    return len(counts) == len(prob) and bool((abs(counts - num_points * prob) < 1 + 1e-6).all())


# A wrong inverse shows where it moves an id's count by more than a point: a range one short loses
# the last id, float32 blurs the boundaries of a long tail.
@pytest.mark.parametrize(
    ("num_items", "num_points", "wrong"),
    [
        (1, 10, None),
        (997, 10**6, log_uniform_one_short),
        (20011, 10**6, log_uniform_one_short),
        (10**6, 6 * 10**6, log_uniform_float32),
    ],
)
def test_log_uniform_on_a_regular_grid(num_items, num_points, wrong):
    k = np.arange(num_items, dtype=np.longdouble)
    prob = (np.log1p(1 / (k + 1)) / np.log1p(np.longdouble(num_items))).astype(np.float64)
    assert fits_the_grid(log_uniform, prob, num_points)
    assert wrong is None or not fits_the_grid(wrong, prob, num_points)


@pytest.mark.parametrize(
    ("num_items", "num_points", "wrong"),
    [
        (1, 10, None),
        (997, 10**6, uniform_one_short),
        (10**6, 3999971, uniform_one_short),
        (10**6, 3999971, uniform_float32),
    ],
)
def test_uniform_on_a_regular_grid(num_items, num_points, wrong):
    prob = np.full(num_items, 1 / num_items)
    assert fits_the_grid(compiled_uniform_rank, prob, num_points)
    assert wrong is None or not fits_the_grid(wrong, prob, num_points)


# Types


def test_words_and_ranks_keep_their_types():
    # uint64 with int64 would silently be a float.
    assert all(type(w) is u64 for w in scalar.philox(*[u64(1)] * 6))
    assert type(scalar.log_uniform_rank(f64(0.5), f64(2), i64(3))) is i64
    assert type(scalar.uniform_rank(f64(0.5), i64(3))) is i64
    assert type(scalar.uniform_53(u64(1), u64(2))) is f64
