import math
import tracemalloc
from decimal import Decimal, localcontext

import goodness_of_fit as fit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from zipfneg import Empirical, LogUniform, Uniform, ZipfMandelbrot, reference
from zipfneg.popularity import MAX_ITEMS, stream_words, uniforms

quietly = settings(derandomize=True, deadline=None, max_examples=40)
words32 = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)


def some_counts(num_items):
    """Unsorted, some of them zero."""
    counts = np.random.default_rng(num_items).geometric(0.02, num_items) - 1
    counts[num_items // 2] += 1
    return counts


LAWS = [
    LogUniform(1),
    LogUniform(7, first_id=1),
    LogUniform(1009, first_id=3),
    Uniform(1),
    Uniform(31, first_id=2),
    Uniform(1009),
    ZipfMandelbrot(1, 1.0),
    ZipfMandelbrot(1009, 1.0, first_id=3),
    ZipfMandelbrot(1009, 0.7, 2.5),
    Empirical([3]),
    Empirical([0, 5, 0, 1e-9, 2, 0], first_id=4),
    Empirical(some_counts(1009), power=0.75),
]
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)


def all_ids(law):
    return np.arange(law.first_id, law.first_id + law.num_items)


def laws(max_items=200):
    """Any law, as a hypothesis strategy."""
    first_id = st.integers(0, 2**33)
    return st.one_of(
        st.builds(LogUniform, st.integers(1, MAX_ITEMS), first_id=first_id),
        st.builds(Uniform, st.integers(1, MAX_ITEMS), first_id=first_id),
        st.builds(
            ZipfMandelbrot,
            st.integers(1, MAX_ITEMS),
            st.floats(0, 2),
            st.floats(-0.9, 100),
            first_id=first_id,
        ),
        st.builds(
            Empirical,
            st.lists(st.integers(0, 10**9), min_size=1, max_size=max_items).filter(any),
            power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            first_id=first_id,
        ),
    )


# By hand


def test_log_uniform_by_hand():
    law = LogUniform(3, first_id=5)
    # (log 2, log 3/2, log 4/3) / log 4
    assert np.exp(law.log_prob([5, 6, 7])) == pytest.approx(
        [0.5, math.log(1.5) / math.log(4), math.log(4 / 3) / math.log(4)], rel=1e-15
    )
    assert law.cdf([4, 5, 6, 7, 8]) == pytest.approx([0, 0.5, math.log(3, 4), 1, 1], rel=1e-15)
    assert law.ppf([0, 0.4, 0.5, 0.51, 0.79, 0.8, 1]).tolist() == [5, 5, 5, 6, 6, 7, 7]


def test_uniform_by_hand():
    law = Uniform(4, first_id=10)
    assert np.exp(law.log_prob([9, 10, 13, 14])) == pytest.approx([0, 0.25, 0.25, 0], rel=1e-15)
    assert law.cdf([9, 10, 11, 13, 14]).tolist() == [0, 0.25, 0.5, 1, 1]
    assert law.ppf([0, 0.25, 0.26, 1]).tolist() == [10, 10, 11, 13]


def test_empirical_by_hand():
    law = Empirical([4, 0, 1], first_id=1)
    assert np.exp(law.log_prob([0, 1, 2, 3, 4])) == pytest.approx([0, 0.8, 0, 0.2, 0], rel=1e-15)
    assert law.cdf([0, 1, 2, 3, 4]) == pytest.approx([0, 0.8, 0.8, 1, 1], rel=1e-15)
    assert law.ppf([0.79, 0.81]).tolist() == [1, 3]
    # 4**½ : 1
    assert np.exp(Empirical([4, 0, 1], power=0.5).log_prob([0, 1, 2])) == pytest.approx(
        [2 / 3, 0, 1 / 3], rel=1e-15
    )
    assert np.exp(Empirical([4, 0, 1], power=0).log_prob([0, 1, 2])).tolist() == pytest.approx(
        [0.5, 0, 0.5], rel=1e-15
    )


