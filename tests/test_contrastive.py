"""The head against its parts put together by hand, and against finite differences."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from zipfneg import (
    Candidates,
    ContrastiveOutput,
    Empirical,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    Uniform,
    metrics,
    reference,
    sampled_softmax_value_and_grad,
    scores,
    top_k,
)
from zipfneg.contrastive import places

N, B, D = 30, 9, 4
LAW = LogUniform(N - 1, first_id=1)
UNIQUE = PopularitySampler(LAW, 7, seed=5)
REPEATS = PopularitySampler(LAW, 11, unique=False, seed=6)
IN_BATCH = InBatchSampler(LAW)
SAMPLERS = {
    "unique": UNIQUE,
    "repeats": REPEATS,
    "mixture": [UNIQUE, REPEATS],
    "with in-batch": (IN_BATCH, UNIQUE),
}


def _inputs(dtype=np.float64, bias=True):
    """Queries, positive ids with repeats, and a table."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, N, B)
    ids[1] = ids[0]
    table = Candidates(
        embeddings=rng.normal(size=(N, D)).astype(dtype),
        bias=rng.normal(size=N).astype(dtype) if bias else None,
    )
    return rng.normal(size=(B, D)).astype(dtype), ids, table


def _known(rng):
    rows = [rng.integers(1, N, rng.integers(0, 5)) for _ in range(B)]
    return np.cumsum([0, *map(len, rows)]), np.concatenate(rows)


def test_one_row_by_hand():
    # Unique draws of 2 of 2 items: both ids, each with log q = 0; item 1 is the positive.
    head = ContrastiveOutput(PopularitySampler(Uniform(2), 2), temperature=0.5, top_ks=(1,))
    table = np.array([[3.0], [1.0]])
    out = head(np.array([[1.0]]), np.array([1]), items=table)
    share = np.exp(6) / (np.exp(6) + np.exp(2))
    assert out.loss == pytest.approx(-np.log(1 - share))
    assert out.grads.queries == pytest.approx(np.array([[share * (3 - 1) / 0.5]]))
    assert out.grads.items.ids.tolist() == [0, 1]
    assert out.grads.items.rows == pytest.approx(np.array([[share / 0.5], [-share / 0.5]]))
    assert out.grads.items.bias is None
    assert out.grads.positives is None
    assert out.negative_ids is None
    assert out.metrics == {f"{name}@1": 0.0 for name in metrics.TOP_K_METRICS}


