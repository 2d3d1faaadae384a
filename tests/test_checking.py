import numpy as np
import pytest

from zipfneg import (
    Empirical,
    FrequencyEstimator,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    Uniform,
    ZipfMandelbrot,
    check_sampler,
)

LAW = LogUniform(1000, first_id=1)
IDS = np.arange(1, 1001)


def batch(step, size=64):
    return LAW.draw(size, seed=99, step=step)


class WithLogQ:
    """A sampler with another log q than its own."""

    def __init__(self, sampler, log_q):
        self.sampler, self.wrong = sampler, log_q

    def sample(self, positives=None, *, step=0):
        draw = self.sampler.sample(positives, step=step)
        log_q = self.log_q(draw.negatives.ids)
        return draw._replace(negatives=draw.negatives._replace(log_q=log_q))

    def log_q(self, ids, *, batch_size=None):
        return self.wrong(np.asarray(ids))


def failed(report):
    return " ".join(check.name for check in report.failures)


@pytest.mark.parametrize(
    "sampler",
    [
        PopularitySampler(LogUniform(1000), 100),
        PopularitySampler(LogUniform(1000, first_id=1), 500),
        PopularitySampler(LogUniform(1000), 1000),
        PopularitySampler(LogUniform(20_000), 1000, unique=False),
        PopularitySampler(ZipfMandelbrot(5000, 1.3, 2.0, first_id=3), 300),
        PopularitySampler(Uniform(300), 30, seed=5),
        PopularitySampler(Empirical([5, 0, 3, 1, 0.5] * 40, power=0.75), 100),
        PopularitySampler(LogUniform(1), 1),
        PopularitySampler(LogUniform(1000), 100, exclude=[0, 2, *range(500, 600)]),
        PopularitySampler(LogUniform(1000), 890, exclude=[0, 2, *range(500, 600)]),
        PopularitySampler(LogUniform(1000), 100, exclude=[0, 2, 500], unique=False),
        PopularitySampler(LogUniform(1000), 5, unique="poisson"),
        PopularitySampler(LogUniform(1000), 990, unique="poisson"),
        PopularitySampler(ZipfMandelbrot(500, 0.9), 50, unique="poisson", exclude=[0, 1]),
    ],
    ids=lambda sampler: f"{type(sampler.law).__name__}-{sampler.num_sampled}",
)
def test_popularity_samplers_are_what_they_claim(sampler):
    report = check_sampler(sampler)
    assert report, str(report)


def test_poissonised_log_q_is_exact_where_that_of_a_fixed_size_is_not():
    options = {"num_draws": 40_000, "tolerance": 0.0}
    exact = PopularitySampler(LogUniform(10), 2, unique="poisson")
    assert check_sampler(exact, **options), str(check_sampler(exact, **options))
    assert not check_sampler(PopularitySampler(LogUniform(10), 2), **options)


@pytest.mark.parametrize("unique", [True, False])
def test_each_querys_own_negatives_are_what_they_claim(unique):
    sampler = PopularitySampler(LogUniform(1000), 100, unique=unique, per_query=True)
    for batch in (np.array([3]), np.array([3, 4, 999, 3])):
        assert (report := check_sampler(sampler, positives=lambda step, b=batch: b)), str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_items", "num_sampled", "num_draws"),
    [
        (1000, 100, 100_000),
        (1000, 500, 100_000),
        (10_000, 1000, 100_000),
        (100_000, 1000, 100_000),
        (1_000_000, 8192, 20_000),
    ],
)
def test_log_q_of_unique_draws_over_many_steps(num_items, num_sampled, num_draws):
    sampler = PopularitySampler(LogUniform(num_items), num_sampled, seed=11)
    report = check_sampler(sampler, num_draws=num_draws)
    assert report, str(report)
    for check in report.checks:
        if check.name.startswith("copies of ids of group"):
            assert check.observed == pytest.approx(check.expected, rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        PopularitySampler(LAW, 500, exclude=[5, 17], seed=12),
        PopularitySampler(LAW, 500, unique="poisson", seed=12),
        MixtureSampler([InBatchSampler(LAW), PopularitySampler(LAW, 500, seed=12)]),
        MixtureSampler([PopularitySampler(LAW, 500), PopularitySampler(Uniform(1001), 200)]),
    ],
    ids=["excluded", "poissonised", "in batch and unique", "two laws"],
)
def test_log_q_of_other_samplers_over_many_steps(sampler):
    positives = batch if isinstance(sampler, MixtureSampler) else None
    report = check_sampler(sampler, ids=np.arange(1001), positives=positives, num_draws=100_000)
    assert report, str(report)
    for check in report.checks:
        if check.name.startswith("copies of ids of group"):
            assert check.observed == pytest.approx(check.expected, rel=0.003)