def test_draws_follow_their_uniforms_by_hand():
    u = uniforms(1000, stream_words(7, 1, 2))
    assert (LogUniform(9, first_id=2).draw(1000, seed=7, step=1, stream=2) == 10**u // 1 + 1).all()
    assert (Uniform(9, first_id=2).draw(1000, seed=7, step=1, stream=2) == 9 * u // 1 + 2).all()


def test_zipf_mandelbrot_by_hand():
    law = ZipfMandelbrot(3, 2, shift=1, first_id=4)
    # 1/4, 1/9, 1/16
    weights = np.array([36, 16, 9]) / 61
    assert np.exp(law.log_prob([3, 4, 5, 6, 7])) == pytest.approx([0, *weights, 0], rel=1e-15)
    assert law.cdf([3, 4, 5, 6, 7]) == pytest.approx([0, 36 / 61, 52 / 61, 1, 1], rel=1e-15)
    assert law.ppf([0, 0.59, 0.6, 0.86, 1]).tolist() == [4, 4, 5, 6, 6]


# Against SciPy, the reference and exact arithmetic


@pytest.mark.parametrize("num_items", [1, 2, 7, 1009, 4097])
def test_log_uniform_against_the_reference(num_items):
    log_prob = LogUniform(num_items).log_prob(np.arange(num_items))
    assert log_prob == pytest.approx(np.log(reference.log_uniform_prob(num_items)), rel=1e-14)


@pytest.mark.parametrize("num_items", [1, 63, 64, 65, 1009])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.0000001, 2.5, 30.0])
def test_zipf_mandelbrot_against_scipy(num_items, exponent):
    law, ids = ZipfMandelbrot(num_items, exponent, first_id=1), np.arange(1, num_items + 1)
    if exponent:
        expected = stats.zipfian(exponent, num_items)
        assert law.log_prob(ids) == pytest.approx(expected.logpmf(ids), rel=1e-12, abs=1e-13)
        assert law.cdf(ids) == pytest.approx(expected.cdf(ids), rel=1e-12)
    else:
        assert law.log_prob(ids) == pytest.approx(-np.log(num_items), rel=1e-13)


