import itertools
import pickle
import time

import goodness_of_fit as fit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zipfneg import (
    CachedSampler,
    Candidates,
    Empirical,
    FrequencyEstimator,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    Uniform,
    ZipfMandelbrot,
    merge_repeats,
    reference,
    sampled_softmax_value_and_grad,
    sampling,
)
from zipfneg.popularity import poisson, stream_words
from zipfneg.scalar import philox, u64, uniform_53

quietly = settings(derandomize=True, deadline=None, max_examples=60)
words32 = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)

# The second distinct id comes late, and how late varies: rejection in several rounds.
LATE = Empirical([10_000, 2, 2] + [0] * 3000)


def first_occurrences(law, num_sampled, **key):
    """Draw with replacement, skip what is already there: the sequence and the draws it took."""
    draws = law.draw(200_000, **key).tolist()
    seen = {}
    for num_tries, x in enumerate(draws):
        if len(seen) == num_sampled:
            return list(seen), num_tries
        seen[x] = True
    raise AssertionError("more draws are needed")


def by_rejection(law, num_sampled, step):
    return PopularitySampler(law, num_sampled, seed=30).sample(step=step).negatives.ids


def by_race(law, num_sampled, step):
    """The other way to draw a unique sample, which is taken where rejection would be slow."""
    sampler = PopularitySampler(law, num_sampled, seed=31)
    return sampler._race(stream_words(sampler.seed, step, 0), np.empty(0, np.int64))[0]


both_ways = pytest.mark.parametrize("sample", [by_rejection, by_race])


# By hand


def test_with_replacement_by_hand():
    law = Empirical([6, 3, 1], first_id=1)
    sampler = PopularitySampler(law, 5, unique=False, seed=3)
    draw = sampler.sample(np.array([3, 1]), step=2, stream=1)
    assert (draw.negatives.ids == law.draw(5, seed=3, step=2, stream=1)).all()
    assert draw.num_tries == 5
    expected = 5 * np.array([0.6, 0.3, 0.1])
    assert np.exp(draw.negatives.log_q) == pytest.approx(expected[draw.negatives.ids - 1])
    assert np.exp(draw.positives.log_q) == pytest.approx([0.5, 3])
    assert draw.positives.ids.tolist() == [3, 1]


def test_unique_by_hand():
    # 2 of 3 alike are included with probability 2/3, in and out of the sample.
    draw = PopularitySampler(Uniform(3, first_id=7), 2).sample(np.array([7, 8, 9, 9]))
    assert len(set(draw.negatives.ids.tolist()) & {7, 8, 9}) == 2
    assert np.exp(draw.negatives.log_q) == pytest.approx([2 / 3] * 2, rel=1e-12)
    assert np.exp(draw.positives.log_q) == pytest.approx([2 / 3] * 4, rel=1e-12)


def test_in_batch_by_hand():
    positives = Candidates(ids=np.array([0, 2, 0, 1]), embeddings=np.eye(4))
    draw = InBatchSampler([6, 3, 1]).sample(positives)
    for side in (draw.positives, draw.negatives):
        assert np.exp(side.log_q) == pytest.approx([2.4, 0.4, 2.4, 1.2])
        assert side.ids.tolist() == [0, 2, 0, 1]
        assert side.embeddings is positives.embeddings
    assert draw.num_tries == 4


def test_in_batch_without_popularity_knows_no_log_q():
    draw = InBatchSampler().sample(np.array([5, 6]))
    assert draw.negatives.log_q is None
    assert draw.positives.log_q is None
    assert draw.negatives.ids.tolist() == [5, 6]


def test_mixture_by_hand():
    law = Empirical([6, 3, 1])
    sampler = MixtureSampler(
        [InBatchSampler(law), PopularitySampler(Uniform(3), 6, unique=False, seed=1)]
    )
    draw = sampler.sample(np.array([2, 0]))
    # Two slots of the batch and six uniform draws: 2·f + 6/3.
    expected = np.array([1.2, 0.6, 0.2]) + 2
    assert draw.negatives.ids[:2].tolist() == [2, 0]
    assert draw.negatives.ids.shape == (8,)
    assert np.exp(draw.negatives.log_q) == pytest.approx(expected[draw.negatives.ids])
    assert np.exp(draw.positives.log_q) == pytest.approx(expected[[2, 0]])
    assert np.exp(sampler.log_q([0, 1, 2, 3], batch_size=2)) == pytest.approx([*expected, 0])
    assert draw.num_tries == 8


def test_mixture_of_different_ranges_by_hand():
    sampler = MixtureSampler(
        [
            PopularitySampler(Uniform(2, first_id=0), 3, unique=False),
            PopularitySampler(Uniform(2, first_id=1), 5, unique=False),
        ]
    )
    assert np.exp(sampler.log_q([0, 1, 2, 3])) == pytest.approx([1.5, 4, 2.5, 0])


def test_excluded_ids_by_hand():
    # 2 of the 3 that are left, alike.
    sampler = PopularitySampler(Uniform(4, first_id=5), 2, exclude=[6, 6, 99])
    draw = sampler.sample(np.array([5, 6, 4]))
    assert set(draw.negatives.ids.tolist()) <= {5, 7, 8}
    assert np.exp(draw.negatives.log_q) == pytest.approx([2 / 3] * 2)
    # An excluded positive is among its candidates once, for certain.
    assert np.exp(draw.positives.log_q) == pytest.approx([2 / 3, 1, 0])
    assert np.exp(sampler.log_q([5, 6, 7, 8, 99])) == pytest.approx([2 / 3, 0, 2 / 3, 2 / 3, 0])
    assert sampler.exclude == (6,)


