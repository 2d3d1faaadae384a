"""The trainer against a step by hand, its own continuation, and brute force over the catalog."""

import numpy as np
import pytest
from goodness_of_fit import LEVEL, chi_square

from zipfneg import ContrastiveOutput, InBatchSampler, LogUniform, PopularitySampler, reference
from zipfneg.cpu import rows as kernels
from zipfneg.training import (
    OPTIMIZERS,
    Pairs,
    Tables,
    Trainer,
    evaluate,
    initial_tables,
    log_losses,
    seen_items,
)

Q, N, D, P = 7, 11, 5, 40
SETTINGS = {"dim": D, "sampler": "log-uniform"}


def _pairs(size=P, num_queries=Q, num_items=N, counts=False, seed=0):
    rng = np.random.default_rng([size, seed])
    weights = rng.integers(0, 5, size).astype(float) if counts else None
    return Pairs(rng.integers(0, num_queries, size), rng.integers(0, num_items, size), weights)


def _trainer(pairs=None, *, batch_size=8, unique=True, num_sampled=4, seed=3, rate=0.1, **more):
    sampler = PopularitySampler(LogUniform(N), num_sampled, unique=unique, seed=seed)
    head = ContrastiveOutput(sampler, mask_accidental_hits=unique, top_ks=(), **more)
    tables = initial_tables(Q, N, D, seed)
    return Trainer(tables, pairs or _pairs(), head, batch_size, rate, seed)


def _copy(tables):
    return Tables(*(None if table is None else table.copy() for table in tables))