@pytest.mark.parametrize(
    "sampler",
    [
        InBatchSampler(LAW),
        MixtureSampler([InBatchSampler(LAW), PopularitySampler(LAW, 50)]),
        MixtureSampler([PopularitySampler(LAW, 50), PopularitySampler(Uniform(1001), 50)]),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_sources_and_mixtures_are_what_they_claim(sampler):
    report = check_sampler(sampler, ids=np.arange(1001), positives=batch)
    assert report, str(report)


def test_an_estimated_popularity_is_right_where_it_saw_enough():
    estimator = FrequencyEstimator(100_003, decay=0.002)
    for step in range(4000):
        estimator.update(LAW.draw(64, seed=7, step=step), step)
    sampler = InBatchSampler(estimator)
    report = check_sampler(sampler, ids=IDS, positives=batch, tolerance=0.25)
    assert not any("group 1 " in check.name for check in report.failures), str(report)


@pytest.mark.parametrize(
    ("log_q", "text"),
    [
        # S in place of the number of tries.
        (lambda ids: np.log(-np.expm1(100 * np.log1p(-np.exp(LAW.log_prob(ids))))), "group"),
        # The table shifted by one.
        (lambda ids: PopularitySampler(LAW, 100).log_q(np.maximum(ids - 1, 1)), "copies of id"),
        # P itself, for S·P.
        (LAW.log_prob, "copies of id"),
        # The log q of draws with replacement.
        (lambda ids: LAW.log_prob(ids) + np.log(100), "copies of id 1 "),
    ],
    ids=["tries", "shift", "share", "replacement"],
)
def test_a_wrong_log_q_is_named(log_q, text):
    report = check_sampler(WithLogQ(PopularitySampler(LAW, 100), log_q), ids=IDS)
    assert not report
    assert text in failed(report) + " "
    assert "FAILED" in str(report)


def test_a_mixture_that_forgets_its_other_source_is_rejected():
    mixture = MixtureSampler([PopularitySampler(LAW, 50), PopularitySampler(LAW, 50)])
    assert check_sampler(mixture, ids=IDS, positives=batch)
    assert not check_sampler(WithLogQ(mixture, mixture.samplers[0].log_q), ids=IDS)


def test_a_sampler_for_another_popularity_is_rejected():
    assert not check_sampler(InBatchSampler(Uniform(1001)), ids=IDS, positives=batch)


def test_draws_that_do_not_repeat_or_never_change_are_named():
    class Restless:
        def __init__(self, calls_matter):
            self.calls, self.calls_matter = 0, calls_matter

        def sample(self, positives=None, *, step=0):
            self.calls += 1
            return PopularitySampler(LAW, 9).sample(step=self.calls * self.calls_matter)

        log_q = PopularitySampler(LAW, 9).log_q

    assert "again gives the same" in failed(check_sampler(Restless(1), ids=IDS, num_draws=50))
    assert "another step" in failed(check_sampler(Restless(0), ids=IDS, num_draws=50))


def test_ids_out_of_range_are_named():
    report = check_sampler(PopularitySampler(LAW, 9), ids=IDS[:-500])
    assert "outside" in failed(report)


def test_the_range_must_be_known():
    with pytest.raises(ValueError, match="ids: expected all ids that the sampler can give"):
        check_sampler(InBatchSampler(LAW), positives=batch)


def test_nan_and_infinite_log_q_are_named():
    for value in (np.nan, np.inf):
        wrong = WithLogQ(
            PopularitySampler(LAW, 9), lambda ids, value=value: np.full(ids.shape, value)
        )
        assert not check_sampler(wrong, ids=IDS, num_draws=20)

    class BrokenDraw(WithLogQ):
        def sample(self, positives=None, *, step=0):
            draw = self.sampler.sample(positives, step=step)
            log_q = np.full(draw.negatives.ids.shape, np.nan)
            return draw._replace(negatives=draw.negatives._replace(log_q=log_q))

    sampler = PopularitySampler(LAW, 9)
    report = check_sampler(BrokenDraw(sampler, sampler.log_q), ids=IDS, num_draws=20)
    assert "log q of the negatives" in failed(report)


def test_a_wrong_log_q_of_the_positives_is_named():
    class WrongPositives(WithLogQ):
        def sample(self, positives=None, *, step=0):
            draw = self.sampler.sample(positives, step=step)
            return draw._replace(positives=draw.positives._replace(log_q=np.full(64, -7.0)))

    sampler = PopularitySampler(LAW, 9)
    wrong = WrongPositives(sampler, sampler.log_q)
    report = check_sampler(wrong, ids=IDS, positives=batch, num_draws=20)
    assert "log q of the positives" in failed(report)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_groups": 0}, "num_groups: expected an integer from 1"),
        ({"error_rate": 0}, "error_rate: expected a probability, got 0"),
        ({"tolerance": -1}, "tolerance: expected a number from 0 to 1, got -1"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        check_sampler(PopularitySampler(LAW, 9), **options)