def test_ids_excluded_in_one_step_by_hand():
    sampler = PopularitySampler(Empirical([6, 3, 1]), 4, unique=False)
    draw = sampler.sample(np.array([0, 2]), exclude=np.array([0]))
    assert set(draw.negatives.ids.tolist()) <= {1, 2}
    assert np.exp(draw.negatives.log_q) == pytest.approx(np.array([0, 3, 1])[draw.negatives.ids])
    assert np.exp(draw.positives.log_q) == pytest.approx([1, 1])
    assert np.exp(sampler.log_q([0, 1, 2], exclude=[0])) == pytest.approx([0, 3, 1])
    assert np.exp(sampler.log_q([0, 1, 2])) == pytest.approx([2.4, 1.2, 0.4])


def test_a_poissonised_sample_by_hand():
    sampler = PopularitySampler(Empirical([6, 3, 1]), 2, unique="poisson", seed=4)
    sizes = [len(sampler.sample(step=step).negatives.ids) for step in range(50)]
    assert {1, 2, 3} <= set(sizes) <= {0, 1, 2, 3}
    assert np.exp(sampler.log_q([0, 1, 2])).sum() == pytest.approx(2, rel=1e-12)


def test_negatives_for_each_query_by_hand():
    sampler = PopularitySampler(Uniform(3), 2, per_query=True)
    draw = sampler.sample(np.array([0, 1, 2, 0]))
    assert draw.negatives.ids.shape == draw.negatives.log_q.shape == (4, 2)
    assert all(len(set(row)) == 2 for row in draw.negatives.ids.tolist())
    assert np.exp(draw.negatives.log_q) == pytest.approx(np.full((4, 2), 2 / 3))
    assert np.exp(draw.positives.log_q) == pytest.approx([2 / 3] * 4)
    assert draw.num_tries >= 8


def test_log_q_by_tries_by_hand():
    # TensorFlow: 1 − (1 − p)**num_tries, but S·p where S tries were enough.
    sampler = PopularitySampler(Empirical([6, 3, 1]), 2, by_tries=True)
    p, seen = np.array([0.6, 0.3, 0.1]), set()
    for step in range(30):
        draw = sampler.sample(np.array([2]), step=step)
        seen.add(draw.num_tries)
        expected = 2 * p if draw.num_tries == 2 else 1 - (1 - p) ** draw.num_tries
        assert np.exp(draw.negatives.log_q) == pytest.approx(expected[draw.negatives.ids])
        assert np.exp(draw.positives.log_q) == pytest.approx(expected[[2]])
        log_q = sampler.log_q([0, 1, 2], num_tries=draw.num_tries)
        assert np.exp(log_q) == pytest.approx(expected)
    assert {2, 3} <= seen


# Against a plain statement of the sampler


@pytest.mark.parametrize(
    ("law", "num_sampled"),
    [
        (LogUniform(50, first_id=1), 20),
        (LogUniform(100_000, first_id=1), 8191),
        (LogUniform(10**9), 100),
        (Uniform(2**40, first_id=2**62), 1025),
        (Uniform(31), 29),
        (Empirical([1e12, 1, 1, 1]), 1),
        (LATE, 2),
    ],
)
@pytest.mark.parametrize("step", [0, 2**32 - 1])
def test_unique_draws_are_first_occurrences(law, num_sampled, step):
    sampler = PopularitySampler(law, num_sampled, seed=2**64 - 1)
    draw = sampler.sample(step=step, stream=step)
    ids, num_tries = first_occurrences(law, num_sampled, seed=2**64 - 1, step=step, stream=step)
    assert draw.negatives.ids.tolist() == ids
    assert draw.num_tries == num_tries


def without(law, excluded, num_draws, **key):
    """Draw with replacement, skip what is excluded."""
    draws = law.draw(num_draws, **key)
    return draws[~np.isin(draws, excluded)]


@pytest.mark.parametrize("law", [LogUniform(100, first_id=3), LogUniform(10**9, first_id=1)])
@pytest.mark.parametrize("excluded", [[3, 4, 11, 90], list(range(3, 60))])
def test_excluded_ids_are_skipped(law, excluded):
    key = {"seed": 50, "step": 7, "stream": 8}
    rest = without(law, excluded, 20_000, **key).tolist()
    with_repeats = PopularitySampler(law, 700, unique=False, seed=50, exclude=excluded)
    assert with_repeats.sample(step=7, stream=8).negatives.ids.tolist() == rest[:700]
    unique = PopularitySampler(law, 30, seed=50)
    draw = unique.sample(step=7, stream=8, exclude=excluded)
    assert draw.negatives.ids.tolist() == list(dict.fromkeys(rest))[:30]
    draws = law.draw(20_000, **key)
    assert draws[draw.num_tries - 1] == draw.negatives.ids[-1]


@pytest.mark.parametrize("num_sampled", [1, 20, 100, 946])
def test_log_q_without_the_excluded_against_the_reference(num_sampled):
    excluded = np.array([0, *range(5, 50), *range(900, 908)])
    prob = reference.log_uniform_prob(1000)
    prob[excluded] = 0
    expected = reference.inclusion_prob(prob / prob.sum(), num_sampled)
    sampler = PopularitySampler(LogUniform(1000), num_sampled, exclude=excluded)
    assert np.exp(sampler.log_q(np.arange(1000))) == pytest.approx(expected, rel=1e-9)


def test_a_race_without_the_excluded_is_a_permutation_of_the_rest():
    draw = PopularitySampler(LogUniform(100), 97, exclude=[0, 50, 99]).sample(step=3)
    assert sorted(draw.negatives.ids.tolist()) == [*range(1, 50), *range(51, 99)]
    assert (draw.negatives.log_q == 0).all()