def _same(a, b):
    return all(x is y is None or x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


# One step


@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
@pytest.mark.parametrize("source", ["unique", "with replacement", "in-batch"])
def test_step_by_hand(source, correction):
    pairs, rate, tau = _pairs(), 0.1, 0.5
    sampler = {
        "unique": PopularitySampler(LogUniform(N), 6, seed=1),
        "with replacement": PopularitySampler(LogUniform(N), 6, unique=False, seed=1),
        "in-batch": InBatchSampler(np.bincount(pairs.item_ids, minlength=N)),
    }[source]
    mask = source != "with replacement"
    head = ContrastiveOutput(
        sampler, temperature=tau, correction=correction, mask_accidental_hits=mask, top_ks=()
    )
    tables = initial_tables(Q, N, D, seed=0)
    trainer = Trainer(tables, pairs, head, 16, rate, seed=5, steps_done=2)
    before = [table.astype(np.float64) for table in tables[:4]]

    chosen = trainer.batch(2)
    query_ids, item_ids = pairs.query_ids[chosen], pairs.item_ids[chosen]
    assert len(np.unique(query_ids)) < len(query_ids)  # repeats, whose gradients add up
    draw = sampler.sample(item_ids, step=2)
    assert np.isin(draw.negatives.ids, item_ids).any()
    loss, grads = reference.sampled_softmax(
        before[0][query_ids],
        before[1][item_ids],
        before[1][draw.negatives.ids],
        positive_log_q=draw.positives.log_q if correction == "both" else 0.0,
        negative_log_q=draw.negatives.log_q if correction != "none" else 0.0,
        dropped=reference.dropped_negatives(
            draw.negatives.ids, item_ids if mask else None, num_queries=16
        ),
        temperature=tau,
    )
    d_queries, d_items = np.zeros((Q, D)), np.zeros((N, D))
    np.add.at(d_queries, query_ids, grads.queries)
    np.add.at(d_items, item_ids, grads.positives)
    np.add.at(d_items, draw.negatives.ids, grads.negatives)
    query_squares, item_squares = before[2] + d_queries**2, before[3] + d_items**2
    expected = (
        before[0] - rate * d_queries / np.sqrt(query_squares),
        before[1] - rate * d_items / np.sqrt(item_squares),
        query_squares,
        item_squares,
    )

    assert trainer.step() == pytest.approx(loss.mean(), rel=1e-5)
    assert trainer.steps_done == 3
    for table, value in zip(tables[:4], expected, strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, value, rtol=1e-4, atol=1e-5)


ROWS = [np.array([5, 0, 3]), np.array([3]), np.array([0, 6]), np.array([3, 5])]


def row_gradients(steps=4):
    rng = np.random.default_rng(9)
    return [(ids, rng.normal(size=(len(ids), 4))) for ids in ROWS[:steps]]


def test_rowwise_adagrad_by_hand():
    table, squares = np.ones((7, 4)), np.zeros((7, 1))
    expected, h = table.copy(), np.zeros(7)
    for ids, gradients in row_gradients():
        kernels.adagrad(table, squares, ids, gradients, 0.3)
        h[ids] += (gradients**2).mean(axis=1)
        expected[ids] -= 0.3 * gradients / np.sqrt(h[ids])[:, None]
    assert table == pytest.approx(expected, rel=1e-13)
    assert squares[:, 0] == pytest.approx(h, rel=1e-13)


def test_adam_by_hand():
    table, means, squares = np.ones((7, 4)), np.zeros((7, 4)), np.zeros((7, 4))
    expected, m, v = table.copy(), means.copy(), squares.copy()
    for step, (ids, gradients) in enumerate(row_gradients(), 1):
        kernels.adam(table, means, squares, ids, gradients, 0.1, step)
        m[ids] = 0.9 * m[ids] + 0.1 * gradients
        v[ids] = 0.999 * v[ids] + 0.001 * gradients**2
        corrected = m[ids] / (1 - 0.9**step), v[ids] / (1 - 0.999**step)
        expected[ids] -= 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    assert table == pytest.approx(expected, rel=1e-12)
    assert (table[[1, 2, 4]] == 1).all()


@pytest.mark.parametrize("width", [1, 4])
def test_a_row_without_gradients_stays(width):
    table, squares = np.ones((2, 4), np.float32), np.zeros((2, width), np.float32)
    kernels.adagrad(table, squares, np.array([1]), np.zeros((1, 4), np.float32), np.float32(1))
    assert (table == 1).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_learn_and_resume_bit_for_bit(optimizer, tmp_path):
    def trainer():
        pairs = Pairs(np.arange(P) % Q, np.arange(P) % Q)  # item q for query q
        head = ContrastiveOutput(PopularitySampler(LogUniform(N), 4, seed=3), top_ks=())
        return Trainer(initial_tables(Q, N, D, 3, optimizer), pairs, head, 8, 0.1, 3)

    once, twice = trainer(), trainer()
    losses = [once.step() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    for _ in range(30):
        twice.step()
    twice.save(tmp_path / "s.npz", {})
    again = trainer()
    again.load(tmp_path / "s.npz", {})
    for _ in range(30):
        again.step()
    assert _same(again.tables, once.tables)
    other = "adam" if optimizer != "adam" else "adagrad"
    again.tables = initial_tables(Q, N, D, 3, other)
    with pytest.raises(ValueError, match="the run had other pairs"):
        again.load(tmp_path / "s.npz", {})


def test_rows_outside_the_step_stay():
    pairs = Pairs(np.array([0, 1]), np.array([2, 2]))
    trainer = _trainer(pairs, num_sampled=1)
    before = _copy(trainer.tables)
    touched = np.append(trainer.head.sampler.sample(np.array([2])).negatives.ids, 2)
    trainer.step()
    others = np.setdiff1d(np.arange(N), touched)
    assert len(others)
    assert (trainer.tables.items[others] == before.items[others]).all()
    assert (trainer.tables.queries[2:] == before.queries[2:]).all()
    assert (trainer.tables.queries[:2] != before.queries[:2]).any()


def test_initial_tables():
    tables = initial_tables(2000, 3000, 16, seed=1)
    assert [t.shape for t in tables[:4]] == [(2000, 16), (3000, 16)] * 2
    assert tables[4:] == (None, None)
    assert {t.dtype for t in tables[:4]} == {np.dtype(np.float32)}
    assert np.linalg.norm(tables.queries, axis=1).mean() == pytest.approx(1, abs=0.05)
    assert _same(tables, initial_tables(2000, 3000, 16, seed=1))
    assert not _same(tables, initial_tables(2000, 3000, 16, seed=2))


# Batches


def test_each_pair_once_an_epoch():
    trainer = _trainer(batch_size=12)
    assert trainer.steps_per_epoch == 3  # 40 // 12: the last four wait for the next epoch
    epochs = [np.concatenate([trainer.batch(3 * e + k) for k in range(3)]) for e in range(2)]
    for rows in epochs:
        assert len(np.unique(rows)) == 36
        assert rows.min() >= 0
        assert rows.max() < P
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("counts", [False, True])
def test_batch_is_a_function_of_seed_and_step(counts):
    pairs = _pairs(counts=counts)
    steps = [5, 0, 17, 5, 4]
    first = [_trainer(pairs).batch(step) for step in steps]
    used = _trainer(pairs)
    used.step()
    for step, rows in zip(steps, first, strict=True):
        assert (used.batch(step) == rows).all()
    assert (first[0] != first[1]).any()
    assert (_trainer(pairs, seed=4).batch(5) != first[0]).any()


@pytest.mark.parametrize("size", [1, 5, 8])
def test_batch_that_takes_all(size):
    trainer = _trainer(_pairs(size), batch_size=8)
    assert trainer.steps_per_epoch == 1
    for step in range(3):
        assert sorted(trainer.batch(step)) == list(range(size))
    trainer.step()


def test_weighted_pairs_are_drawn_by_their_counts():
    pairs = _pairs(counts=True)
    assert (pairs.counts == 0).any()
    trainer = _trainer(pairs, batch_size=1000)
    drawn = np.bincount(np.concatenate([trainer.batch(k) for k in range(30)]), minlength=P)
    assert (drawn[pairs.counts == 0] == 0).all()
    seen = pairs.counts > 0
    assert chi_square(drawn[seen], pairs.counts[seen] / pairs.counts.sum()) > LEVEL
    assert chi_square(drawn[seen], np.full(seen.sum(), 1 / seen.sum())) < LEVEL


# Training


@pytest.mark.parametrize("unique", [True, False])
def test_learns_the_conditional_frequencies(unique):
    """With log q on both sides the optimum is the pairs' own conditional distribution."""
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.full(N, 0.5), Q)
    pairs = Pairs(np.repeat(np.arange(Q), N), np.tile(np.arange(N), Q), prob.ravel())
    floor = -(prob * np.log(prob)).sum() / Q
    trainer = _trainer(pairs, batch_size=256, unique=unique, num_sampled=8, rate=0.3)
    trainer.tables = initial_tables(Q, N, 16, 0)  # room for any distribution

    def excess():
        return np.average(log_losses(trainer.tables, pairs), weights=pairs.counts) - floor

    start = excess()
    losses = [trainer.step() for _ in range(400)]
    assert start > 0.5
    assert np.mean(losses[-50:]) < np.mean(losses[:5])
    assert -1e-5 < excess() < 0.05


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("unique", [False, True])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path, counts, unique):
    pairs = _pairs(counts=counts)
    whole, begun = _trainer(pairs, unique=unique), _trainer(pairs, unique=unique)
    losses = [whole.step() for _ in range(12)]
    first = [begun.step() for _ in range(7)]  # in the middle of the second epoch
    begun.save(tmp_path / "state.npz", SETTINGS)
    begun.step()  # what comes after the save does not matter
    resumed = _trainer(pairs, unique=unique)
    resumed.step()  # nor what came before the load
    resumed.load(tmp_path / "state.npz", SETTINGS)
    assert resumed.steps_done == 7
    assert first + [resumed.step() for _ in range(5)] == losses
    assert _same(resumed.tables, whole.tables)