@pytest.mark.parametrize("num_items", [66, 10**6, 10**9, MAX_ITEMS])
@pytest.mark.parametrize(("exponent", "shift"), [(1.2, 2.7), (2.0, -0.99), (3.0, 1000.0)])
def test_zipf_mandelbrot_sums_against_the_hurwitz_zeta(num_items, exponent, shift):
    law = ZipfMandelbrot(num_items, exponent, shift)
    total = special.zeta(exponent, 1 + shift) - special.zeta(exponent, num_items + 1 + shift)
    ids = np.array([0, 1, 63, 64, 65, num_items // 2, num_items - 1])
    expected = -exponent * np.log(ids + 1 + shift) - np.log(total)
    assert law.log_prob(ids) == pytest.approx(expected, rel=1e-12)
    below = special.zeta(exponent, 1 + shift) - special.zeta(exponent, ids + 2 + shift)
    assert law.cdf(ids) == pytest.approx(below / total, rel=1e-10)


@pytest.mark.parametrize(("exponent", "shift"), [(0.0, 0.0), (0.8, 3.0), (1.0, 0.0), (1.7, -0.5)])
@pytest.mark.parametrize("num_items", [64, 65, 1009])
def test_zipf_mandelbrot_on_a_grid(num_items, exponent, shift):
    grid, size = (np.arange(3_000_017) + 0.5) / 3_000_017, 3_000_017

    def farthest(law):
        counts = np.bincount(law._rank(grid), minlength=num_items)
        return abs(
            counts
            - size
            * np.exp(ZipfMandelbrot(num_items, exponent, shift).log_prob(np.arange(num_items)))
        ).max()

    assert farthest(ZipfMandelbrot(num_items, exponent, shift)) <= 1
    # A range off by one, and an exponent off by 1 %.
    assert farthest(ZipfMandelbrot(num_items - 1, exponent, shift)) > 1
    assert farthest(ZipfMandelbrot(num_items, exponent + 0.01, shift)) > 1


@pytest.mark.parametrize("num_items", [10**6, 10**9])
def test_log_uniform_against_decimal(num_items):
    rng = np.random.default_rng(num_items)
    ids = np.unique(
        np.concatenate(
            [np.arange(20), num_items - 1 - np.arange(20), rng.integers(0, num_items, 200)]
        )
    )
    law = LogUniform(num_items, first_id=1)
    prob, cdf = np.exp(law.log_prob(ids + 1)), law.cdf(ids + 1)
    with localcontext() as context:
        context.prec = 50
        total = Decimal(num_items + 1).ln()
        exact = [float((Decimal(k + 2) / Decimal(k + 1)).ln() / total) for k in ids.tolist()]
        below = [float(Decimal(k + 2).ln() / total) for k in ids.tolist()]
    assert abs(prob / exact - 1).max() < 1e-12
    assert abs(cdf / below - 1).max() < 1e-12
    # A difference of float32 logarithms does not do.
    logs = np.log((ids[:, None] + [1, 2]).astype(np.float32))
    table = np.diff(logs)[:, 0] / np.log(np.float32(num_items + 1))
    assert np.median(abs(table / exact - 1)) > 0.05


@pytest.mark.parametrize("num_items", [1, 2, 7, 1009, 10**6])
def test_log_uniform_cdf_against_scipy(num_items):
    ranks = np.unique(np.linspace(0, num_items - 1, 500).astype(np.int64))
    expected = stats.loguniform(1, num_items + 1).cdf(ranks + 2.0)
    assert LogUniform(num_items, first_id=4).cdf(ranks + 4) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("num_items", "first_id"), [(1, 0), (2, 5), (31, 1), (1009, 7)])
def test_uniform_against_scipy(num_items, first_id):
    law, peer = Uniform(num_items, first_id=first_id), stats.randint(first_id, first_id + num_items)
    ids = np.arange(first_id, first_id + num_items + 3)
    assert law.log_prob(ids) == pytest.approx(peer.logpmf(ids), rel=1e-14)
    assert law.cdf(ids) == pytest.approx(peer.cdf(ids), rel=1e-14)
    u = np.random.default_rng(0).uniform(0, 1, 500)
    assert (law.ppf(u) == peer.ppf(u)).all()


@pytest.mark.parametrize(
    "law", [Empirical(some_counts(97), first_id=2), LogUniform(31, first_id=1), Uniform(5)]
)
def test_laws_against_scipys_discrete_law(law):
    ids = all_ids(law)
    peer = stats.rv_discrete(values=(ids, np.exp(law.log_prob(ids))))
    assert law.cdf(ids) == pytest.approx(peer.cdf(ids), rel=1e-12)
    u = np.random.default_rng(1).uniform(0, 1, 500)
    assert (law.ppf(u) == peer.ppf(u)).all()


@pytest.mark.parametrize("num_items", [1, 2, 33, 1009])
@pytest.mark.parametrize("power", [0.0, 0.75, 1.0, 3.0])
def test_empirical_against_longdouble(num_items, power):
    counts = some_counts(num_items)
    weights = np.where(counts > 0, counts.astype(np.longdouble) ** power, 0)
    got = np.exp(Empirical(counts, power=power).log_prob(np.arange(num_items)))
    assert got == pytest.approx((weights / weights.sum()).astype(np.float64), rel=1e-12)


@pytest.mark.parametrize("counts", [[1], [1, 1], [1e12, 1, 1, 1], [0, 0, 3, 0], some_counts(1009)])
def test_alias_table_holds_the_law(counts):
    law = Empirical(counts)
    threshold, alias = law._alias_table
    mass = threshold + np.bincount(alias, 1 - threshold, minlength=law.num_items)
    prob = np.exp(law.log_prob(np.arange(law.num_items)))
    assert mass / law.num_items == pytest.approx(prob, rel=1e-12, abs=1e-15)
    assert (mass[prob == 0] == 0).all()


SPECTRUM_FUNCTIONS = {
    "count": np.ones_like,
    "mass": lambda p: p,
    "square": np.square,
    "entropy": lambda p: -p * np.log(p),
    "log": np.log,
    "root": np.sqrt,
    "inclusion, early": lambda p: -np.expm1(-100 * p),
    "inclusion, late": lambda p: -np.expm1(-p / p.min()),
}


@pytest.mark.parametrize("name", SPECTRUM_FUNCTIONS)
@pytest.mark.parametrize("num_items", [1, 5, 4096, 4097, 4098, 4099, 5000, 10_000, 1_000_000])
def test_spectrum_sums_over_all_ids(num_items, name):
    f = SPECTRUM_FUNCTIONS[name]
    prob, weights = LogUniform(num_items).spectrum()
    assert len(prob) < 6000
    k = np.arange(num_items, dtype=np.longdouble)
    direct = float(f(np.log1p(1 / (k + 1)) / np.log1p(np.longdouble(num_items))).sum())
    if name == "inclusion, late":  # the smallest term of the spectrum may not be the last id's
        late = float(1 / np.exp(LogUniform(num_items).log_prob(num_items - 1)))
        assert (weights * -np.expm1(-late * prob)).sum() == pytest.approx(direct, rel=1e-12)
    else:
        assert (weights * f(prob)).sum() == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("law", [Uniform(1009), Empirical([5, 0, 5, 1]), Empirical([3.5])])
def test_spectrum_of_the_other_laws(law):
    prob, weights = law.spectrum()
    every = np.exp(law.log_prob(all_ids(law)))
    for f in (np.ones_like, np.sqrt, np.square):
        assert (weights * f(prob)).sum() == pytest.approx(f(every).sum(), rel=1e-12)


# Draws against their law. A p-value below fit.LEVEL refuses a sampler.


def test_log_uniform_draws_follow_their_law():
    prob = reference.log_uniform_prob(100_000)
    ranks = LogUniform(100_000, first_id=2).draw(1_000_000, seed=1) - 2
    assert fit.chi_square(np.bincount(ranks, minlength=100_000), prob) > fit.LEVEL
    shifted = np.minimum(ranks + 1, 99_999)
    assert fit.chi_square(np.bincount(shifted, minlength=100_000), prob) < fit.LEVEL


def test_uniform_draws_follow_their_law():
    ranks = Uniform(1009).draw(1_000_000, seed=2)
    prob = np.full(1009, 1 / 1009)
    assert fit.chi_square(np.bincount(ranks, minlength=1009), prob) > fit.LEVEL
    log_uniform = LogUniform(1009).draw(1_000_000, seed=2)
    assert fit.chi_square(np.bincount(log_uniform, minlength=1009), prob) < fit.LEVEL
    one_short = Uniform(1008).draw(1_000_000, seed=2)
    assert fit.chi_square(np.bincount(one_short, minlength=1009), prob) < fit.LEVEL


def test_empirical_draws_follow_their_law():
    counts = some_counts(1009)
    law = Empirical(counts, power=0.75)
    prob = np.exp(law.log_prob(np.arange(1009)))
    observed = np.bincount(law.draw(1_000_000, seed=3), minlength=1009)
    assert (observed[counts == 0] == 0).all()
    assert (counts == 0).any()
    assert fit.chi_square(observed, prob) > fit.LEVEL
    flat = Empirical(counts).draw(1_000_000, seed=3)
    assert fit.chi_square(np.bincount(flat, minlength=1009), prob) < fit.LEVEL


@pytest.mark.parametrize("law", [LogUniform(20), Uniform(20), Empirical(some_counts(20) + 1)])
def test_neighbouring_draws_are_independent(law):
    # One uniform of every pair from each half of a counter's words, and neighbours in a lane.
    prob = np.exp(law.log_prob(np.arange(20)))
    pairs = (prob[:, None] * prob).ravel()
    draws = law.draw(200_000, seed=4)
    for first, second in ((draws[::2], draws[1::2]), (draws[:-32:64], draws[32::64])):
        size = min(len(first), len(second))
        observed = np.bincount(20 * first[:size] + second[:size], minlength=400)
        assert fit.chi_square(observed, pairs) > fit.LEVEL
    repeated = np.repeat(draws[::2], 2)
    observed = np.bincount(20 * repeated[::2] + repeated[1::2], minlength=400)
    assert fit.chi_square(observed, pairs) < fit.LEVEL


def test_draws_reach_all_of_ten_million_ids():
    num_items, size = 10**7, 3 * 10**6
    prob = reference.log_uniform_prob(num_items)
    seen = -np.expm1(size * np.log1p(-prob))
    # Distinct ids are negatively correlated: this bounds their variance.
    spread = np.sqrt((seen * (1 - seen)).sum())

    def p_value(ids):
        seen_ids = np.count_nonzero(np.bincount(ids, minlength=num_items))
        return 2 * stats.norm.sf(abs(seen_ids - seen.sum()) / spread)

    assert p_value(LogUniform(num_items).draw(size, seed=5)) > fit.LEVEL
    u24 = np.floor(uniforms(size, stream_words(5, 0, 0)) * 2**24) / 2**24
    coarse = np.minimum((num_items + 1) ** u24, num_items).astype(np.int64) - 1
    assert p_value(coarse) < fit.LEVEL


# Invariants


@every_law
def test_probabilities_sum_to_one(law):
    assert np.exp(law.log_prob(all_ids(law))).sum() == pytest.approx(1, rel=1e-13)


@every_law
def test_cdf_is_the_running_sum_of_probabilities(law):
    ids = all_ids(law)
    assert law.cdf(ids) == pytest.approx(np.cumsum(np.exp(law.log_prob(ids))), rel=1e-12)
    assert law.cdf(ids[-1]) == 1


@every_law
def test_ppf_inverts_cdf(law):
    ids = all_ids(law)
    positive = law.log_prob(ids) > -np.inf
    assert (law.ppf(law.cdf(ids[positive])) == ids[positive]).all()


@pytest.mark.parametrize("num_items", [10**6, 10**9, MAX_ITEMS])
@pytest.mark.parametrize("law_type", [LogUniform, Uniform])
def test_ppf_inverts_cdf_over_many_items(law_type, num_items):
    law = law_type(num_items, first_id=1)
    rng = np.random.default_rng(2)
    ids = np.concatenate([np.arange(1, 100), num_items - np.arange(99)])
    ids = np.concatenate([ids, rng.integers(1, num_items + 1, 10_000)])
    assert (law.ppf(law.cdf(ids)) == ids).all()
    assert (law.ppf(np.nextafter(law.cdf(ids), 0)) <= ids).all()


@quietly
@given(law=laws(), u=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_ppf_is_the_smallest_id_that_reaches_u(law, u):
    ids = law.ppf(u)
    assert (law.cdf(ids) >= u).all()
    assert ((ids == law.first_id) | (law.cdf(ids - 1) < u)).all()
    assert ((ids >= law.first_id) & (ids < law.first_id + law.num_items)).all()


@quietly
@given(law=laws(), offset=st.integers(-(2**34), 2**41))
def test_outside_ids_have_no_probability(law, offset):
    inside = 0 <= offset < law.num_items
    got = float(law.log_prob(law.first_id + offset))
    assert got <= 1e-15
    assert (got == -np.inf) or inside
    assert float(law.cdf(law.first_id + min(offset, -1))) == 0
    assert float(law.cdf(law.first_id + law.num_items - 1 + max(offset, 0))) == 1


def test_ids_of_every_integer_dtype():
    law = LogUniform(100, first_id=1)
    expected = law.log_prob(np.array([0, 1, 100, 101], np.int64))
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64):
        ids = np.array([0, 1, 100, 101], dtype)
        assert (law.log_prob(ids) == expected).all()
        assert law.cdf(ids).tolist()[::3] == [0, 1]


def test_ids_at_the_ends_of_their_dtype():
    law = LogUniform(100, first_id=1)
    low = np.array([np.iinfo(np.int64).min])
    high = np.array([np.iinfo(np.uint64).max])
    assert law.log_prob(low)[0] == law.log_prob(high)[0] == -np.inf
    assert law.cdf(low)[0] == 0
    assert law.cdf(high)[0] == 1


@quietly
@given(
    law=laws(),
    seed=seeds,
    step=words32,
    stream=words32,
    shape=st.lists(st.integers(0, 13), max_size=3).map(tuple),
)
def test_draws_depend_on_their_index_alone(law, seed, step, stream, shape):
    key = dict(seed=seed, step=step, stream=stream)
    flat = law.draw(3000, **key)
    got = law.draw(shape, **key)
    assert got.shape == shape
    assert got.dtype == np.int64
    assert (got.ravel() == flat[: got.size]).all()
    assert ((flat >= law.first_id) & (flat < law.first_id + law.num_items)).all()
    assert (law.log_prob(flat) > -np.inf).all()


@quietly
@given(seed=seeds, step=words32, stream=words32, change=st.integers(0, 2))
def test_other_streams_give_other_draws(seed, step, stream, change):
    law = Uniform(MAX_ITEMS)
    one = [seed, step, stream]
    other = list(one)
    other[change] ^= 1
    keys = [dict(zip(("seed", "step", "stream"), words, strict=True)) for words in (one, other)]
    a, b = (law.draw(4000, **key) for key in keys)
    # Shared counters would show as ids in common, at whatever index.
    assert len(np.intersect1d(a, b)) < 2


def test_words_do_not_leak_between_seed_step_and_stream():
    law = Uniform(MAX_ITEMS)
    keys = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 0, 0), (1, 1, 0), (1, 0, 1)]
    draws = [law.draw(1000, seed=a, step=b, stream=c) for a, b, c in keys]
    assert len(np.unique(draws)) == 1000 * len(keys)


