import numpy as np
import pytest

from zipfneg import Candidates, FrequencyEstimator, InBatchSampler


def zipf_batches(num_items=50, size=32, steps=3000, seed=0):
    p = 1 / np.arange(1, num_items + 1)
    p /= p.sum()
    rng = np.random.default_rng(seed)
    return p, rng.choice(num_items, (steps, size), p=p)


def bucket_by_bucket(batches, bucket_of, decay):
    """The rule as it stands, in plain Python: the copies of a batch share the gap."""
    seen_at, gap = {}, {}
    for t, batch in enumerate(batches):
        buckets = [bucket_of(item) for item in batch]
        for h in set(buckets):
            copies = buckets.count(h)
            for _ in range(copies):
                share = (t - seen_at.get(h, -1)) / copies
                gap[h] = (1 - decay) * gap[h] + decay * share if h in gap else share
            seen_at[h] = t
    return gap


def test_regular_sightings_by_hand():
    estimator = FrequencyEstimator(10_000, decay=0.5)
    for step in (0, 3, 6):
        estimator.update(np.array([7]), step)
    # G: 1, then (1 + 3)/2, then (2 + 3)/2
    assert np.exp(estimator.log_q([7])) == pytest.approx([1 / 2.5])
    # Never seen in 7 steps.
    assert np.exp(estimator.log_q([8])) == pytest.approx([1 / 8])
    assert np.exp(FrequencyEstimator(9, decay=1, prior=0.25).log_q([8])) == pytest.approx([0.25])


@pytest.mark.parametrize("decay", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("num_buckets", [7, 100_000])
def test_batches_equal_one_bucket_after_the_other(decay, num_buckets):
    _, batches = zipf_batches(steps=60)
    estimator = FrequencyEstimator(num_buckets, decay=decay, seed=3)
    for step, batch in enumerate(batches):
        estimator.update(batch, step)
    gaps = bucket_by_bucket(batches, lambda i: int(estimator._buckets(np.array([i]))[0, 0]), decay)
    for item in np.unique(batches):
        bucket = int(estimator._buckets(np.array([item]))[0, 0])
        with np.errstate(divide="ignore"):
            expected = -np.log(gaps[bucket])
        assert estimator.log_q([item])[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("copies", [1, 10, 1000])
@pytest.mark.parametrize("decay", [0.05, 1.0])
def test_many_copies_are_counted_as_many(copies, decay):
    estimator = FrequencyEstimator(100, decay=decay)
    for step in range(300):
        estimator.update(np.full(copies, 7), step)
    assert np.exp(estimator.log_q([7])) == pytest.approx([copies])


def test_estimates_converge_to_what_the_mode_says():
    p, batches = zipf_batches(steps=6000)
    expected = {"count": 32 * p, "probability": 1 - (1 - p) ** 32}
    found = {}
    for mode in expected:
        estimator = FrequencyEstimator(100_003, decay=0.01, mode=mode)
        readings = []
        for step, batch in enumerate(batches):
            estimator.update(batch, step)
            if step > 3000 and step % 20 == 0:
                readings.append(-estimator.log_q(np.arange(50)))
        # The mean gap is unbiased; read between updates it is 1/rate.
        found[mode] = 1 / np.exp(readings).mean(axis=0)
        assert found[mode] == pytest.approx(expected[mode], rel=0.1)
    # The two differ for the head, and each would be refused in the other's place.
    assert found["count"][:3] != pytest.approx(expected["probability"][:3], rel=0.3)


def test_more_hashes_are_hurt_less_by_collisions():
    p, batches = zipf_batches()

    def error(num_hashes):
        estimator = FrequencyEstimator(60, decay=0.02, num_hashes=num_hashes, seed=1)
        for step, batch in enumerate(batches):
            estimator.update(batch, step)
        return np.abs(estimator.log_q(np.arange(50)) - np.log(32 * p)).mean()

    assert error(4) < 0.6 * error(1)


@pytest.mark.parametrize("mode", ["count", "probability"])
def test_two_workers_merge_into_one_stream(mode):
    p, batches = zipf_batches(steps=4000)
    halves = [FrequencyEstimator(100_003, decay=0.01, mode=mode) for _ in range(2)]
    for step, batch in enumerate(batches):
        halves[0].update(batch[:16], step)
        halves[1].update(batch[16:], step)
    merged = np.exp(halves[0].merge(halves[1]).log_q(np.arange(10)))
    expected = 32 * p[:10] if mode == "count" else 1 - (1 - p[:10]) ** 32
    assert merged == pytest.approx(expected, rel=0.35)
    alone = np.exp(halves[0].log_q(np.arange(3, 10)))
    assert alone.mean() < 0.7 * expected[3:].mean()


def test_a_restored_estimator_goes_on_alike():
    _, batches = zipf_batches(steps=40)
    one = FrequencyEstimator(500, decay=0.1, num_hashes=2, mode="probability", prior=0.1, seed=5)
    for step in range(20):
        one.update(batches[step], step)
    two = FrequencyEstimator.from_state(one.state())
    for step in range(20, 40):
        one.update(batches[step], step)
        two.update(batches[step], step)
    assert (one.log_q(range(60)) == two.log_q(range(60))).all()


def test_it_gives_in_batch_negatives_their_log_q():
    estimator = FrequencyEstimator(1000, decay=0.5)
    estimator.update(np.array([4, 4, 9]), 0)
    positives = Candidates(ids=np.array([4, 9]), embeddings=np.eye(2))
    draw = InBatchSampler(estimator).sample(positives)
    assert (draw.negatives.log_q == estimator.log_q([4, 9])).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: FrequencyEstimator(0, decay=0.1), ValueError, "num_buckets: expected an integer"),
        (lambda: FrequencyEstimator(9, decay=0), ValueError, r"decay: expected a number in \(0, 1"),
        (lambda: FrequencyEstimator(9, decay=0.1, mode="x"), ValueError, "mode: expected one of"),
        (lambda: FrequencyEstimator(9, decay=0.1, prior=0), ValueError, "prior: expected a posit"),
        (
            lambda: FrequencyEstimator(9, decay=0.1).update(np.ones(2), 0),
            TypeError,
            "ids: expected an integer dtype, got float64",
        ),
        (
            lambda: FrequencyEstimator(9, decay=0.1).merge(FrequencyEstimator(8, decay=0.1)),
            ValueError,
            "other: expected the settings",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_steps_must_rise():
    estimator = FrequencyEstimator(9, decay=0.1)
    estimator.update(np.array([1]), 5)
    with pytest.raises(ValueError, match="step: expected above 5, the last one, got 5"):
        estimator.update(np.array([1]), 5)


def test_a_stream_may_start_at_any_step():
    early, late = (FrequencyEstimator(1000, decay=0.02) for _ in range(2))
    for step in range(300):
        ids = np.array([1, 1, 2 + step % 4])
        early.update(ids, step)
        late.update(ids, 50_000 + step)
    assert (early.log_q(range(9)) == late.log_q(range(9))).all()


def test_a_state_that_is_not_whole_is_refused():
    state = FrequencyEstimator(9, decay=0.1).state()
    del state["gap"]
    with pytest.raises(ValueError, match=r"state: expected first_step, .* missing gap"):
        FrequencyEstimator.from_state(state)