@pytest.mark.parametrize(("num_items", "num_sampled"), [(1000, 1), (10**6, 300), (40, 30)])
def test_poissonised_draws_are_those_of_a_poisson_number(num_items, num_sampled):
    law = LogUniform(num_items, first_id=2)
    sampler = PopularitySampler(law, num_sampled, unique="poisson", seed=60)
    for step in range(40):
        draw = sampler.sample(step=step, stream=5)
        words = stream_words(60, step, 5)
        assert draw.num_tries == poisson(sampler._time, words)
        drawn = law.draw(draw.num_tries, seed=60, step=step, stream=5).tolist()
        assert draw.negatives.ids.tolist() == list(dict.fromkeys(drawn))


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("law", [LogUniform(50, first_id=1), LogUniform(10**8)])
def test_each_querys_negatives_are_a_draw_of_their_own(law, unique, monkeypatch):
    sampler = PopularitySampler(law, 20, unique=unique, seed=3, per_query=True)
    rows = sampler.sample(np.arange(1, 101), step=2).negatives.ids
    shared = PopularitySampler(law, 20, unique=unique, seed=3)
    assert (rows[0] == shared.sample(step=2).negatives.ids).all()
    assert len(np.unique(rows, axis=0)) == 100
    assert (sampler.sample(np.arange(1, 4), step=2).negatives.ids == rows[:3]).all()
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "3")
    assert (sampler.sample(np.arange(1, 101), step=2).negatives.ids == rows).all()


def test_races_for_each_query_are_draws_of_their_own():
    draw = PopularitySampler(LogUniform(50), 50, per_query=True).sample(np.arange(20))
    assert (np.sort(draw.negatives.ids) == np.arange(50)).all()
    assert len(np.unique(draw.negatives.ids, axis=0)) == 20


def test_tries_of_a_second_round_are_counted():
    sampler = PopularitySampler(LATE, 2, seed=40)
    tries = []
    for step in range(40):
        draw = sampler.sample(step=step)
        ids, num_tries = first_occurrences(LATE, 2, seed=40, step=step)
        assert draw.negatives.ids.tolist() == ids
        assert draw.num_tries == num_tries
        tries.append(num_tries)
    # A round makes a little more tries than the expectation.
    assert max(tries) > 1.5 * sampler._time > 3000


def orders(law, num_sampled):
    """Every order of S ids with its probability under draws without replacement."""
    prob = np.exp(law.log_prob(range(law.num_items)))
    chances = {}
    for order in itertools.permutations(range(law.num_items), num_sampled):
        left = 1 - np.concatenate([[0], np.cumsum(prob[list(order)])[:-1]])
        chances[order] = np.prod(prob[list(order)] / left)
    return chances


def order_p_value(rows, chances):
    place = {order: k for k, order in enumerate(chances)}
    observed = np.bincount([place[tuple(row)] for row in rows], minlength=len(place))
    return fit.chi_square(observed, np.array(list(chances.values())))


@both_ways
@pytest.mark.parametrize(
    ("law", "num_sampled"), [(LogUniform(5), 3), (Empirical([1, 7, 2, 4]), 2), (Uniform(4), 3)]
)
def test_orders_against_enumeration(sample, law, num_sampled):
    chances = orders(law, num_sampled)
    assert sum(chances.values()) == pytest.approx(1, rel=1e-12)
    rows = [sample(law, num_sampled, step).tolist() for step in range(10_000)]
    assert order_p_value(rows, chances) > fit.LEVEL
    assert order_p_value([sorted(row) for row in rows], chances) < fit.LEVEL
    another_law = orders(Empirical([1, 1.5, 2, 2.5, 3][: law.num_items]), num_sampled)
    assert order_p_value(rows, another_law) < fit.LEVEL


def test_whole_catalogs_come_in_the_order_of_successive_draws():
    law = Empirical([1, 2, 4, 8])
    sampler = PopularitySampler(law, 4, seed=37)
    rows = [sampler.sample(step=step).negatives.ids.tolist() for step in range(10_000)]
    assert order_p_value(rows, orders(law, 4)) > fit.LEVEL
    assert order_p_value(rows, orders(Uniform(4), 4)) < fit.LEVEL


def sequence_uniforms(law, rows, rng):
    """Rows of distinct ids in draw order, turned to independent uniforms if they follow the law.

    U_j = (F(x_j−) − Σ picked below x_j + V·p(x_j)) / (1 − Σ picked), over picks before the j-th.
    """
    prob = np.exp(law.log_prob(rows))  # (R, S)
    earlier = np.tri(rows.shape[1], k=-1, dtype=bool)  # [j, i]: pick i came before pick j
    below = rows[:, None, :] < rows[:, :, None]
    picked_below = np.where(earlier & below, prob[:, None, :], 0).sum(2)
    picked = np.where(earlier, prob[:, None, :], 0).sum(2)
    free_below = law.cdf(rows - 1) - picked_below
    return (free_below + rng.uniform(size=rows.shape) * prob) / (1 - picked)


def pairs_p_value(u):
    """Chi-square of neighbours in 5 × 5 equal cells."""
    cells = np.minimum((5 * u).astype(int), 4)
    first, second = cells[:, 0:-1:2].ravel(), cells[:, 1::2].ravel()
    return fit.chi_square(np.bincount(5 * first + second, minlength=25), np.full(25, 1 / 25))


def kept_popular(law, num_sampled, step):
    """As in Merlin's PyTorch sampler: sort the distinct ids, keep the first."""
    return np.unique(law.draw(8 * num_sampled, seed=32, step=step))[:num_sampled]


def biased_to_the_head(law, num_sampled, step):
    """In draw order, but the S most popular of S + 2."""
    ids = by_rejection(law, num_sampled + 2, step)
    return ids[np.sort(np.argsort(ids)[:num_sampled])]


