import json
import pickle

import numpy as np
import pytest

from zipfneg import (
    CachedSampler,
    Candidates,
    ContrastiveOutput,
    Empirical,
    FrequencyEstimator,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    Uniform,
    ZipfMandelbrot,
    from_state,
    to_state,
)


def learned_estimator():
    estimator = FrequencyEstimator(50, decay=0.1, num_hashes=2, prior=0.1)
    for step in range(20):
        estimator.update(LogUniform(30).draw(8, seed=1, step=step), step)
    return estimator


def filled_bank(**options):
    bank = CachedSampler(7, **options)
    for step in range(3):
        ids = LogUniform(30).draw(5, seed=2, step=step)
        bank.update(Candidates(ids, embeddings=np.full((5, 2), float(step))))
    return bank


SAMPLERS = {
    "every setting": PopularitySampler(
        ZipfMandelbrot(1000, 1.1, 2.0, first_id=3), 20, seed=2**64 - 1, exclude=[5, 7]
    ),
    "by tries": PopularitySampler(LogUniform(1000), 20, by_tries=True),
    "poisson": PopularitySampler(Uniform(100), 20, unique="poisson"),
    "per query": PopularitySampler(Empirical([3, 2, 1] * 9, power=0.5), 5, per_query=True),
    "in batch": InBatchSampler([3, 1, 2] * 20),
    "estimated": InBatchSampler(learned_estimator()),
    "unknown popularity": InBatchSampler(),
    "mixture": MixtureSampler([InBatchSampler(Uniform(50)), PopularitySampler(Uniform(50), 4)]),
    "bank": filled_bank(popularity=LogUniform(30)),
    "part of a bank": filled_bank(popularity=[1.0] * 30, unique=True, num_sampled=3, seed=6),
    "empty bank": CachedSampler(5, learned_estimator()),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_restored_samplers_make_the_same_draws(name):
    sampler = SAMPLERS[name]
    state = pickle.loads(pickle.dumps(to_state(sampler)))
    positives = np.array([1, 7, 20])
    for step in range(5):
        draws = [s.sample(positives, step=step, stream=4) for s in (sampler, from_state(state))]
        for side in ("positives", "negatives"):
            for a, b in zip(getattr(draws[0], side), getattr(draws[1], side), strict=True):
                assert np.array_equal(a, b)
        assert draws[0].num_tries == draws[1].num_tries


def plain(x):
    if isinstance(x, dict):
        return all(isinstance(k, str) and plain(v) for k, v in x.items())
    if isinstance(x, list):
        return all(map(plain, x))
    return x is None or type(x) in (bool, int, float, str, np.ndarray)


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_are_plain_data(name):
    assert plain(to_state(SAMPLERS[name]))


@pytest.mark.parametrize(
    "sampler", [SAMPLERS["every setting"], SAMPLERS["mixture"], SAMPLERS["poisson"]]
)
def test_states_without_arrays_are_json(sampler):
    assert from_state(json.loads(json.dumps(to_state(sampler)))) == sampler


def test_heads_keep_their_settings():
    head = ContrastiveOutput(
        [SAMPLERS["poisson"], SAMPLERS["mixture"]],
        temperature=0.07,
        correction="negatives",
        mask_accidental_hits=False,
        top_ks=(1, 5),
        store_negative_ids=True,
    )
    assert from_state(json.loads(json.dumps(to_state(head)))) == head


def test_what_cannot_be_saved_or_restored():
    class Own:
        def sample(self, positives, *, step):
            raise NotImplementedError

    for x in (object(), {"a": LogUniform(3)}):
        with pytest.raises(TypeError, match=r"x: expected LogUniform, .* settings are not known"):
            to_state(x)
    with pytest.raises(TypeError, match="whose settings are not known"):
        to_state(MixtureSampler([Own()]))
    with pytest.raises(ValueError, match=r"state: expected a type of LogUniform, .* got 'Zipf'"):
        from_state({"type": "Zipf"})


def test_settings_given_as_numpys_numbers_are_json():
    sampler = PopularitySampler(LogUniform(10), np.int64(3), seed=np.uint64(7), unique=np.True_)
    assert from_state(json.loads(json.dumps(to_state(sampler)))) == sampler


def test_a_restored_bank_is_its_own():
    bank = filled_bank(popularity=LogUniform(30))
    state = to_state(bank)
    restored = from_state(
        {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    )
    with pytest.raises(ValueError, match="read-only"):
        restored.sample().negatives.embeddings[0, 0] = 5
    for changed, text in (
        ({"embeddings": np.ones((3, 2))}, r"state: expected embeddings for 7 items, .* got 3"),
        ({"capacity": 4}, "state: expected ids for 7 items, at most 4, got 7"),
    ):
        with pytest.raises(ValueError, match=text):
            from_state({**state, **changed})
    del state["bias"]
    with pytest.raises(ValueError, match=r"state: expected capacity, .* missing bias"):
        from_state(state)