@every_law
@pytest.mark.parametrize("size", [0, 1, 31, 63, 64, 65, 1023, 1024, 1025, 3 * 16384 + 77])
def test_draws_do_not_depend_on_threads(law, size, monkeypatch):
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "1")
    one = law.draw(size, seed=8)
    for num_threads in ("2", "3"):
        monkeypatch.setenv("ZIPFNEG_NUM_THREADS", num_threads)
        assert (law.draw(size, seed=8) == one).all()
    assert (law.draw(3 * 16384 + 78, seed=8)[:size] == one).all()


@every_law
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_draws_into_given_memory(law, dtype):
    expected = law.draw((7, 211), seed=9, step=1)
    memory = np.full((9, 211), -1, dtype)
    out = memory[1:-1]
    assert law.draw((7, 211), seed=9, step=1, out=out) is out
    assert (out == expected).all()
    assert (memory[[0, -1]] == -1).all()


@pytest.mark.parametrize("law", [LogUniform(5, first_id=3), Uniform(5, first_id=3)])
def test_both_ends_are_drawn(law):
    assert np.unique(law.draw(1000, seed=11)).tolist() == [3, 4, 5, 6, 7]


def test_ids_beyond_32_bits():
    law = LogUniform(1000, first_id=2**62)
    ids = law.draw(5000, seed=12)
    assert (ids - 2**62 == LogUniform(1000).draw(5000, seed=12)).all()