@pytest.mark.parametrize("rate", [1e30, 3e38])
def test_divergence_is_told(rate):
    trainer = _trainer(rate=rate)

    def train():
        for _ in range(5):
            trainer.step()

    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d: .* learning rate"):
        train()
    assert 0 < trainer.steps_done < 5


# What load refuses


def _saved(path):
    trainer = _trainer()
    trainer.step()
    trainer.save(path, SETTINGS)
    return trainer


def _refused(path, match, pairs=None, settings=SETTINGS, tables=None):
    other = _trainer(pairs)
    if tables is not None:
        other.tables = tables
    before = _copy(other.tables)
    with pytest.raises(ValueError, match=match):
        other.load(path, settings)
    assert _same(other.tables, before)
    assert other.steps_done == 0


def test_load_refuses_other_settings(tmp_path):
    _saved(tmp_path / "s.npz")
    _refused(
        tmp_path / "s.npz",
        r"s\.npz: expected the run's own sampler, log-uniform, got uniform; resume with",
        settings={**SETTINGS, "sampler": "uniform"},
    )
    _refused(tmp_path / "s.npz", "own power, None, got 1", settings={**SETTINGS, "power": 1})


def test_load_refuses_other_pairs(tmp_path):
    _saved(tmp_path / "s.npz")
    pairs = _pairs()
    swapped = Pairs(pairs.query_ids[::-1].copy(), pairs.item_ids)
    for other in (swapped, Pairs(pairs.query_ids[1:], pairs.item_ids[1:]), _pairs(seed=1)):
        _refused(tmp_path / "s.npz", r"s\.npz: the run had other pairs; resume with", other)
    for size in ((Q + 1, N, D), (Q, N + 1, D), (Q, N, 1)):
        _refused(tmp_path / "s.npz", "the run had other pairs", tables=initial_tables(*size, 0))


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "s.npz"
    _saved(path)
    whole = path.read_bytes()
    no_checkpoint = r"s\.npz: not a checkpoint of zipfneg train"
    for part in (b"", b"hello", b"PK\x03\x04", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        _refused(path, no_checkpoint)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    path.write_bytes(damaged)
    _refused(path, no_checkpoint)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    _refused(path, no_checkpoint)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    _refused(path, no_checkpoint)
    with open(path, "wb") as file:
        np.savez(file, settings=np.array({"an": "object"}, object), allow_pickle=True)
    _refused(path, no_checkpoint)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        _trainer().load(path, SETTINGS)


# Evaluation


def _brute_force(tables, targets, temperature, seen, k=10):
    """(log loss, HR@k, NDCG@k) of each target, a tie being any order, and the coverage."""
    scores = tables.queries.astype(np.float64) @ tables.items.astype(np.float64).T  # (Q, N)
    num_items = scores.shape[1]
    losses, hits, gains, shown = [], [], [], set()
    for query, item in zip(targets.query_ids, targets.item_ids, strict=True):
        logits = scores[query] / temperature
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[item])
        known = set() if seen is None else set(seen.item_ids[seen.query_ids == query].tolist())
        others = [i for i in range(num_items) if i not in known and i != item]
        better = sum(scores[query, i] > scores[query, item] for i in others)
        tied = sum(scores[query, i] == scores[query, item] for i in others)
        places = np.arange(better, better + tied + 1)
        hits.append((places < k).mean())
        gains.append(np.where(places < k, 1 / np.log2(places + 2), 0).mean())
        ranked = sorted(set(range(num_items)) - known, key=lambda i, q=query: -scores[q, i])
        shown.update(ranked[:k])
    return *(np.average(x, weights=targets.counts) for x in (losses, hits, gains)), (
        len(shown) / num_items
    )


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize(("num_queries", "num_items"), [(1, 1), (13, 7), (37, 53)])
def test_evaluate_equals_brute_force(num_queries, num_items, with_seen, counts, temperature):
    tables = initial_tables(num_queries, num_items, 3, seed=1)
    targets = _pairs(60, num_queries, num_items, counts)
    seen = _pairs(5 * num_queries, num_queries, num_items, seed=2) if with_seen else None
    report = evaluate(tables, targets, temperature=temperature, seen=seen)
    expected = _brute_force(tables, targets, temperature, seen)
    np.testing.assert_allclose(report, expected, rtol=1e-5, atol=1e-6)