@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
@pytest.mark.parametrize("hits", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_a_table_equals_its_parts(name, bias, hits, correction):
    queries, ids, table = _inputs(bias=bias)
    rng = np.random.default_rng(2)
    weight, known = rng.uniform(size=B), _known(rng)
    head = ContrastiveOutput(
        SAMPLERS[name],
        temperature=0.4,
        correction=correction,
        mask_accidental_hits=hits,
        store_negative_ids=True,
    )
    out = head(queries, ids, items=table, step=3, known_positives=known, sample_weight=weight)

    draw = head.sampler.sample(ids, step=3)
    drawn = draw.negatives.ids
    np.testing.assert_array_equal(out.negative_ids, drawn)

    def rows(at, log_q, compared):
        bias_rows = None if table.bias is None else table.bias[at]
        return Candidates(at if compared else None, table.embeddings[at], log_q, bias_rows)

    loss, grads = sampled_softmax_value_and_grad(
        queries,
        rows(ids, draw.positives.log_q, hits),
        rows(drawn, draw.negatives.log_q, True),
        temperature=0.4,
        correction=correction,
        known_positives=known,
        sample_weight=weight,
    )
    assert out.loss == pytest.approx(loss, rel=1e-13)
    np.testing.assert_allclose(out.grads.queries, grads.queries, rtol=1e-12, atol=1e-15)
    assert out.grads.temperature == pytest.approx(grads.temperature, rel=1e-12)
    touched = np.unique(np.concatenate([ids, drawn]))
    np.testing.assert_array_equal(out.grads.items.ids, touched)
    d_rows = np.zeros((N, D))
    np.add.at(d_rows, ids, grads.positives.embeddings)
    np.add.at(d_rows, drawn, grads.negatives.embeddings)
    np.testing.assert_allclose(out.grads.items.rows, d_rows[touched], rtol=1e-11, atol=1e-15)
    assert (out.grads.items.bias is None) == (not bias)
    if bias:
        d_bias = np.bincount(ids, grads.positives.bias, N)
        d_bias += np.bincount(drawn, grads.negatives.bias, N)
        np.testing.assert_allclose(out.grads.items.bias, d_bias[touched], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("popularity", [LAW, Empirical(np.arange(N, 0, -1)), None])
@pytest.mark.parametrize("hits", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_in_batch_equals_its_parts(bias, hits, popularity):
    queries, ids, table = _inputs(bias=bias)
    head = ContrastiveOutput(
        InBatchSampler(popularity),
        temperature=0.4,
        mask_accidental_hits=hits,
        store_negative_ids=True,
    )
    positives = Candidates(embeddings=table.embeddings[ids], bias=table.bias[ids] if bias else None)
    out = head(queries, ids, positives=positives)
    log_q = None if popularity is None else np.log(B) + popularity.log_prob(ids)
    side = positives._replace(ids=ids if hits else None, log_q=log_q)
    loss, grads = sampled_softmax_value_and_grad(queries, side, side, temperature=0.4)
    assert out.loss == pytest.approx(loss, rel=1e-13)
    np.testing.assert_array_equal(out.negative_ids, ids)
    np.testing.assert_allclose(out.grads.queries, grads.queries, rtol=1e-12, atol=1e-15)
    expected = grads.positives.embeddings + grads.negatives.embeddings
    np.testing.assert_allclose(out.grads.positives.embeddings, expected, rtol=1e-12, atol=1e-15)
    assert out.grads.items is None
    assert (out.grads.positives.bias is None) == (not bias)
    if bias:
        expected = grads.positives.bias + grads.negatives.bias
        np.testing.assert_allclose(out.grads.positives.bias, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_gradients_have_the_inputs_dtype(dtype):
    queries, ids, table = _inputs(dtype)
    out = ContrastiveOutput(UNIQUE)(queries, ids, items=table)
    table = Candidates(embeddings=table.embeddings.astype(float), bias=table.bias.astype(float))
    exact = ContrastiveOutput(UNIQUE)(queries.astype(float), ids, items=table)
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert out.loss.dtype == np.float32
    assert out.loss == pytest.approx(exact.loss, rel=1e-5)
    for x, y in (
        (out.grads.queries, exact.grads.queries),
        (out.grads.items.rows, exact.grads.items.rows),
        (out.grads.items.bias, exact.grads.items.bias),
    ):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype(float), y, rtol=eps, atol=2e-6)


def _differences(function, x, step=1e-5):
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(function(moved))
        out[at] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_by_the_table_are_finite_differences(name):
    queries, ids, table = _inputs()

    def loss(queries=queries, embeddings=table.embeddings, bias=table.bias, temperature=0.6):
        head = ContrastiveOutput(SAMPLERS[name], temperature=temperature)
        return head(queries, ids, items=Candidates(embeddings=embeddings, bias=bias), step=2)

    grads = loss().grads
    d_rows, d_bias = np.zeros((N, D)), np.zeros(N)
    d_rows[grads.items.ids], d_bias[grads.items.ids] = grads.items.rows, grads.items.bias
    for key, x, got in (
        ("queries", queries, grads.queries),
        ("embeddings", table.embeddings, d_rows),
        ("bias", table.bias, d_bias),
        ("temperature", np.array(0.6), grads.temperature),
    ):
        expected = _differences(lambda moved, key=key: loss(**{key: moved}).loss, x)
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9, err_msg=key)


def test_in_batch_gradients_are_finite_differences():
    queries, ids, table = _inputs()

    def loss(queries=queries, embeddings=table.embeddings[ids], bias=table.bias[ids], tau=0.6):
        positives = Candidates(embeddings=embeddings, bias=bias)
        return ContrastiveOutput(IN_BATCH, temperature=tau)(queries, ids, positives=positives)

    grads = loss().grads
    for key, x, got in (
        ("queries", queries, grads.queries),
        ("embeddings", table.embeddings[ids], grads.positives.embeddings),
        ("bias", table.bias[ids], grads.positives.bias),
        ("tau", np.array(0.6), grads.temperature),
    ):
        expected = _differences(lambda moved, key=key: loss(**{key: moved}).loss, x)
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9, err_msg=key)


def test_several_samplers_are_their_mixture():
    queries, ids, table = _inputs()
    several = ContrastiveOutput([UNIQUE, REPEATS])(queries, ids, items=table, step=4)
    mixture = ContrastiveOutput(MixtureSampler([UNIQUE, REPEATS]))(
        queries, ids, items=table, step=4
    )
    one, alone = (ContrastiveOutput(s)(queries, ids, items=table) for s in ([UNIQUE], UNIQUE))
    for x, y in ((several, mixture), (one, alone)):
        assert x.loss == y.loss
        assert x.metrics == y.metrics
        np.testing.assert_array_equal(x.grads.items.ids, y.grads.items.ids)
        np.testing.assert_array_equal(x.grads.items.rows, y.grads.items.rows)
    assert several.loss != alone.loss


def test_steps_draw_other_negatives_and_repeat_themselves():
    queries, ids, table = _inputs()
    head = ContrastiveOutput(REPEATS, store_negative_ids=True)
    first, again, other = (head(queries, ids, items=table, step=step) for step in (1, 1, 2))
    np.testing.assert_array_equal(first.negative_ids, again.negative_ids)
    assert first.loss == again.loss
    assert first.negative_ids.tolist() != other.negative_ids.tolist()


def test_streams_draw_other_negatives():
    head = ContrastiveOutput([UNIQUE, InBatchSampler(LAW)], store_negative_ids=True, top_ks=())
    queries, ids, table = _inputs()
    out = head(queries, ids, items=table, step=1, stream=5)
    draw = head.sampler.sample(ids, step=1, stream=5)
    np.testing.assert_array_equal(out.negative_ids, draw.negatives.ids)
    assert (out.negative_ids != head(queries, ids, items=table, step=1).negative_ids).any()


@pytest.mark.parametrize("hits", [True, False])
def test_metrics_equal_brute_force(hits):
    queries, ids, table = _inputs()
    head = ContrastiveOutput(
        REPEATS, temperature=0.3, mask_accidental_hits=hits, top_ks=[1, 3, 20],
        store_negative_ids=True,
    )  # fmt: skip
    out = head(queries, ids, items=table)
    all_scores = scores(queries, table)
    better, tied = np.zeros((2, B), int)
    for row, positive in enumerate(ids):
        for negative in out.negative_ids:
            if negative == positive:
                tied[row] += not hits
            else:
                better[row] += all_scores[row, negative] > all_scores[row, positive]
    assert out.metrics == metrics.ranking_metrics(better, [1, 3, 20], num_tied=tied)
    assert len(out.metrics) == 15
    without = ContrastiveOutput(REPEATS, temperature=0.3, mask_accidental_hits=hits, top_ks=())
    assert without(queries, ids, items=table).metrics == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0, 1])