def without_removal(law, num_sampled, step):
    """Distinct by skipping to the next id instead of by drawing again."""
    taken = []
    for x in law.draw(num_sampled, seed=33, step=step).tolist():
        while x in taken:
            x = law.first_id + (x - law.first_id + 1) % law.num_items
        taken.append(x)
    return np.array(taken)


@pytest.mark.parametrize("law", [LogUniform(50, first_id=1), Empirical(np.arange(50) ** 2 + 1)])
def test_draw_order_gives_independent_uniforms(law):
    num_sampled, num_rows = 20, 1500
    rng = np.random.default_rng(34)

    def uniforms_of(sample):
        rows = np.array([sample(law, num_sampled, step) for step in range(num_rows)])
        assert rows.shape == (num_rows, num_sampled)
        return sequence_uniforms(law, rows, rng)

    for sample in (by_rejection, by_race):
        u = uniforms_of(sample)
        assert fit.uniform(u.ravel()) > fit.LEVEL
        assert fit.uniform(u[:, -1]) > fit.LEVEL
        assert pairs_p_value(u) > fit.LEVEL
    for wrong in (
        lambda *arguments: np.sort(by_rejection(*arguments)),
        kept_popular,
        biased_to_the_head,
        without_removal,
    ):
        assert fit.uniform(uniforms_of(wrong).ravel()) < fit.LEVEL


def test_long_races_come_in_the_order_of_arrival():
    # Few items are sorted by whichever means first finds the earliest; many are not.
    law, rng = LogUniform(3001), np.random.default_rng(38)
    rows = np.array([by_race(law, 600, step) for step in range(10)])
    u = sequence_uniforms(law, rows, rng)
    assert fit.uniform(u.ravel()) > fit.LEVEL
    assert pairs_p_value(u) > fit.LEVEL
    halves_exchanged = sequence_uniforms(law, np.roll(rows, 300, axis=1), rng)
    assert fit.uniform(halves_exchanged.ravel()) < fit.LEVEL


def test_race_and_rejection_take_as_many_tries():
    sampler = PopularitySampler(LogUniform(50), 20, seed=35)
    steps = range(2000)
    tries = [sampler.sample(step=step).num_tries for step in steps]
    nothing = np.empty(0, np.int64)
    clock = [sampler._race(stream_words(36, step, 0), nothing)[1] for step in steps]
    # Either has the same expectation; differences of independent runs have none.
    assert fit.mean(np.subtract(tries, clock), 0) > fit.LEVEL
    assert fit.mean(np.subtract(tries, 20), 0) < fit.LEVEL


# Invariants


def unique_cases():
    first_id = st.integers(0, 2**40)
    return st.one_of(
        st.builds(LogUniform, st.integers(1, 300), first_id=first_id),
        st.builds(Uniform, st.integers(1, 300), first_id=first_id),
        st.builds(
            Empirical,
            st.lists(st.sampled_from([0, 1, 2, 50, 10**6]), min_size=1, max_size=60).filter(any),
            first_id=first_id,
        ),
    )


@quietly
@given(law=unique_cases(), share=st.floats(0, 1), seed=seeds, step=words32, stream=words32)
def test_unique_samples_are_distinct_ids_of_the_law(law, share, seed, step, stream):
    ids = np.arange(law.first_id, law.first_id + law.num_items)
    can_be_drawn = ids[law.log_prob(ids) > -np.inf]
    num_sampled = max(1, round(share * len(can_be_drawn)))
    sampler = PopularitySampler(law, num_sampled, seed=seed)
    draw = sampler.sample(step=step, stream=stream)
    got = draw.negatives.ids
    assert got.shape == draw.negatives.log_q.shape == (num_sampled,)
    assert got.dtype == np.int64
    assert len(np.unique(got)) == num_sampled
    assert np.isin(got, can_be_drawn).all()
    assert (draw.negatives.log_q == sampler.log_q(got)).all()
    assert ((draw.negatives.log_q <= 0) & (draw.negatives.log_q > -np.inf)).all()
    assert np.exp(sampler.log_q(ids)).sum() == pytest.approx(num_sampled, rel=1e-9)
    again = PopularitySampler(law, num_sampled, seed=seed).sample(step=step, stream=stream)
    assert (again.negatives.ids == got).all()
    assert again.num_tries == draw.num_tries


@quietly
@given(
    law=unique_cases(), num_sampled=st.integers(1, 400), seed=seeds, step=words32, stream=words32
)
def test_samples_with_replacement_are_the_laws_draws(law, num_sampled, seed, step, stream):
    sampler = PopularitySampler(law, num_sampled, unique=False, seed=seed)
    draw = sampler.sample(step=step, stream=stream)
    expected = law.draw(num_sampled, seed=seed, step=step, stream=stream)
    assert (draw.negatives.ids == expected).all()
    assert draw.num_tries == num_sampled
    if num_sampled:
        expected = np.log(num_sampled) + law.log_prob(draw.negatives.ids)
        assert draw.negatives.log_q == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("unique", [False, True])
def test_both_ends_of_the_range_are_sampled(unique):
    law = LogUniform(40, first_id=3)
    sampler = PopularitySampler(law, 10, unique=unique)
    ids = np.concatenate([sampler.sample(step=step).negatives.ids for step in range(200)])
    assert (ids.min(), ids.max()) == (3, 42)


@pytest.mark.parametrize("unique", [False, True])
def test_samples_do_not_depend_on_threads(unique, monkeypatch):
    sampler = PopularitySampler(LogUniform(10**6), 50_000, unique=unique, seed=5)
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "1")
    one = sampler.sample(step=6)
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "2")
    two = sampler.sample(step=6)
    assert (one.negatives.ids == two.negatives.ids).all()
    assert one.num_tries == two.num_tries