@pytest.mark.parametrize("law_type", [LogUniform, Uniform])
def test_nothing_as_long_as_the_catalog_is_built(law_type):
    law_type(10**9).draw(10, seed=0)
    tracemalloc.start()
    try:
        law = law_type(10**9, first_id=1)
        ids = law.draw(1_000_000, seed=13)
        law.spectrum()
        law.log_prob(ids[:1000])
        law.ppf(law.cdf(ids[:1000]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.max() > 5 * 10**8
    assert peak < ids.nbytes + 2 * 10**6


def test_closed_form_laws_are_values():
    assert LogUniform(5) == LogUniform(np.int64(5))
    assert LogUniform(5) != LogUniform(5, first_id=1)
    assert len({Uniform(5), Uniform(5), Uniform(6)}) == 2


def test_counts_are_borrowed():
    counts = np.array([4.0, 0.0, 1.0])
    counts.flags.writeable = False
    law = Empirical(counts, power=2)
    law.draw(10, seed=0)
    assert counts.tolist() == [4, 0, 1]
    assert np.exp(law.log_prob(0)) == pytest.approx(16 / 17)


def test_large_powers_of_large_counts():
    law = Empirical([1e300, 1e299, 0], power=2)
    assert np.exp(law.log_prob([0, 1, 2])) == pytest.approx([1 / 1.01, 0.01 / 1.01, 0], rel=1e-12)


# Errors


@pytest.mark.parametrize("law_type", [LogUniform, Uniform])
@pytest.mark.parametrize(
    ("num_items", "error", "text"),
    [
        (0, ValueError, r"num_items: expected an integer from 1 to \d+, got 0"),
        (-3, ValueError, "num_items: expected an integer from 1 .* got -3"),
        (MAX_ITEMS + 1, ValueError, "num_items: expected an integer from 1"),
        (3.0, TypeError, "num_items: expected an integer, got 3.0"),
        (True, TypeError, "num_items: expected an integer, got True"),
        (np.bool_(True), TypeError, "num_items: expected an integer"),
        ("3", TypeError, "num_items: expected an integer, got '3'"),
        (None, TypeError, "num_items: expected an integer, got None"),
    ],
)
def test_bad_numbers_of_items(law_type, num_items, error, text):
    with pytest.raises(error, match=text):
        law_type(num_items)


@pytest.mark.parametrize(
    ("first_id", "error"), [(-1, ValueError), (2**62 + 1, ValueError), (1.0, TypeError)]
)
def test_bad_first_ids(first_id, error):
    for build in (lambda: LogUniform(3, first_id=first_id), lambda: Uniform(3, first_id=first_id)):
        with pytest.raises(error, match="first_id: expected an integer"):
            build()
    with pytest.raises(error, match="first_id: expected an integer"):
        Empirical([1, 2], first_id=first_id)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([1, -2, 3], r"counts: expected numbers ≥ 0, got -2.0 at 1"),
        ([1, np.nan], r"counts: expected numbers ≥ 0, got nan at 1"),
        ([np.inf, 1], r"counts: expected numbers ≥ 0, got inf at 0"),
        ([0, 0, 0], "counts: expected at least one above zero, got none"),
        ([[1, 2], [3, 4]], r"counts: expected a one-dimensional array .* shape \(2, 2\)"),
        ([], r"counts: expected a one-dimensional array of at least one number"),
        (np.array(3), r"counts: expected a one-dimensional array"),
        (np.array([True, False]), r"counts: expected a one-dimensional array .* got bool"),
        (np.array([1j]), r"counts: expected a one-dimensional array .* got complex128"),
    ],
)
def test_bad_counts(counts, text):
    with pytest.raises(ValueError, match=text):
        Empirical(counts)