def test_a_constant_model_gets_the_metrics_of_guessing(scale, dtype):
    rng = np.random.default_rng(0)
    items = np.tile(rng.normal(size=16).astype(dtype) * dtype(scale), (1000, 1))
    head = ContrastiveOutput(
        PopularitySampler(LogUniform(1000), 39), temperature=0.07, mask_accidental_hits=False
    )
    out = head(rng.normal(size=(32, 16)).astype(dtype), rng.integers(1000, size=32), items=items)
    assert out.metrics["recall@10"] == pytest.approx(10 / 40)
    assert out.metrics["mrr@10"] == pytest.approx((1 / np.arange(1, 11)).sum() / 40)


def test_a_model_of_nan_has_the_worst_metrics():
    queries, ids, table = _inputs()
    head = ContrastiveOutput(UNIQUE, top_ks=(7,))
    with np.errstate(all="ignore"):
        out = head(queries * np.nan, ids, items=table)
    assert np.isnan(out.loss)
    assert set(out.metrics.values()) == {0}


@dataclass(frozen=True)
class _Reweighed:
    """A user's own sampler: another's ids, with a log q of its own."""

    base: Any

    def sample(self, positives=None, *, step=0, device=None, stream=0):
        draw = self.base.sample(positives, step=step, stream=stream)
        return draw._replace(
            negatives=draw.negatives._replace(log_q=2 * draw.negatives.log_q),
            positives=draw.positives._replace(log_q=2 * draw.positives.log_q),
        )