@quietly
@given(
    num_items=st.integers(1, 300),
    data=st.data(),
    unique=st.sampled_from([True, False, "poisson"]),
    first_id=st.integers(0, 1000),
    seed=seeds,
    step=words32,
    stream=words32,
)
def test_excluded_ids_are_never_drawn(num_items, data, unique, first_id, seed, step, stream):
    law = Uniform(num_items, first_id=first_id)
    ids = st.integers(first_id, first_id + num_items - 1)
    excluded = np.array(data.draw(st.lists(ids, max_size=num_items - 1)), np.int64)
    left = num_items - len(set(excluded.tolist()))
    num_sampled = data.draw(st.integers(1, left))
    sampler = PopularitySampler(law, num_sampled, unique=unique, seed=seed)
    draw = sampler.sample(step=step, stream=stream, exclude=excluded)
    assert not np.isin(draw.negatives.ids, excluded).any()
    assert (law.log_prob(draw.negatives.ids) > -np.inf).all()
    total = np.exp(sampler.log_q(law.first_id + np.arange(num_items), exclude=excluded)).sum()
    assert total == pytest.approx(num_sampled, rel=1e-9)
    if unique:
        assert len(set(draw.negatives.ids.tolist())) == len(draw.negatives.ids)
    if unique != "poisson":
        assert len(draw.negatives.ids) == num_sampled


def sizes(sampler, num_steps):
    return np.array([len(sampler.sample(step=step).negatives.ids) for step in range(num_steps)])


@pytest.mark.parametrize("num_sampled", [3, 37])  # by Poisson's draws, and by the race
def test_poissonised_sizes_vary_as_independent_inclusions_do(num_sampled):
    sampler = PopularitySampler(LogUniform(40), num_sampled, unique="poisson", seed=61)
    pi = np.exp(sampler.log_q(np.arange(40)))
    size = sizes(sampler, 4000)
    variance = (pi * (1 - pi)).sum()
    assert fit.mean(size, num_sampled) > fit.LEVEL
    assert fit.mean((size - num_sampled) ** 2, variance) > fit.LEVEL
    # Poisson sizes, those of draws with replacement, would vary more.
    assert fit.mean((size - num_sampled) ** 2, num_sampled) < fit.LEVEL


@pytest.mark.parametrize("mean", [0.01, 3.0, 50.0, 1e4, 1e9])
def test_poisson_numbers(mean):
    counts = np.array([poisson(mean, stream_words(62, step, 0)) for step in range(2000)])
    assert fit.mean(counts, mean) > fit.LEVEL
    assert fit.mean((counts - mean) ** 2, mean) > fit.LEVEL
    u = [uniform_53(*philox_at_the_end(step)[:2]) for step in range(2000)]
    assert (counts == stats.poisson.ppf(u, mean)).all()


def philox_at_the_end(step):
    """The words of the stream's last counter."""
    key = stream_words(62, step, 0)
    return philox(u64(2**32 - 1), u64(2**32 - 1), *key[2:], *key[:2])


def test_a_worker_draws_the_same_among_any_number_of_workers():
    sampler = PopularitySampler(LogUniform(10**6), 64)
    four = [sampler.sample(step=9, stream=rank).negatives.ids for rank in range(4)]
    two = [sampler.sample(step=9, stream=rank).negatives.ids for rank in range(2)]
    assert all((a == b).all() for a, b in zip(two, four, strict=False))
    assert len({tuple(ids.tolist()) for ids in four}) == 4


def test_samples_do_not_depend_on_the_positives():
    sampler = PopularitySampler(LogUniform(1000), 100, seed=6)
    alone = sampler.sample(step=1)
    beside = sampler.sample(np.arange(1000), step=1)
    assert (alone.negatives.ids == beside.negatives.ids).all()
    assert alone.positives is None
    assert (beside.positives.log_q[beside.negatives.ids] == beside.negatives.log_q).all()


@pytest.mark.parametrize(
    "changed", [dict(seed=1), dict(step=1), dict(stream=1), dict(seed=2**32), dict(step=2**31)]
)
def test_other_streams_give_other_samples(changed):
    def ids(seed=0, step=0, stream=0):
        sampler = PopularitySampler(Uniform(2**40), 1000, seed=seed)
        return sampler.sample(step=step, stream=stream).negatives.ids

    assert len(np.intersect1d(ids(), ids(**changed))) == 0


@pytest.mark.parametrize("num_items", [1, 2, 31, 1009])
def test_whole_catalogs_are_permutations(num_items):
    for law in (LogUniform(num_items, first_id=2), Uniform(num_items, first_id=2)):
        sampler = PopularitySampler(law, num_items)
        draws = [sampler.sample(step=step) for step in range(5)]
        for draw in draws:
            assert sorted(draw.negatives.ids) == list(range(2, num_items + 2))
            assert (draw.negatives.log_q == 0).all()
        if num_items > 2:
            assert len({tuple(draw.negatives.ids.tolist()) for draw in draws}) > 1


@pytest.mark.parametrize("counts", [[1e12, 1, 1, 1], [1, 0, 1e12, 1, 0, 1], [1e300, 1e-5, 1]])
def test_extreme_popularities_never_stall(counts):
    law = Empirical(counts)
    available = np.flatnonzero(np.exp(law.log_prob(range(len(counts)))))
    for num_sampled in range(1, len(available) + 1):
        sampler = PopularitySampler(law, num_sampled)
        for step in range(20):
            ids = sampler.sample(step=step).negatives.ids
            assert len(set(ids.tolist())) == num_sampled
            assert np.isin(ids, available).all()
            if num_sampled:
                assert np.argmax(counts) in ids


def test_items_too_rare_to_come_in_time_do_not_overflow():
    # 1e-320 of all draws: the race takes longer than a float can say.
    draw = PopularitySampler(Empirical([1, 1e-320]), 2).sample()
    assert draw.negatives.ids.tolist() == [0, 1]


