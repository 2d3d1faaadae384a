import numpy as np
import pytest

from zipfneg import (
    CachedSampler,
    Candidates,
    ContrastiveOutput,
    FrequencyEstimator,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    check_sampler,
    reference,
    sampled_softmax_value_and_grad,
)

LAW = LogUniform(500, first_id=1)


def items(ids, dim=3):
    """Embeddings that tell when an item came."""
    ids = np.asarray(ids)
    return Candidates(ids, embeddings=np.arange(ids.size * dim, dtype=np.float32).reshape(-1, dim))


class Refilled:
    """A bank that holds new batches alone at every step: its draws are independent."""

    def __init__(self, *arguments, batches, **options):
        self.make = lambda: CachedSampler(*arguments, **options)
        self.batches = batches
        self.sample(None, step=0)

    def sample(self, positives, *, step):
        self.bank = self.make()
        for k in range(self.batches):
            self.bank.update(LAW.draw(50, seed=9, step=step, stream=k))
        return self.bank.sample(positives, step=step)

    def log_q(self, ids, *, batch_size=None):
        return self.bank.log_q(ids, batch_size=batch_size)


# By hand


def test_first_in_first_out_by_hand():
    bank = CachedSampler(4, [6, 3, 1])
    first, second = items([0, 2, 0]), items([1, 0])
    bank.update(first)
    bank.update(second)
    draw = bank.sample(np.array([1]))
    assert draw.negatives.ids.tolist() == [2, 0, 1, 0]
    expected = np.concatenate([first.embeddings[1:], second.embeddings])
    assert (draw.negatives.embeddings == expected).all()
    assert np.exp(draw.negatives.log_q) == pytest.approx([0.4, 2.4, 1.2, 2.4])
    assert np.exp(draw.positives.log_q) == pytest.approx([1.2])
    assert draw.num_tries == len(bank) == 4


def test_each_id_once_by_hand():
    bank = CachedSampler(3, [6, 3, 1, 2], unique=True)
    bank.update(items([0, 2, 0]))
    bank.update(items([1, 2]))
    draw = bank.sample(np.array([3]))
    assert draw.negatives.ids.tolist() == [0, 1, 2]
    assert draw.negatives.embeddings[:, 0].tolist() == [6, 0, 3]
    bank.update(items([3]))
    assert bank.sample().negatives.ids.tolist() == [1, 2, 3]
    prob = np.array([6, 3, 1, 2]) / 12
    expected = reference.inclusion_prob(prob, 3)
    assert np.exp(bank.log_q([0, 1, 2, 3])) == pytest.approx(expected, rel=1e-9)
    assert np.exp(bank.sample(np.array([0])).positives.log_q) == pytest.approx(expected[:1])


def test_a_bank_before_its_first_batch_gives_nothing():
    draw = CachedSampler(10, LAW).sample(items([3, 4]))
    assert draw.negatives.ids.shape == draw.negatives.log_q.shape == (0,)
    assert draw.negatives.embeddings.shape == (0, 3)
    assert draw.positives.log_q.tolist() == [0, 0]
    assert CachedSampler(10).sample().negatives.log_q is None


def test_a_part_of_the_bank_by_hand():
    bank = CachedSampler(6, [1, 1, 1], num_sampled=2, seed=3)
    bank.update(items([0]))
    assert bank.sample().negatives.ids.tolist() == [0]
    bank.update(items([1, 2, 0, 1, 2]))
    draws = [bank.sample(step=step).negatives for step in range(60)]
    assert np.exp(draws[0].log_q) == pytest.approx([2 / 3] * 2)
    pairs = {tuple(d.ids.tolist()) for d in draws}
    assert pairs == {(a, b) for a in range(3) for b in range(3)}
    assert (bank.sample(step=5).negatives.ids == draws[5].ids).all()


# Against what log q claims


@pytest.mark.parametrize(
    "sampler",
    [
        Refilled(200, LAW, batches=4),
        Refilled(200, LAW, batches=3, num_sampled=120),
        Refilled(100, LAW, batches=20, unique=True),
        Refilled(100, LAW, batches=20, unique=True, num_sampled=50),
    ],
    ids=["every copy", "a part", "each once", "a part, each once"],
)
def test_banks_are_what_they_claim(sampler):
    ids = np.arange(1, 501)
    assert (report := check_sampler(sampler, ids=ids)), str(report)
    # The log q of the other kind, or of another size, is rejected.
    sampler.log_q = lambda ids, batch_size=None: np.asarray(LAW.log_prob(ids)) + np.log(150.0)
    assert not check_sampler(sampler, ids=ids)


def test_each_copy_keeps_the_frequency_of_its_coming():
    estimator = FrequencyEstimator(1000, decay=0.5)
    bank = CachedSampler(4, estimator)
    estimator.update(np.array([1, 1]), 0)
    bank.update(np.array([1, 1]))
    estimator.update(np.array([2, 2]), 5)
    bank.update(np.array([1, 2]))
    draw = bank.sample(np.array([1]))
    now = estimator.log_q([1, 2]) - np.log(2) + np.log(4)
    assert draw.negatives.log_q[2:] == pytest.approx(now)
    assert draw.negatives.log_q[0] == pytest.approx(np.log(2 / 2 * 4))
    assert draw.positives.log_q == pytest.approx(now[:1])