def test_any_object_that_samples_will_do():
    queries, ids, table = _inputs()
    out = ContrastiveOutput(_Reweighed(UNIQUE))(queries, ids, items=table)
    draw = UNIQUE.sample(ids)
    drawn = draw.negatives.ids
    expected, _ = reference.sampled_softmax(
        queries,
        table.embeddings[ids],
        table.embeddings[drawn],
        positive_bias=table.bias[ids],
        negative_bias=table.bias[drawn],
        positive_log_q=2 * draw.positives.log_q,
        negative_log_q=2 * draw.negatives.log_q,
        dropped=drawn == ids[:, None],
    )
    assert out.loss == pytest.approx(expected.mean(), rel=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_none_and_of_one(rows):
    queries, ids, table = _inputs()
    queries, ids = queries[:rows], ids[:rows]
    head = ContrastiveOutput(PopularitySampler(LAW, 1))
    out = head(queries, ids, items=table)
    in_batch = ContrastiveOutput(IN_BATCH)(queries, ids, positives=table.embeddings[ids])
    assert np.isfinite(out.loss)
    assert out.grads.queries.shape == in_batch.grads.queries.shape == (rows, D)
    assert out.grads.items.rows.shape == (len(out.grads.items.ids), D)
    assert 1 <= len(out.grads.items.ids) <= 1 + rows
    # A batch of one has no other item: nothing to tell the positive from.
    assert in_batch.loss == 0
    assert in_batch.grads.positives.embeddings.shape == (rows, D)
    assert (in_batch.grads.positives.embeddings == 0).all()
    assert in_batch.metrics["recall@10"] == rows


def test_scores_and_top_k_cover_the_catalog():
    queries, _, table = _inputs()
    head = ContrastiveOutput(UNIQUE, temperature=0.2)
    np.testing.assert_array_equal(
        head.scores(queries, table), scores(queries, table, temperature=0.2)
    )
    seen = (np.arange(B + 1), np.arange(B) + 3)
    got = head.top_k(queries, table, N - 1, exclude=seen)
    expected = top_k(queries, table, N - 1, temperature=0.2, first_id=1, exclude=seen)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.scores, expected.scores)


@pytest.mark.parametrize("samplers", [UNIQUE, [UNIQUE, REPEATS], IN_BATCH, (IN_BATCH, UNIQUE)])
def test_top_k_leaves_out_reserved_ids(samplers):
    items = -np.arange(N, dtype=float)[:, None]  # the reserved id 0 would score best
    got = ContrastiveOutput(samplers).top_k(np.ones((1, 1)), items, 3)
    assert got.ids.tolist() == [[1, 2, 3]]


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"samplers": []}, ValueError, "^samplers: expected at least one"),
        ({"temperature": 0}, ValueError, "^temperature: expected a finite number above 0"),
        ({"temperature": np.ones(2)}, TypeError, "^temperature: expected a number"),
        ({"correction": "logq"}, ValueError, "^correction: expected one of 'both'"),
        ({"loss": "mse"}, ValueError, "^loss: expected one of 'softmax'"),
        ({"top_ks": (0,)}, ValueError, "^top_ks: expected an integer from 1"),
        ({"top_ks": (1.5,)}, TypeError, "^top_ks: expected an integer"),
    ],
)
def test_errors_of_the_head(arguments, error, text):
    with pytest.raises(error, match=text):
        ContrastiveOutput(**({"samplers": UNIQUE} | arguments))