@pytest.mark.parametrize("num_items", [1, 2, 4098, 10**6, 10**9, 2**40])
def test_as_many_as_there_are_items_can_be_asked_for(num_items):
    PopularitySampler(LogUniform(num_items), num_items)
    PopularitySampler(Uniform(num_items), num_items)


def test_candidates_keep_what_they_hold():
    given_ids = np.array([1, 2], np.int32)
    positives = Candidates(ids=given_ids, embeddings=np.eye(2), bias=np.zeros(2))
    for sampler in (
        PopularitySampler(LogUniform(10), 3),
        InBatchSampler(LogUniform(10)),
        MixtureSampler([PopularitySampler(LogUniform(10), 3), InBatchSampler(LogUniform(10))]),
    ):
        got = sampler.sample(positives).positives
        assert got.ids is given_ids
        assert got.embeddings is positives.embeddings
        assert got.bias is positives.bias
        assert positives.log_q is None
        assert got.log_q.shape == (2,)


def test_in_batch_takes_a_law_or_counts():
    counts, ids = [6, 3, 1], np.array([0, 1, 2, 2])
    by_law = InBatchSampler(Empirical(counts)).sample(ids).negatives.log_q
    assert (InBatchSampler(counts).sample(ids).negatives.log_q == by_law).all()
    assert (InBatchSampler(np.array(counts)).log_q(ids, batch_size=4) == by_law).all()


def test_equal_seeds_in_a_mixture_do_not_make_equal_draws():
    law = Uniform(2**40)
    sampler = MixtureSampler([PopularitySampler(law, 500, seed=1) for _ in range(3)])
    # Members and workers: nobody repeats another's ids.
    ids = [sampler.sample(stream=stream).negatives.ids for stream in range(4)]
    assert len(np.unique(ids)) == 4 * 1500


def test_equal_seeds_in_nested_mixtures_do_not_make_equal_draws():
    def source():
        return PopularitySampler(Uniform(2**40), 500, seed=1)

    sampler = MixtureSampler([MixtureSampler([source(), source()]), source()])
    ids = [sampler.sample(stream=stream).negatives.ids for stream in range(4)]
    assert len(np.unique(ids)) == 4 * 1500


@pytest.mark.parametrize("weighing", ["one", "tail"])
def test_mixture_log_q_weighs_every_item_once(weighing):
    # E Σ_candidates g/q = Σ_all g: here of three sources, repeats between them kept.
    num_items, batch_size = 500, 32
    g = np.ones(num_items) if weighing == "one" else np.arange(num_items) ** 2.0
    law = LogUniform(num_items)
    source = PopularitySampler(law, 80, seed=7)
    sampler = MixtureSampler(
        [InBatchSampler(law), source, PopularitySampler(Uniform(num_items), 40, unique=False)]
    )
    batches = law.draw((1500, batch_size), seed=50)
    draws = [sampler.sample(batches[step], step=step).negatives for step in range(1500)]
    estimates = [(g[n.ids] / np.exp(n.log_q)).sum() for n in draws]
    assert fit.mean(estimates, g.sum()) > fit.LEVEL
    # Each source's own log q, as if the others were not there, counts the items three times.
    own = np.exp(source.log_q(np.arange(num_items)))
    estimates = [(g[n.ids] / own[n.ids]).sum() for n in draws]
    assert fit.mean(estimates, g.sum()) < fit.LEVEL


def test_mixture_counts_are_as_expected():
    law, num_items = LogUniform(30), 30
    sampler = MixtureSampler(
        [InBatchSampler(law), PopularitySampler(Uniform(num_items), 20, unique=False, seed=8)]
    )
    batches = law.draw((3000, 10), seed=51)
    ids = np.concatenate(
        [sampler.sample(batches[step], step=step).negatives.ids for step in range(3000)]
    )
    expected = np.exp(sampler.log_q(np.arange(num_items), batch_size=10))
    observed = np.bincount(ids, minlength=num_items)
    assert expected.sum() == pytest.approx(30, rel=1e-12)
    assert fit.chi_square(observed, expected / 30) > fit.LEVEL
    # Without the batch's share.
    assert fit.chi_square(observed, np.full(num_items, 1 / num_items)) < fit.LEVEL


# Errors


@pytest.mark.parametrize(
    ("law", "num_sampled", "available"),
    [
        (LogUniform(5), 6, 5),
        (Uniform(10**9), 10**9 + 1, 10**9),
        (LogUniform(10**9), 10**9 + 1, 10**9),
        (Empirical([3, 0, 1, 0]), 3, 2),
    ],
)
def test_more_unique_negatives_than_items(law, num_sampled, available):
    with pytest.raises(ValueError, match=f"num_sampled: expected at most {available}, .* unique"):
        PopularitySampler(law, num_sampled)
    PopularitySampler(law, num_sampled, unique=False)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(num_sampled=-1), ValueError, "num_sampled: expected an integer from 1"),
        (dict(num_sampled=2.0), TypeError, "num_sampled: expected an integer, got 2.0"),
        (dict(num_sampled=True), TypeError, "num_sampled: expected an integer, got True"),
        (dict(num_sampled=2, seed=-1), ValueError, "seed: expected an integer from 0"),
        (dict(num_sampled=2, seed=2**64), ValueError, "seed: expected an integer from 0"),
        (dict(num_sampled=2, seed=0.5), TypeError, "seed: expected an integer, got 0.5"),
    ],
)
def test_bad_samplers(arguments, error, text):
    with pytest.raises(error, match=text):
        PopularitySampler(LogUniform(5), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(step=2**32), ValueError, "step: expected an integer from 0 to 4294967295"),
        (dict(step=-1), ValueError, "step: expected an integer from 0 to 4294967295"),
        (dict(step=1.5), TypeError, "step: expected an integer, got 1.5"),
        (dict(stream=2**32), ValueError, "stream: expected an integer from 0 to 4294967295"),
        (dict(device="abacus"), ValueError, "device: expected one of .* got 'abacus'"),
    ],
)
def test_bad_samples(arguments, error, text):
    with pytest.raises(error, match=text):
        PopularitySampler(LogUniform(5), 2).sample(**arguments)


