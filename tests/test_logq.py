import itertools
import math

import goodness_of_fit as fit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from zipfneg import Empirical, LogUniform, PopularitySampler, Uniform, logq, reference

quietly = settings(derandomize=True, deadline=None, max_examples=60)


def successive_inclusion(prob, num_sampled):
    """P(each id is among the first S distinct ones), over every order in which they can come."""
    total = np.zeros(len(prob))
    for order in itertools.permutations(range(len(prob)), num_sampled):
        chance, left = 1.0, 1.0
        for k in order:
            chance *= prob[k] / left
            left -= prob[k]
        total[list(order)] += chance
    return total


def race_inclusion(prob, num_sampled, ranks):
    """The same for more items: ∫ p·e^(−p·t)·P(at most S − 1 others have come by t) dt."""
    panels = np.linspace(math.log(1e-6 * num_sampled), math.log(1e3 * num_sampled), 29)
    nodes, node_weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(panels)[:, None] / 2
    t = np.exp(panels[:-1, None] + half * (1 + nodes)).ravel()
    weights = (half * node_weights).ravel() * t

    def with_items(come, items):
        # come[i, m] = P(m of the items so far have come by t[i]).
        for k in items:
            arrived = -np.expm1(-prob[k] * t)[:, None]
            come, before = come * (1 - arrived), come
            come[:, 1:] += before[:, :-1] * arrived
        return come

    nobody = np.zeros((len(t), num_sampled))
    nobody[:, 0] = 1
    rest = with_items(nobody, np.setdiff1d(np.arange(len(prob)), ranks))
    return np.array(
        [
            (weights * prob[k] * np.exp(-prob[k] * t)) @ with_items(rest, ranks[ranks != k]).sum(1)
            - np.expm1(-prob[k] * 1e-6 * num_sampled)
            for k in ranks
        ]
    )


def inclusion(law, num_sampled):
    """π of every rank, by way of the sampler."""
    ids = np.arange(law.first_id, law.first_id + law.num_items)
    return np.exp(PopularitySampler(law, num_sampled).log_q(ids))


# By hand


def test_uniform_inclusion_by_hand():
    # 3 of 4 alike: 1 − e^(−t/4) = 3/4.
    prob, weights = Uniform(4).spectrum()
    time = logq.sampling_time(prob, weights, 3)
    assert time == pytest.approx(4 * math.log(4), rel=1e-12)
    assert np.exp(Uniform(4).log_inclusion(2, time)) == pytest.approx(0.75, rel=1e-12)


def test_log_count_by_hand():
    got = logq.log_count(np.array([math.log(0.25), -np.inf]), 8)
    assert got.tolist() == pytest.approx([math.log(2), -np.inf], rel=1e-15)


def test_nothing_sampled_takes_no_time():
    prob, weights = LogUniform(10).spectrum()
    assert logq.sampling_time(prob, weights, 0) == 0
    assert logq.log_count(np.log(prob), 0).tolist() == [-np.inf] * 10


# Against the reference and exact enumeration


@pytest.mark.parametrize(
    ("num_items", "num_sampled"),
    [(1, 1), (2, 1), (7, 3), (31, 30), (1009, 1), (1009, 100), (1009, 1008), (5003, 257)],
)
def test_inclusion_against_the_reference(num_items, num_sampled):
    expected = reference.inclusion_prob(reference.log_uniform_prob(num_items), num_sampled)
    assert inclusion(LogUniform(num_items, first_id=1), num_sampled) == pytest.approx(
        expected, rel=1e-11
    )


@pytest.mark.parametrize("num_sampled", [1, 2, 40, 66])
def test_empirical_inclusion_against_the_reference(num_sampled):
    counts = np.random.default_rng(0).pareto(1.0, 67)
    got = inclusion(Empirical(counts), num_sampled)
    assert got == pytest.approx(reference.inclusion_prob(counts / counts.sum(), num_sampled))


@pytest.mark.parametrize("num_items", range(2, 8))
def test_inclusion_of_few_items_against_enumeration(num_items):
    # Poissonised inclusion is at its worst for few: one item of two is out by 10.6 %.
    prob = reference.log_uniform_prob(num_items)
    for num_sampled in range(1, num_items):
        error = inclusion(LogUniform(num_items), num_sampled) / successive_inclusion(
            prob, num_sampled
        )
        assert abs(error - 1).max() < 0.11


@pytest.mark.parametrize(("num_items", "num_sampled"), [(5, 1), (5, 3), (6, 2), (7, 6)])
def test_the_two_exact_inclusions_agree(num_items, num_sampled):
    prob = reference.log_uniform_prob(num_items)
    by_race = race_inclusion(prob, num_sampled, np.arange(num_items))
    assert by_race == pytest.approx(successive_inclusion(prob, num_sampled), rel=1e-6)


@pytest.mark.parametrize(
    ("num_items", "num_sampled", "bound"),
    [(1000, 1, 0.05), (1000, 10, 0.02), (1000, 30, 0.004), (1000, 100, 0.001), (200, 100, 0.001)],
)
def test_inclusion_against_the_exact_race(num_items, num_sampled, bound):
    ranks = np.array([0, 1, 2, 5, 20, 60, 150, num_items - 1])
    exact = race_inclusion(reference.log_uniform_prob(num_items), num_sampled, ranks)
    error = inclusion(LogUniform(num_items), num_sampled)[ranks] / exact - 1
    assert abs(error).max() < bound


@pytest.mark.parametrize("num_items", range(1, 8))
def test_inclusion_of_equal_items_is_exact(num_items):
    for num_sampled in range(1, num_items + 1):
        share = num_sampled / num_items
        assert inclusion(Uniform(num_items), num_sampled) == pytest.approx(share, rel=1e-12)