QUERIES, IDS, TABLE = _inputs()
ROWS = TABLE.embeddings[IDS]


@pytest.mark.parametrize(
    ("samplers", "changes", "error", "text"),
    [
        (UNIQUE, {}, ValueError, "^items, positives: expected exactly one"),
        (UNIQUE, {"items": TABLE, "positives": ROWS}, ValueError, "^items, positives: expected"),
        (UNIQUE, {"positives": ROWS}, ValueError, "^samplers: PopularitySampler gives ids without"),
        (
            [IN_BATCH, UNIQUE],
            {"positives": ROWS},
            ValueError,
            "^samplers: MixtureSampler gives ids",
        ),
        (
            UNIQUE,
            {"items": TABLE.embeddings[:5]},
            ValueError,
            "^items: expected a row for every id of the samplers' laws, 30 rows or more, got 5",
        ),
        (UNIQUE, {"items": TABLE.embeddings[0]}, ValueError, r"^items: .* \(N, D\), got \(4,\)"),
        (UNIQUE, {"items": Candidates()}, ValueError, r"^items: expected embeddings .* got None"),
        (UNIQUE, {"items": TABLE.embeddings.astype(int)}, TypeError, "^items: expected float16"),
        (UNIQUE, {"items": tuple(TABLE)}, TypeError, "^items: expected Candidates .* got a tuple"),
        (
            UNIQUE,
            {"items": TABLE.embeddings.tolist()},
            TypeError,
            "embeddings: expected an array .* got list",
        ),
        (
            UNIQUE,
            {"items": TABLE._replace(bias=TABLE.bias[:3])},
            ValueError,
            r"^items\.bias: expected shape as items\.embeddings = \(30,\), got \(3,\)",
        ),
        (
            UNIQUE,
            {"items": TABLE.embeddings[:, :3]},
            ValueError,
            r"^positives\.embeddings: expected",
        ),
        (UNIQUE, {"items": TABLE, "positive_ids": None}, ValueError, "^positive_ids: expected an"),
        (
            UNIQUE,
            {"items": TABLE, "positive_ids": IDS.astype(float)},
            TypeError,
            "ids: expected an integer dtype, got float64",
        ),
        (UNIQUE, {"items": TABLE, "positive_ids": IDS[:, None]}, ValueError, r"ids: .*\(B,\), got"),
        (UNIQUE, {"items": TABLE, "positive_ids": IDS[:3]}, ValueError, r"expected shape \(B, D\)"),
        (
            UNIQUE,
            {"items": TABLE, "positive_ids": np.where(np.isin(IDS, IDS[2]), 0, IDS)},
            ValueError,
            r"positives\.log_q: expected finite values, got -inf at \(2,\): an id outside the law",
        ),
        (
            UNIQUE,
            {"items": TABLE, "positive_ids": IDS + N},
            ValueError,
            "^items: expected a row for every id drawn or given",
        ),
        (
            UNIQUE,
            {"items": TABLE, "queries": QUERIES.astype(int)},
            TypeError,
            "^queries: expected fl",
        ),
        (UNIQUE, {"items": TABLE, "queries": None}, ValueError, "^queries: expected an array"),
        (UNIQUE, {"items": TABLE, "step": -1}, ValueError, "^step: expected an integer from 0"),
        (UNIQUE, {"items": TABLE, "sample_weight": np.ones(2)}, ValueError, "^sample_weight: "),
        (
            UNIQUE,
            {"items": TABLE, "known_positives": (np.zeros(2, int), np.zeros(0, int))},
            ValueError,
            r"^known_positives\.indptr: expected shape",
        ),
        (IN_BATCH, {"positives": ROWS[:3]}, ValueError, r"^positives: expected shape \(B, D\)"),
        (IN_BATCH, {"positives": (ROWS,)}, TypeError, "^positives: expected Candidates"),
    ],
)
def test_errors_of_a_call(samplers, changes, error, text):
    arguments = {"queries": QUERIES, "positive_ids": IDS} | changes
    with pytest.raises(error, match=text):
        ContrastiveOutput(samplers)(**arguments)