SAMPLERS = [
    PopularitySampler(LogUniform(5, first_id=1), 2),
    PopularitySampler(LogUniform(5, first_id=1), 5),
    PopularitySampler(Empirical([0, 1, 2, 3, 4, 5]), 2, unique=False),
    InBatchSampler(LogUniform(5, first_id=1)),
    InBatchSampler([0, 1, 2, 3, 4, 5]),
    MixtureSampler([InBatchSampler(LogUniform(5, first_id=1))]),
    MixtureSampler([PopularitySampler(LogUniform(5, first_id=1), 2)]),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("ids", [[0], [1, 5, 6], [3, -1, 0]])
def test_positives_that_cannot_be_drawn_have_no_log_q(sampler, ids):
    # The loss refuses −inf, unless it does not use the positives' log q.
    draw = sampler.sample(np.array(ids))
    drawable = (np.array(ids) >= 1) & (np.array(ids) <= 5)
    assert (np.isfinite(draw.positives.log_q) == drawable).all()


def test_a_mixture_takes_positives_that_one_source_can_draw():
    sources = [InBatchSampler([5, 1, 0]), PopularitySampler(Uniform(3), 2)]
    draw = MixtureSampler(sources).sample(np.array([0, 2]))
    expected = [np.log(2 * 5 / 6 + 2 / 3), np.log(2 / 3)]
    assert draw.positives.log_q == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("positives", "error", "text"),
    [
        (np.array([1.0, 2.0]), TypeError, "positives.ids: expected an integer dtype, got float64"),
        (np.array([True]), TypeError, "positives.ids: expected an integer dtype, got bool"),
        (np.array([[1, 2]]), ValueError, r"positives.ids: expected shape \(B,\), got \(1, 2\)"),
        (np.array(1), ValueError, r"positives.ids: expected shape \(B,\), got \(\)"),
        (Candidates(embeddings=np.eye(2)), ValueError, "positives.ids: expected an array"),
        ([1, 2], TypeError, "positives.ids: expected an array"),
    ],
)
def test_bad_positives(sampler, positives, error, text):
    with pytest.raises(error, match=text):
        sampler.sample(positives)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if isinstance(s, PopularitySampler)])
def test_log_q_of_ids_that_are_no_integers(sampler):
    with pytest.raises(TypeError, match="ids: expected an integer dtype, got float64"):
        sampler.log_q([1.0])


def test_in_batch_needs_a_batch():
    with pytest.raises(ValueError, match="positives: expected the batch's items, got None"):
        InBatchSampler([1, 2]).sample()
    with pytest.raises(ValueError, match="batch_size: expected the number of items"):
        InBatchSampler([1, 2]).log_q([0])
    with pytest.raises(ValueError, match="InBatchSampler has no popularity, hence no log q"):
        InBatchSampler().log_q([0], batch_size=3)
    with pytest.raises(ValueError, match="counts: expected numbers ≥ 0"):
        InBatchSampler([1, -2])


def test_mixtures_need_sources_with_log_q():
    with pytest.raises(ValueError, match="samplers: expected at least one, got none"):
        MixtureSampler([])
    with pytest.raises(ValueError, match="positives: expected the batch's items, got None"):
        MixtureSampler([InBatchSampler([1, 2])]).sample()
    with pytest.raises(ValueError, match="InBatchSampler has no popularity, hence no log q"):
        MixtureSampler([InBatchSampler()]).sample(np.array([1]))


def test_mixture_refuses_a_stream_that_its_members_cannot_have():
    source = PopularitySampler(LogUniform(5), 2)
    with pytest.raises(ValueError, match="stream: expected an integer from 0 to 2147483647"):
        MixtureSampler([source, source]).sample(stream=2**31)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PopularitySampler(None, 2), "law: expected a popularity law, got None"),
        (lambda: MixtureSampler(PopularitySampler(LogUniform(5), 2)), "samplers: expected a seq"),
    ],
)
def test_what_is_no_law_and_no_sequence(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_samplers_survive_pickling_and_stay_small():
    law = Empirical(np.arange(1.0, 10_001), power=0.5, first_id=3)
    sampler = PopularitySampler(law, 100, seed=8)
    before = len(pickle.dumps(sampler.law))
    drawn = sampler.sample(step=2).negatives.ids
    assert len(pickle.dumps(sampler.law)) == before < 9 * 10_001
    again = pickle.loads(pickle.dumps(sampler))
    assert again == sampler
    assert hash(again.law) == hash(law)
    assert (again.sample(step=2).negatives.ids == drawn).all()
    assert Empirical([1, 2]) != Empirical([2, 1])


def test_many_distinct_counts_do_not_stall():
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.random(100) * 1e15 + 1e15, rng.random(200_000)])
    sampler = PopularitySampler(Empirical(counts), 100)
    start = time.process_time()
    assert np.exp(sampler.log_q(range(len(counts)))).sum() == pytest.approx(100)
    assert time.process_time() - start < 3


def test_merged_repeats_by_hand():
    negatives = Candidates(
        np.array([7, 2, 7, 7]), np.array([[7.0], [2], [7], [7]]), np.array([-1.0, -2, -1, -1])
    )
    merged = merge_repeats(negatives)
    assert merged.ids.tolist() == [2, 7]
    assert merged.embeddings.tolist() == [[2], [7]]
    assert merged.log_q.tolist() == [-2, -1 - np.log(3)]
    assert merged.bias is None