def test_evaluate_counts_ties_as_any_order():
    rng = np.random.default_rng(0)
    queries, items = rng.integers(-2, 3, (9, 2)), rng.integers(-2, 3, (60, 2))
    tables = Tables(queries.astype(np.float32), items.astype(np.float32), None, None)
    targets, seen = _pairs(50, 9, 60), _pairs(50, 9, 60, seed=1)
    report = evaluate(tables, targets, seen=seen)
    np.testing.assert_allclose(report[:3], _brute_force(tables, targets, 1, seen)[:3], rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("num_seen", [0, 5])
def test_constant_model_gets_what_guessing_gets(value, num_seen):
    num_items = 50
    tables = Tables(
        np.full((4, 3), value, np.float32), np.full((num_items, 3), value, np.float32), None, None
    )
    targets = Pairs(np.arange(4), np.array([6, 20, 30, 49]))
    seen = Pairs(np.repeat(np.arange(4), num_seen), np.tile(np.arange(num_seen), 4))
    report = evaluate(tables, targets, seen=seen)
    left = num_items - num_seen
    assert report.log_loss == pytest.approx(np.log(num_items), rel=1e-6)
    assert report.hit_rate == pytest.approx(10 / left)
    assert report.ndcg == pytest.approx((1 / np.log2(np.arange(2, 12))).sum() / left)
    assert report.coverage == pytest.approx(10 / num_items)


def test_broken_model_does_not_look_good():
    tables = initial_tables(4, 50, 3, 0)
    tables.items[7] = np.nan
    report = evaluate(tables, Pairs(np.arange(4), np.array([7, 7, 7, 7])))
    assert np.isnan(report.log_loss)
    assert report.hit_rate == report.ndcg == report.coverage == 0


def test_seen_items_by_hand():
    seen = Pairs(np.array([2, 0, 2, 5]), np.array([9, 8, 7, 6]))
    indptr, ids = seen_items(seen, np.array([2, 1, 0, 2]))
    assert indptr.tolist() == [0, 2, 2, 3, 5]
    assert ids.tolist() == [9, 7, 8, 9, 7]