# Repeats, and each query's own


@pytest.mark.parametrize("hits", [False, True])
@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
def test_merged_repeats_change_nothing(hits, correction):
    rng = np.random.default_rng(3)
    u, table, bias = rng.normal(size=(9, 4)), rng.normal(size=(60, 4)), rng.normal(size=60)
    ids = rng.integers(1, 60, 9)
    law = LogUniform(59, first_id=1)
    sampler = MixtureSampler([PopularitySampler(law, 80, unique=False), InBatchSampler(law)])
    options = {"correction": correction, "mask_accidental_hits": hits, "temperature": 0.8}
    items = Candidates(embeddings=table, bias=bias)
    # Metrics count copies, so with them nothing is merged.
    whole = ContrastiveOutput(sampler, **options)(u, ids, items=items, step=1)
    merged = ContrastiveOutput(sampler, **options, top_ks=())(u, ids, items=items, step=1)
    assert merged.loss == pytest.approx(whole.loss, rel=1e-12)
    assert merged.grads.queries == pytest.approx(whole.grads.queries, rel=1e-10)
    assert (merged.grads.items.ids == whole.grads.items.ids).all()
    assert merged.grads.items.rows == pytest.approx(whole.grads.items.rows, rel=1e-10, abs=1e-14)
    assert merged.grads.items.bias == pytest.approx(whole.grads.items.bias, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
@pytest.mark.parametrize("top_ks", [(), (5,)])
@pytest.mark.parametrize("hits", [False, True])
def test_each_querys_own_negatives_of_a_table(loss, top_ks, hits):
    rng = np.random.default_rng(4)
    u, table, bias = rng.normal(size=(6, 4)), rng.normal(size=(40, 4)), rng.normal(size=40)
    ids = rng.integers(0, 40, 6)
    sampler = PopularitySampler(LogUniform(40), 15, per_query=True)
    head = ContrastiveOutput(
        sampler, loss=loss, top_ks=top_ks, mask_accidental_hits=hits, store_negative_ids=True
    )
    out = head(u, ids, items=Candidates(embeddings=table, bias=bias), step=3)
    draw = sampler.sample(ids, step=3)
    assert (out.negative_ids == draw.negatives.ids).all()
    own = draw.negatives.ids
    value, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(ids if hits else None, table[ids], draw.positives.log_q, bias[ids]),
        Candidates(own if hits else None, table[own], draw.negatives.log_q, bias[own]),
        loss=loss,
    )
    d_table, d_bias = np.zeros_like(table), np.zeros_like(bias)
    np.add.at(d_table, ids, grads.positives.embeddings)
    np.add.at(d_table, own, grads.negatives.embeddings)
    np.add.at(d_bias, ids, grads.positives.bias)
    np.add.at(d_bias, own, grads.negatives.bias)
    assert out.loss == pytest.approx(value, rel=1e-12)
    assert out.grads.queries == pytest.approx(grads.queries, rel=1e-10)
    touched = np.unique(np.concatenate([ids, own.ravel()]))
    assert (out.grads.items.ids == touched).all()
    assert out.grads.items.rows == pytest.approx(d_table[touched], rel=1e-9, abs=1e-14)
    assert out.grads.items.bias == pytest.approx(d_bias[touched], rel=1e-9, abs=1e-14)
    assert bool(out.metrics) == bool(top_ks)


@pytest.mark.parametrize("num_items", [10, 10_000])
def test_places_of_ids(num_items):
    ids = np.array([7, 3, 7, 0, 9])
    distinct, place = places(ids, num_items)
    assert distinct.tolist() == [0, 3, 7, 9]
    assert place.tolist() == [2, 1, 2, 0, 3]