@pytest.mark.parametrize("hits", [False, True])
def test_merged_repeats_give_the_same_loss_and_gradients(hits):
    rng = np.random.default_rng(0)
    law = LogUniform(50)
    table, u = rng.normal(size=(50, 8)), rng.normal(size=(9, 8))
    draw = PopularitySampler(law, 200, unique=False).sample(rng.integers(0, 50, 9))
    positives = draw.positives._replace(
        ids=draw.positives.ids if hits else None, embeddings=table[draw.positives.ids]
    )
    negatives = draw.negatives._replace(embeddings=table[draw.negatives.ids])
    merged = merge_repeats(negatives)
    assert len(merged.ids) < 50
    loss, grads = sampled_softmax_value_and_grad(u, positives, negatives)
    merged_loss, merged_grads = sampled_softmax_value_and_grad(u, positives, merged)
    assert merged_loss == pytest.approx(loss, rel=1e-13)
    assert merged_grads.queries == pytest.approx(grads.queries, rel=1e-10, abs=1e-14)
    rows = np.zeros_like(table)
    np.add.at(rows, negatives.ids, grads.negatives.embeddings)
    assert merged_grads.negatives.embeddings == pytest.approx(rows[merged.ids], abs=1e-14)
    # Without log of the copies it is another loss.
    wrong = merged._replace(log_q=law.log_prob(merged.ids) + np.log(200))
    assert sampled_softmax_value_and_grad(u, positives, wrong)[0] != pytest.approx(loss, rel=1e-3)


def test_copies_with_log_q_of_their_own_are_taken_together():
    log_q = np.array([0.5, -1.0, 2.0, -np.inf, -np.inf])
    merged = merge_repeats(Candidates(np.array([4, 2, 4, 9, 9]), log_q=log_q))
    expected = [-1.0, -np.log(np.exp(-0.5) + np.exp(-2.0)), -np.inf]
    assert merged.ids.tolist() == [2, 4, 9]
    assert merged.log_q == pytest.approx(expected, rel=1e-14)


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"negatives: expected ids and log_q of shape \(S,\), got"):
        merge_repeats(Candidates(np.array([1, 1])))
    with pytest.raises(ValueError, match=r"negatives.log_q: expected shape \(S,\)"):
        merge_repeats(Candidates(np.array([1, 1]), log_q=np.zeros(3)))


# Edges of the samplers' claims


def test_an_excluded_positive_is_certain_in_a_mixture_too():
    sampler = PopularitySampler(LogUniform(1000), 100, exclude=[17])
    positives = np.array([17, 3])
    mixed = MixtureSampler([sampler, PopularitySampler(LogUniform(1000), 50, exclude=[17])])
    assert MixtureSampler([sampler]).sample(positives).positives.log_q[0] == 0
    assert mixed.sample(positives).positives.log_q[0] == 0
    # Not so where another source may draw it.
    other = MixtureSampler([sampler, PopularitySampler(LogUniform(1000), 50)])
    assert other.sample(positives).positives.log_q[0] == other.log_q([17])[0] < 0


def test_a_bias_on_one_source_alone_is_refused():
    ids, x = np.arange(4), np.ones((4, 2))
    bank = CachedSampler(9, LogUniform(10))
    bank.update(Candidates(ids, x))
    sampler = MixtureSampler([InBatchSampler(LogUniform(10)), bank])
    with pytest.raises(ValueError, match="samplers: expected all sources to give a bias or none"):
        sampler.sample(Candidates(ids, x, bias=np.ones(4)))


@pytest.mark.parametrize("option", ["by_tries", "per_query"])
def test_what_cannot_be_mixed(option):
    sampler = PopularitySampler(LogUniform(10), 3, **{option: True})
    with pytest.raises(ValueError, match="by_tries and per_query cannot be mixed"):
        MixtureSampler([InBatchSampler(LogUniform(10)), sampler])


def test_an_estimate_of_presence_is_not_one_of_copies():
    with pytest.raises(
        ValueError, match='popularity: expected a FrequencyEstimator with mode="cou'
    ):
        InBatchSampler(FrequencyEstimator(10, decay=0.1, mode="probability"))


@pytest.mark.parametrize("counts", [[1e300, 1.0], [1e308, 1.0], [1.0] * 10 + [1e-305] * 10])
def test_a_whole_catalog_is_certain_however_steep(counts):
    sampler = PopularitySampler(Empirical(counts), len(counts))
    assert (sampler.log_q(np.arange(len(counts))) == 0).all()


@pytest.mark.parametrize("unique", [True, "poisson"])
@pytest.mark.parametrize(
    ("num_items", "exponent", "num_sampled"),
    [(2**40, 3.0, 5000), (2**31, 3.0, 3000), (2**40, 20.0, 5)],
)
def test_what_would_take_forever_is_refused(num_items, exponent, num_sampled, unique):
    sampler = PopularitySampler(ZipfMandelbrot(num_items, exponent), num_sampled, unique=unique)
    with pytest.raises(ValueError, match=r"num_sampled: expected a number .* 2e\+09 draws"):
        sampler.sample()


def test_draws_with_repeats_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_TRIES", 10)
    assert PopularitySampler(Uniform(5), 20, unique=False).sample().num_tries == 20
    with pytest.raises(ValueError, match="num_sampled: expected a number of distinct ids"):
        PopularitySampler(Uniform(10**6), 20).sample()


def test_copies_of_very_different_log_q():
    for log_q, expected in (([1000.0, 0.0], 0.0), ([np.inf, 0.0], 0.0), ([0.0, np.inf], 0.0)):
        merged = merge_repeats(Candidates(np.array([4, 4]), log_q=np.array(log_q)))
        assert merged.log_q == pytest.approx([expected], abs=1e-12)