@pytest.mark.parametrize("power", [-0.5, np.nan, np.inf])
def test_bad_powers(power):
    with pytest.raises(ValueError, match="power: expected a number ≥ 0"):
        Empirical([1, 2], power=power)


@every_law
@pytest.mark.parametrize("u", [-1e-300, 1 + 2**-52, np.nan, np.inf, [0.5, np.nan], [0.5, 2]])
def test_ppf_outside_probabilities(law, u):
    with pytest.raises(ValueError, match="u: expected probabilities from 0 to 1"):
        law.ppf(u)


@every_law
@pytest.mark.parametrize("ids", [1.0, [0.0, 1.0], np.array([True]), True, np.array([1], "f4")])
def test_ids_that_are_no_integers(law, ids):
    for method in (law.log_prob, law.cdf):
        with pytest.raises(TypeError, match="ids: expected an integer dtype, got"):
            method(ids)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(seed=-1), ValueError, "seed: expected an integer from 0"),
        (dict(seed=2**64), ValueError, "seed: expected an integer from 0"),
        (dict(seed=1.0), TypeError, "seed: expected an integer, got 1.0"),
        (dict(seed=0, step=2**32), ValueError, "step: expected an integer from 0 to 4294967295"),
        (dict(seed=0, step=-1), ValueError, "step: expected an integer from 0 to 4294967295"),
        (dict(seed=0, stream=2**32), ValueError, "stream: expected an integer from 0"),
        (dict(seed=0, stream=None), TypeError, "stream: expected an integer, got None"),
        (dict(seed=0, device="abacus"), ValueError, "device: expected one of .* got 'abacus'"),
    ],
)
def test_bad_streams(arguments, error, text):
    with pytest.raises(error, match=text):
        LogUniform(5).draw(3, **arguments)