# Invariants


@quietly
@given(
    counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=60).filter(any),
    share=st.floats(0, 1),
)
def test_inclusions_sum_to_the_number_sampled(counts, share):
    law = Empirical(counts)
    num_sampled = max(1, round(share * np.count_nonzero(counts)))
    pi = inclusion(law, num_sampled)
    assert pi.sum() == pytest.approx(num_sampled, rel=1e-10)
    assert ((pi >= 0) & (pi <= 1)).all()
    # More popular, more often.
    order = np.argsort(counts)
    assert (np.diff(pi[order]) >= -1e-12).all()


@pytest.mark.parametrize("law", [LogUniform(7), Uniform(10**9), Empirical([3, 0, 1, 1e12, 1])])
def test_whole_catalogs_have_log_q_zero(law):
    prob, weights = law.spectrum()
    available = round(weights[prob > 0].sum())
    ids = np.arange(5)
    log_q = PopularitySampler(law, available).log_q(ids)
    assert (log_q == np.where(law.log_prob(ids) > -np.inf, 0, -np.inf)).all()


@pytest.mark.parametrize("num_sampled", [1, 8192, 65536, 10**6])
def test_inclusions_over_a_billion_items_sum_to_the_number_sampled(num_sampled):
    num_items, head = 10**9, 200_000
    sampler = PopularitySampler(LogUniform(num_items, first_id=1), num_sampled)
    prob, weights = sampler.law.spectrum()
    pi = -np.expm1(-prob * logq.sampling_time(prob, weights, num_sampled))
    assert (weights * pi).sum() == pytest.approx(num_sampled, rel=1e-12)

    # The head item by item, and the tail as an integral by SciPy's adaptive rule.
    def tail(log_k):
        prob = np.log1p(np.exp(-log_k)) / np.log1p(num_items)
        return np.exp(log_k) * -np.expm1(-prob * sampler._time)

    bounds = np.log(head + 0.5), np.log(num_items + 0.5)
    rest, _ = integrate.quad(tail, *bounds, epsrel=1e-12, limit=200)
    total = np.exp(sampler.log_q(np.arange(1, head + 1))).sum() + rest
    assert total == pytest.approx(num_sampled, rel=1e-9)


def test_a_later_time_includes_more():
    prob, weights = LogUniform(10**6).spectrum()
    times = [logq.sampling_time(prob, weights, s) for s in (1, 2, 10, 10**3, 999_999, 10**6)]
    assert (np.diff(times) > 0).all()
    assert times[-1] == np.inf
    assert (np.array(times[:-1]) >= [1, 2, 10, 10**3, 999_999]).all()


@pytest.mark.parametrize(
    "counts", [[1e12, 1, 1, 1], [1e300, 1, 1], [1, 1e-200], [1e15, 1e10, 1e5, 1], [1] * 50 + [1e-9]]
)
def test_extreme_popularities_have_a_time(counts):
    law = Empirical(counts)
    for num_sampled in range(1, len(counts)):
        pi = inclusion(law, num_sampled)
        assert pi.sum() == pytest.approx(num_sampled, rel=1e-9)


# Identity: E Σ_sample g/π = Σ_all g, for whatever g. A p-value below fit.LEVEL refuses a log q.


NUM_ITEMS, NUM_SAMPLED = 1000, 100
WEIGHINGS = {
    "one": np.ones(NUM_ITEMS),
    "head": 1 / np.arange(1, NUM_ITEMS + 1),
    "tail": np.arange(NUM_ITEMS) ** 2 / NUM_ITEMS,
    "every third": (np.arange(NUM_ITEMS) % 3 == 0).astype(float),
}
LOG_UNIFORM = reference.log_uniform_prob(NUM_ITEMS)


def samples(law, *, unique):
    sampler = PopularitySampler(law, NUM_SAMPLED, unique=unique, seed=20)
    return [sampler.sample(step=step).negatives for step in range(1500)]


@pytest.fixture(scope="module")
def unique_samples():
    return samples(LogUniform(NUM_ITEMS, first_id=1), unique=True)


@pytest.mark.parametrize("name", WEIGHINGS)
def test_unique_log_q_weighs_every_item_once(name, unique_samples):
    g = WEIGHINGS[name]
    estimates = [(g[n.ids - 1] / np.exp(n.log_q)).sum() for n in unique_samples]
    assert fit.mean(estimates, g.sum()) > fit.LEVEL
    # The number of negatives is not the number of tries.
    as_if_s_tries = -np.expm1(NUM_SAMPLED * np.log1p(-LOG_UNIFORM))
    estimates = [(g[n.ids - 1] / as_if_s_tries[n.ids - 1]).sum() for n in unique_samples]
    assert fit.mean(estimates, g.sum()) < fit.LEVEL


@pytest.mark.parametrize("name", WEIGHINGS)
def test_log_q_with_replacement_weighs_every_item_once(name):
    g = WEIGHINGS[name]
    drawn = samples(Empirical(LOG_UNIFORM, first_id=1), unique=False)
    estimates = [(g[n.ids - 1] / np.exp(n.log_q)).sum() for n in drawn]
    assert fit.mean(estimates, g.sum()) > fit.LEVEL
    pi = reference.inclusion_prob(LOG_UNIFORM, NUM_SAMPLED)
    estimates = [(g[n.ids - 1] / pi[n.ids - 1]).sum() for n in drawn]
    assert fit.mean(estimates, g.sum()) < fit.LEVEL