def test_a_small_last_batch_does_not_move_log_q():
    estimator = FrequencyEstimator(10_000, decay=0.05)
    bank = CachedSampler(512, estimator)
    for step in range(200):
        ids = LAW.draw(256, seed=3, step=step)
        estimator.update(ids, step)
        bank.update(ids)
    before = bank.log_q([1, 6])
    assert np.exp(before) == pytest.approx(512 * np.exp(LAW.log_prob([1, 6])), rel=0.5)
    bank.update(LAW.draw(4, seed=3, step=201))
    bank.update(np.empty(0, np.int64))
    assert bank.log_q([1, 6]) == pytest.approx(before, rel=1e-12)


def test_an_empty_bank_alone_lets_training_begin():
    x = np.random.default_rng(2).normal(size=(4, 3))
    out = ContrastiveOutput(CachedSampler(8, LAW))(x, np.arange(1, 5), positives=x)
    assert out.loss == 0
    assert (out.grads.queries == 0).all()


# In the head


def test_the_head_takes_the_bank_for_constant():
    rng = np.random.default_rng(0)
    u, p, old = rng.normal(size=(3, 5, 4))
    bank = CachedSampler(5, LAW)
    bank.update(Candidates(np.array([9, 8, 7, 6, 5]), embeddings=old))
    sampler = MixtureSampler([InBatchSampler(LAW), bank])
    ids = np.array([1, 2, 3, 2, 9])
    out = ContrastiveOutput(sampler, store_negative_ids=True)(u, ids, positives=p)
    assert out.negative_ids.tolist() == [*ids, 9, 8, 7, 6, 5]
    both = np.concatenate([ids, [9, 8, 7, 6, 5]])
    # B = 5 slots and as many in the bank.
    log_q = LAW.log_prob(both) + np.log(10)
    loss, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(ids, p, log_q[:5]),
        Candidates(both, np.concatenate([p, old]), log_q),
    )
    assert out.loss == pytest.approx(loss, rel=1e-12)
    assert out.grads.queries == pytest.approx(grads.queries, rel=1e-12)
    own = grads.positives.embeddings + grads.negatives.embeddings[:5]
    assert out.grads.positives.embeddings == pytest.approx(own, rel=1e-12)


def test_a_bank_of_ids_serves_a_table():
    table = np.random.default_rng(1).normal(size=(501, 4))
    bank = CachedSampler(8, LAW)
    bank.update(np.array([3, 4, 5]))
    out = ContrastiveOutput(bank)(table[:2], np.array([1, 4]), items=table)
    assert out.grads.items.ids.tolist() == [1, 3, 4, 5]


def test_an_update_does_not_change_what_was_drawn():
    bank = CachedSampler(3, LAW)
    given = items([1, 2, 3])
    bank.update(given)
    draw = bank.sample()
    before = draw.negatives.embeddings.copy()
    given.embeddings[:] = -1
    bank.update(items([4, 5]))
    assert (draw.negatives.embeddings == before).all()
    with pytest.raises(ValueError, match="read-only"):
        draw.negatives.embeddings[0, 0] = 1


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CachedSampler(0), "capacity: expected an integer from 1"),
        (lambda: CachedSampler(5, LAW, num_sampled=6), "num_sampled: expected an integer from 1"),
        (
            lambda: CachedSampler(5, FrequencyEstimator(10, decay=0.1), unique=True),
            "popularity: expected a law or counts for unique=True",
        ),
        (lambda: CachedSampler(5, [0, 0]), "counts: expected at least one above zero"),
        (lambda: CachedSampler(5).log_q([1]), "CachedSampler has no popularity"),
        (lambda: CachedSampler(5).update(None), "items: expected the batch's items"),
    ],
)
def test_bad_banks(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("later", "text"),
    [
        (Candidates(np.array([1])), "items.embeddings: expected an array, as in the items before"),
        (items([1], dim=2), "items.embeddings: expected shape as those before"),
        (Candidates(np.array([1]), np.ones(3)), r"items.embeddings: expected shape \(B, D\)"),
        (Candidates(np.array([1, 2]), np.ones((1, 3))), r"items.embeddings: expected shape .* as"),
        (
            Candidates(np.array([2**63], np.uint64), np.ones((1, 3))),
            "items.ids: expected ids below",
        ),
        (items([1])._replace(bias=np.ones(1)), "items.bias: expected None, as in the items before"),
    ],
)
def test_batches_that_do_not_go_together(later, text):
    bank = CachedSampler(5)
    bank.update(items([1, 2]))
    with pytest.raises(ValueError, match=text):
        bank.update(later)


def test_embeddings_of_another_dtype_are_refused():
    bank = CachedSampler(5)
    bank.update(items([1, 2]))
    for dtype, text in (
        (np.float64, "expected float32, as in the items"),
        (int, "expected float16"),
    ):
        with pytest.raises(TypeError, match=f"items.embeddings: {text}"):
            bank.update(Candidates(np.array([3]), np.ones((1, 3), dtype)))