@pytest.mark.parametrize(
    ("shape", "error"),
    [(-1, ValueError), ((2, -1), ValueError), (2.0, TypeError), ((2, True), TypeError)],
)
def test_bad_shapes(shape, error):
    with pytest.raises(error, match="shape: expected an integer"):
        LogUniform(5).draw(shape, seed=0)


def frozen(out):
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (np.empty(6, np.float64), TypeError, "out: expected int32 or int64, got float64"),
        (np.empty(6, np.uint64), TypeError, "out: expected int32 or int64, got uint64"),
        (np.empty(6, np.int16), TypeError, "out: expected int32 or int64, got int16"),
        (np.empty(5, np.int64), ValueError, r"out: expected shape .*\(6,\), got \(5,\)"),
        (np.empty((6, 1), np.int64), ValueError, r"out: expected shape .*\(6,\), got \(6, 1\)"),
        (frozen(np.empty(6, np.int64)), ValueError, "out: expected writable, C-contiguous memory"),
        (np.empty(12, np.int64)[::2], ValueError, "out: expected writable, C-contiguous memory"),
        (np.empty(6, np.int64)[::-1], ValueError, "out: expected writable, C-contiguous memory"),
        ([0] * 6, TypeError, "out: expected an array"),
    ],
)
def test_bad_memory_to_draw_into(out, error, text):
    with pytest.raises(error, match=text):
        LogUniform(5).draw(6, seed=0, out=out)


def test_transposed_memory_to_draw_into():
    with pytest.raises(ValueError, match="C-contiguous"):
        LogUniform(5).draw((2, 3), seed=0, out=np.empty((3, 2), np.int64).T)


def test_int32_that_does_not_hold_the_ids():
    out = np.empty(3, np.int32)
    with pytest.raises(ValueError, match="out: int32 does not hold this law's ids; use int64"):
        Uniform(2, first_id=2**31 - 1).draw(3, seed=0, out=out)
    assert (Uniform(1, first_id=2**31 - 1).draw(3, seed=0, out=out) == 2**31 - 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((10, -0.1), ValueError, "exponent: expected a number ≥ 0, to 1e12, got -0.1"),
        ((10, float("nan")), ValueError, "exponent: expected a number ≥ 0, to 1e12, got nan"),
        ((10, float("inf")), ValueError, "exponent: expected a number ≥ 0, to 1e12, got inf"),
        ((10, "1"), ValueError, "exponent: expected a number ≥ 0, to 1e12, got '1'"),
        ((10, 1.0, -1.0), ValueError, "shift: expected a number above −1, to 1e12, got -1.0"),
        ((0, 1.0), ValueError, "num_items: expected an integer from 1"),
    ],
)
def test_bad_zipf_mandelbrot(arguments, error, text):
    with pytest.raises(error, match=text):
        ZipfMandelbrot(*arguments)


@pytest.mark.parametrize(
    ("num_items", "exponent", "shift"), [(2000, 1.3, 2.2), (10**5, 0.8, -0.3), (50, 2.5, 10.0)]
)
def test_a_fit_to_the_law_itself_finds_it(num_items, exponent, shift):
    law = ZipfMandelbrot(num_items, exponent, shift)
    found = ZipfMandelbrot.fit(np.exp(law.log_prob(np.arange(num_items))), first_id=4)
    assert found.exponent == pytest.approx(exponent, rel=1e-5)
    assert found.shift == pytest.approx(shift, rel=1e-4)
    assert abs(found.fitted.kl) < 1e-9
    assert found.fitted.ks < 1e-6
    assert found.first_id == 4
    assert law.fitted is None


def test_standard_errors_cover_the_truth():
    law = ZipfMandelbrot(300, 1.5, 4.0)
    deviations = []
    for seed in range(40):
        counts = np.bincount(law.draw(2_000_000, seed=seed), minlength=300)
        found = ZipfMandelbrot.fit(counts)
        deviations.append(
            [
                (found.exponent - 1.5) / found.fitted.exponent_error,
                (found.shift - 4.0) / found.fitted.shift_error,
            ]
        )
    # Means of 40 standard normals, and their spread.
    assert (np.abs(np.mean(deviations, axis=0)) < 5 / 40**0.5).all()
    assert ((np.std(deviations, axis=0) > 0.6) & (np.std(deviations, axis=0) < 1.6)).all()


def test_goodness_of_fit_tells_laws_apart():
    ids = np.arange(5000)
    good = ZipfMandelbrot.fit(np.exp(ZipfMandelbrot(5000, 1.0).log_prob(ids)))
    # Log-normal popularity is no power law.
    bad = ZipfMandelbrot.fit(np.exp(-0.5 * (np.log1p(ids) - 1) ** 2))
    assert bad.fitted.kl > 100 * abs(good.fitted.kl)
    assert bad.fitted.kl == pytest.approx(kl_of(bad, np.exp(-0.5 * (np.log1p(ids) - 1) ** 2)))


def kl_of(law, counts):
    share = np.sort(counts)[::-1] / counts.sum()
    seen = share > 0
    return (share[seen] * (np.log(share[seen]) - law.log_prob(np.flatnonzero(seen)))).sum()


def test_fits_that_cannot_be():
    with pytest.raises(ValueError, match="counts: expected three ids or more above zero"):
        ZipfMandelbrot.fit([5, 4, 0])
    with pytest.raises(ValueError, match=r"counts: expected numbers ≥ 0, got -1\.0 at 1"):
        ZipfMandelbrot.fit([5, -1, 2])


def test_what_the_counts_do_not_tell_has_no_finite_error():
    flat = ZipfMandelbrot.fit([5] * 1000)
    assert flat.exponent == pytest.approx(0, abs=1e-6)
    assert flat.fitted.shift_error == np.inf


def test_a_fit_finds_a_large_shift():
    law = ZipfMandelbrot(20_000, 1.0, 1e6)
    found = ZipfMandelbrot.fit(np.exp(law.log_prob(np.arange(20_000))) * 1e9)
    assert found.fitted.kl < 1e-9
    # The likelihood is all but flat, and the errors say so.
    assert found.fitted.exponent_error > 0.1
