"""The losses beside the softmax: against the reference, and what must hold of each by itself.

Accuracy rule: no further from float64 than the same equations in NumPy and the same dtype.
"""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from test_loss import (
    DTYPES,
    EVERYTHING,
    FLOATS,
    QUANTITIES,
    TRUE,
    _assert_same,
    _by_name,
    _call,
    _with,
)

from zipfneg import (
    Candidates,
    ContrastiveOutput,
    InBatchSampler,
    LogUniform,
    PopularitySampler,
    reference,
    sampled_softmax_backward,
    sampled_softmax_forward,
    sampled_softmax_loss,
    sampled_softmax_value_and_grad,
)
from zipfneg.cpu import pairwise
from zipfneg.loss import LOSSES

OTHERS = ["bpr", "bpr-max", "top1", "top1-max", "hinge", "bce", "gbce"]  # logistic is bpr
MEANS = ("bpr", "top1", "hinge")
PARAMETERS = {"bpr-max": 0.3, "hinge": 0.7, "gbce": 0.6}
both_layouts = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
every_loss = pytest.mark.parametrize("loss", OTHERS)


def _problem(loss, *sizes, **options):
    """A call of this loss, with log q and the correction only where they mean something to it."""
    if loss in ("hinge", "top1"):
        options["correction"] = "none"
    if loss == "gbce":
        options["log_q"] = True
    call = _call(*sizes, **options)
    parameter = PARAMETERS.get(loss)
    call.options.update(loss=loss, loss_parameter=parameter)
    call.oracle.update(loss=loss, parameter=parameter)
    return call


def _plain(oracle, d_loss, dtype):
    """Loss and gradients by the reference's equations of the scores, all in one dtype."""
    x = {
        name: value if name in ("dropped", "loss", "parameter") else np.asarray(value).astype(dtype)
        for name, value in oracle.items()
    }
    u, p, v, tau = x["queries"], x["positives"], x["negatives"], x["temperature"]
    shared, d = v.ndim == 2, np.asarray(d_loss, dtype)
    a_0 = ((u * p).sum(axis=1) + x["positive_bias"]) / tau
    a = ((u @ v.T if shared else (v @ u[:, :, None])[:, :, 0]) + x["negative_bias"]) / tau
    kept = np.broadcast_to(~oracle["dropped"], a.shape)
    parameter = None if x["parameter"] is None else dtype(x["parameter"])
    log_q_0 = np.broadcast_to(x["positive_log_q"], a_0.shape)
    log_q = np.broadcast_to(x["negative_log_q"], a.shape)
    loss, g_0, g = reference.LOSSES[x["loss"]](
        reference.Scores(a_0, a, log_q_0, log_q, kept, parameter)
    )
    g_0, g = d * g_0.astype(dtype), d[:, None] * g.astype(dtype)
    d_u = (g @ v if shared else (g[:, None] @ v)[:, 0]) + g_0[:, None] * p
    d_v = g.T @ u if shared else g[:, :, None] * u[:, None]
    d_bias = g.sum(axis=0) if shared else g
    d_tau = -((g_0 * a_0).sum() + (g * a).sum()) / tau
    # What rounding is relative to: the largest score, and the size of the terms that d_tau sums.
    largest = max(1, *(np.abs(y).max(initial=0) for y in (a_0, a, log_q_0, log_q)))
    if x["loss"] == "bpr-max":
        largest = largest**2
    size = (np.abs(g_0 * a_0).sum() + np.abs(g * a).sum()) / tau
    if x["loss"] == "top1-max":  # in whose slopes w·(f − L) terms as large as w cancel
        size += (np.abs(d) * np.abs(a).max(axis=1, initial=0)).sum() / tau
    grads = (d_u / tau, g_0[:, None] * u / tau, d_v / tau, g_0 / tau, d_bias / tau, d_tau)
    return loss * d, dict(zip(QUANTITIES, grads, strict=True)), size, largest


def _assert_accurate(call, loss, grads, d_loss=1.0):
    d = call.weight * d_loss
    exact_loss, exact = reference.sampled_softmax(**call.oracle, d_loss=d)
    exact_loss = exact_loss * call.weight
    dtype = np.float64 if call.args[0].dtype == np.float64 else np.float32
    plain_loss, _, _, largest = _plain(call.oracle, call.weight, dtype)
    _, plain, size, _ = _plain(call.oracle, d, dtype)
    loss_scale = call.weight + np.abs(exact_loss)
    if call.options["reduction"] != "none":
        exact_loss, plain_loss, loss_scale = (x.sum() for x in (exact_loss, plain_loss, loss_scale))
    assert loss.dtype == dtype
    assert np.shape(loss) == np.shape(exact_loss)
    pairs = {"loss": (loss, plain_loss, exact_loss, loss_scale)}
    for name, got in _by_name(grads).items():
        if got is None:
            assert name.endswith("bias"), name
            continue
        expected = np.asarray(getattr(exact, name))
        assert got.shape == expected.shape, name
        assert got.dtype == (dtype if name == "temperature" else call.args[0].dtype), name
        rounded = np.asarray(plain[name]).astype(got.dtype)
        pairs[name] = (got, rounded, expected, size if name == "temperature" else np.abs(expected))
    terms = 0
    if call.oracle["loss"] == "top1-max":
        names = ("queries", "positives", "negatives")
        largest_input = max(1, *(np.abs(call.oracle[name]).max(initial=0) for name in names))
        terms = np.abs(d).max(initial=0) * largest_input / call.oracle["temperature"]
    for name, (got, rounded, expected, scale) in pairs.items():
        if np.size(expected) == 0:
            continue
        errors = [np.abs(np.asarray(x, np.float64) - expected).max() for x in (got, rounded)]
        slack = np.finfo(dtype).eps * largest * (np.max(scale) + terms)
        assert errors[0] <= errors[1] + slack, (name, errors, slack)


def _check(call):
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    _assert_accurate(call, loss, grads)
    return loss, grads


def _of_scores(loss, a_0, a, **options):
    """The loss and gradients of one query u = 1, of scores given."""
    v = np.reshape(np.asarray(a, np.float64), (-1, 1))
    negatives = Candidates(embeddings=v, log_q=options.pop("log_q", None))
    positives = Candidates(embeddings=np.array([[float(a_0)]]), log_q=options.pop("log_q_0", None))
    return sampled_softmax_value_and_grad(
        np.ones((1, 1)), positives, negatives, loss=loss, **options
    )


# By hand

LN2, LN3 = np.log([2, 3])


@pytest.mark.parametrize("loss", ["bpr", "logistic"])
@pytest.mark.parametrize(
    ("correction", "odds"),
    # e^(z_j − z_0) of scores ln 3 and ln 2 over 0, with q = 1/4 and 1/8 over 1/2.
    [("both", (6, 8)), ("negatives", (12, 16)), ("none", (3, 2))],
)
def test_bpr_by_hand(correction, odds, loss):
    odds = np.array(odds)
    value, grads = _of_scores(
        loss, 0, [LN3, LN2], log_q_0=np.log([0.5]), log_q=np.log([0.25, 0.125]),
        correction=correction,
    )  # fmt: skip
    assert value == pytest.approx(np.log1p(odds).mean(), rel=1e-14)
    share = odds / (1 + odds) / 2
    assert grads.negatives.embeddings.ravel() == pytest.approx(share, rel=1e-14)
    assert grads.positives.embeddings.ravel() == pytest.approx([-share.sum()], rel=1e-14)


def test_hinge_by_hand():
    # 1 + a_j − a_0 = −3, 0.5 and 2
    value, grads = _of_scores("hinge", 1, [-3, 0.5, 2])
    assert value == pytest.approx(2.5 / 3)
    assert grads.negatives.embeddings.ravel() == pytest.approx(np.array([0, 1, 1]) / 3)
    assert grads.positives.embeddings.ravel() == pytest.approx([-2 / 3])
    assert _of_scores("hinge", 1, [-3, 0.5, 2], loss_parameter=4.0)[0] == pytest.approx(8.5 / 3)
    assert _of_scores("hinge", 1, [-3, 0.5, 2], loss_parameter=0)[0] == pytest.approx(1 / 3)


def test_top1_and_top1_max_by_hand():
    value, grads = _of_scores("top1", 0, [0, LN3])
    square = 1 / (1 + np.exp(-(LN3**2)))
    assert value == pytest.approx((1 + 0.75 + square) / 2, rel=1e-14)
    slope = 3 / 16 + 2 * LN3 * square * (1 - square)
    assert grads.negatives.embeddings.ravel() == pytest.approx([1 / 8, slope / 2], rel=1e-14)
    value, grads = _of_scores("top1-max", 0, [0, LN3])  # w = (1/4, 3/4)
    assert value == pytest.approx((1 + 3 * (0.75 + square)) / 4, rel=1e-14)
    d_weight = 3 / 16 * (0.75 + square - 1)
    expected = [1 / 16 - d_weight, 3 / 4 * slope + d_weight]
    assert grads.negatives.embeddings.ravel() == pytest.approx(expected, rel=1e-13)
    # log q makes the weights equal.
    value, _ = _of_scores("top1-max", 0, [0, LN3], log_q=np.log([1, 3]), log_q_0=np.zeros(1))
    assert value == pytest.approx((1 + 0.75 + square) / 2, rel=1e-14)


def test_bpr_max_by_hand():
    # w = (1/4, 3/4), σ(a_0 − a_j) = (1/2, 1/4): Σ wσ = 5/16
    value, grads = _of_scores("bpr-max", 0, [0, LN3])
    assert value == pytest.approx(np.log(16 / 5) + 0.75 * LN3**2, rel=1e-14)
    value, grads = _of_scores("bpr-max", 0, [0, LN3], loss_parameter=0)
    assert value == pytest.approx(np.log(16 / 5), rel=1e-14)
    # w_j·(1 − σ_j·σ_j·16/5) and v = (2/5, 3/5)
    assert grads.negatives.embeddings.ravel() == pytest.approx([1 / 4 - 1 / 5, 3 / 4 - 3 / 20])
    assert grads.positives.embeddings.ravel() == pytest.approx([-(1 / 5 + 9 / 20)])
    value, _ = _of_scores("bpr-max", 0, [0, LN3], log_q=np.log([1, 3]), log_q_0=np.zeros(1))
    assert value == pytest.approx(np.log(8 / 3) + 0.5 * LN3**2, rel=1e-14)


def test_bce_and_gbce_by_hand():
    value, grads = _of_scores("bce", LN3, [0, LN3])
    assert value == pytest.approx(np.log(4 / 3) + LN2 + np.log(4), rel=1e-14)
    assert grads.positives.embeddings.ravel() == pytest.approx([-1 / 4])
    assert grads.negatives.embeddings.ravel() == pytest.approx([1 / 2, 3 / 4])
    # α = 1/2 and t = 3/4: β = 5/8
    value, grads = _of_scores("gbce", LN3, [0, LN3], log_q_0=np.log([0.5]))
    assert value == pytest.approx(5 / 8 * np.log(4 / 3) + LN2 + np.log(4), rel=1e-14)
    assert grads.positives.embeddings.ravel() == pytest.approx([-5 / 32])
    # Expected more than once, with replacement: α = 1.
    value, _ = _of_scores("gbce", LN3, [0], log_q_0=np.log([7.0]), loss_parameter=1)
    assert value == pytest.approx(np.log(4 / 3) + LN2)


@every_loss
def test_reductions_and_weights(loss):
    # All scores are equal, so are the rows.
    call = _problem(loss, 2, 3, 4)
    x = (np.zeros((2, 3)), np.ones((2, 3)), np.ones((5, 3)))
    options = {name: call.options[name] for name in ("loss", "loss_parameter")}
    if loss == "gbce":
        x = (x[0], Candidates(embeddings=x[1], log_q=np.zeros(2)), x[2])
    each = {
        "bpr": LN2, "bpr-max": LN2, "top1": 1, "top1-max": 1, "hinge": 0.7, "bce": 6 * LN2,
        "gbce": 6 * LN2,
    }[loss]  # fmt: skip
    weight = np.array([1.0, 4.0])
    for extra, rows in (({}, [1, 1]), ({"sample_weight": weight}, weight)):
        for reduction in ("none", "sum", "mean"):
            expected = each * np.asarray(rows)
            if reduction != "none":
                expected = getattr(np, reduction)(expected)
            got = sampled_softmax_loss(*x, **options, **extra, reduction=reduction)
            assert got == pytest.approx(expected)


# Against the reference

OPTIONS = [
    {},
    {"log_q": True, "correction": "negatives", "reduction": "none"},
    {"log_q": True, "correction": "both", "reduction": "mean", "bias": True},
    {"bias": True, "temperature": 0.2},
    {"weight": True, "reduction": "mean", "ids": "repeats"},
    {"ids": "unique", "known": "pair"},
    {"ids": "repeats", "known": "scipy", "log_q": True},
    {"mask": "shared"},
    {"mask": "per-query", "log_q": True, "temperature": np.array(3.0, np.float32)},
]


@every_loss
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "S", "D"), [(1, 1, 1), (1, 7, 5), (7, 1, 3), (37, 101, 17), (64, 33, 32), (5, 257, 100)]
)
def test_as_accurate_as_plain_numpy(B, S, D, dtype, shared, loss):
    _check(_problem(loss, B, S, D, dtype=dtype, shared=shared, **EVERYTHING))


@every_loss
@both_layouts
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x) or "embeddings")
def test_every_option(options, shared, loss):
    if loss == "gbce":
        options = options | {"correction": "both"}
    call = _problem(loss, 13, 31, 6, shared=shared, **options)
    value, _ = _check(call)
    np.testing.assert_array_equal(sampled_softmax_loss(*call.args, **call.options), value)


@every_loss
@both_layouts
def test_gradients_are_finite_differences(shared, loss):
    call = _problem(loss, 3, 5, 2, dtype=np.float64, shared=shared, **EVERYTHING)
    _, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    got = dict(zip(FLOATS, (_by_name(grads)[name] for name in QUANTITIES), strict=False))
    step = 1e-6
    for name, gradient in got.items():
        for at in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):

                def moved(x, at=at, sign=sign):
                    x = x.copy()
                    x[at] += sign * step
                    return x

                ends.append(sampled_softmax_loss(*_with(call, name, moved), **call.options))
            assert gradient[at] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6), name
    tau = call.options["temperature"]
    ends = [
        sampled_softmax_loss(*call.args, **call.options | {"temperature": tau + sign * step})
        for sign in (1, -1)
    ]
    assert grads.temperature == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


@every_loss
@both_layouts
@pytest.mark.parametrize("workspace", [1, 2000, 20_000])
def test_any_division_into_blocks_of_rows(monkeypatch, workspace, shared, loss):
    call = _problem(loss, 23, 41, 5, dtype=np.float64, shared=shared, **EVERYTHING)
    value, grads = _check(call)
    monkeypatch.setattr(pairwise, "WORKSPACE", workspace)
    blocked_value, blocked = _check(call)
    np.testing.assert_allclose(blocked_value, value, rtol=1e-14)
    _assert_same(blocked, grads, rtol=1e-11, atol=1e-13)


@every_loss
@pytest.mark.parametrize(("B", "S", "D", "shared"), [(1501, 1499, 8, True), (701, 61, 32, False)])
def test_blocks_at_full_size_on_any_number_of_threads(monkeypatch, B, S, D, shared, loss):
    call = _problem(loss, B, S, D, shared=shared, **EVERYTHING)
    value, grads = _check(call)
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "3")
    monkeypatch.setattr(pairwise, "GRAIN", 1)
    other_value, other = sampled_softmax_value_and_grad(*call.args, **call.options)
    assert other_value == value
    _assert_same(other, grads, rtol=0, atol=0)


# Forward and backward


@every_loss
@both_layouts
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_of_any_upstream_gradient(reduction, dtype, shared, loss):
    options = EVERYTHING | {"reduction": reduction}
    call = _problem(loss, 29, 31, 6, dtype=dtype, shared=shared, **options)
    value, saved = sampled_softmax_forward(*call.args, **call.options)
    np.testing.assert_array_equal(
        value, sampled_softmax_value_and_grad(*call.args, **call.options)[0]
    )
    upstreams = [1.0, -3, np.float32(0.5)]
    if reduction == "none":
        upstreams.append(np.random.default_rng(3).normal(size=29).astype(np.float32))
        upstreams.append(np.zeros(29))
    for d_loss in upstreams:
        d = np.asarray(d_loss, np.float64)
        _assert_accurate(call, value, sampled_softmax_backward(d_loss, saved), d)


# Invariants


def test_logistic_is_another_name_of_bpr():
    call = _problem("bpr", 9, 7, 4, **EVERYTHING)
    value, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    call.options["loss"] = "logistic"
    other_value, other = sampled_softmax_value_and_grad(*call.args, **call.options)
    assert other_value == value
    _assert_same(other, grads, rtol=0, atol=0)


def test_of_one_negative_bpr_is_the_softmax():
    call = _problem("bpr", 9, 1, 4, dtype=np.float64, bias=True, log_q=True, temperature=0.5)
    value, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    call.options["loss"] = "softmax"
    softmax_value, softmax_grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    assert value == pytest.approx(softmax_value, rel=1e-14)
    _assert_same(grads, softmax_grads, rtol=1e-12, atol=1e-15)


def test_of_equal_negatives_top1_max_is_top1():
    call = _problem("top1", 9, 1, 4, dtype=np.float64, temperature=0.5)
    u, positives, negatives = call.args
    many = np.repeat(negatives.embeddings, 5, axis=0)
    values = [
        sampled_softmax_loss(u, positives, many, loss=loss, temperature=0.5)
        for loss in ("top1", "top1-max")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-13)


@pytest.mark.parametrize("t", [0, 0.3, 1])
def test_gbce_is_bce_with_a_lighter_positive(t):
    call = _problem("gbce", 9, 7, 4, dtype=np.float64, bias=True, temperature=0.5)
    options = call.options | {"loss_parameter": t, "reduction": "none"}
    u, positives, negatives = call.args
    value = sampled_softmax_loss(u, positives, negatives, **options)
    plain = {"loss": "bce", "correction": "none", "reduction": "none", "temperature": 0.5}
    bce = sampled_softmax_loss(u, positives, negatives, **plain)
    positive = sampled_softmax_loss(
        u, positives, negatives, **plain, mask=np.ones(7, bool)
    )  # the positive's term alone
    alpha = np.exp(positives.log_q)
    # As Petrov & Macdonald 2023 write it
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    np.testing.assert_allclose(value, bce + (beta - 1) * positive, rtol=1e-13)


def test_bce_with_log_of_expected_counts_is_noise_contrastive_estimation():
    # Gutmann & Hyvärinen 2012: h = σ(log p_model − log(ν·p_noise)), ν noise samples each.
    rng = np.random.default_rng(0)
    num_items, num_noise = 11, 6
    law, logits = LogUniform(num_items), rng.normal(size=num_items)
    data, noise = rng.integers(num_items, size=5), law.draw((num_noise,), seed=1)
    sampler = PopularitySampler(law, num_noise, unique=False)

    def side(ids):
        return Candidates(embeddings=logits[ids, None], log_q=sampler.log_q(ids))

    loss = sampled_softmax_loss(
        np.ones((5, 1)), side(data), side(noise), loss="bce", reduction="none"
    )
    model, noise_prob = np.exp(logits), num_noise * np.exp(law.log_prob(np.arange(num_items)))
    h = model / (model + noise_prob)
    expected = -np.log(h[data]) - np.log(1 - h[noise]).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


@every_loss
@both_layouts
def test_a_dropped_negative_equals_a_removed_one(shared, loss):
    call = _problem(
        loss, 9, 14, 4, dtype=np.float64, shared=shared, bias=True, log_q=True, temperature=0.5
    )
    u, positives, negatives = call.args
    negatives = negatives._replace(ids=np.broadcast_to(np.arange(14), negatives.bias.shape))
    known = (3 * np.arange(10), np.tile([2, 5, 13], 9))
    value, grads = sampled_softmax_value_and_grad(
        u, positives, negatives, **call.options, known_positives=known
    )
    left = np.delete(np.arange(14), [2, 5, 13])
    axis = 0 if shared else 1
    fewer = Candidates(*(np.take(x, left, axis) for x in negatives))
    expected, removed = sampled_softmax_value_and_grad(u, positives, fewer, **call.options)
    assert value == pytest.approx(expected, rel=1e-14)
    for x in (grads.negatives.embeddings, grads.negatives.bias):
        assert (np.take(x, [2, 5, 13], axis) == 0).all()
    remaining = Candidates(
        embeddings=np.take(grads.negatives.embeddings, left, axis),
        bias=np.take(grads.negatives.bias, left, axis),
    )
    _assert_same(grads._replace(negatives=remaining), removed, rtol=1e-12, atol=1e-15)


@every_loss
@both_layouts
def test_a_row_without_negatives(shared, loss):
    call = _problem(loss, 6, 5, 3, shared=shared, bias=True, temperature=0.5, reduction="none")
    if loss == "hinge":
        call.options["loss_parameter"] = 30.0
    mask = np.zeros((6, 5), bool)
    mask[[1, 4]] = True
    value, grads = sampled_softmax_value_and_grad(*call.args, **call.options, mask=mask)
    kept = [0, 2, 3, 5]
    assert (value[kept] > 0).all()
    gone = (value, grads.queries, grads.positives.embeddings, grads.positives.bias)
    if loss in ("bce", "gbce"):  # the positive's term stays
        assert all((x[[1, 4]] != 0).all() for x in gone)
    else:
        assert all((x[[1, 4]] == 0).all() for x in gone)


@every_loss
@both_layouts
@pytest.mark.parametrize("S", [0, 1, 3])
@pytest.mark.parametrize("B", [0, 1, 2, 127])
def test_every_size(B, S, shared, loss):
    call = _problem(loss, B, S, 8, shared=shared, bias=True, reduction="mean")
    value, grads = _check(call)
    assert value == 0 if B == 0 or (S == 0 and "bce" not in loss) else value > 0
    for name, x in _by_name(grads).items():
        assert np.isfinite(x).all(), name


@every_loss
def test_per_query_negatives_that_are_equal_are_shared_ones(loss):
    call = _problem(loss, 7, 9, 4, dtype=np.float64, **EVERYTHING)
    u, positives, negatives = call.args
    each = Candidates(*(np.broadcast_to(x, (7, *x.shape)) for x in negatives))
    value, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    each_value, each_grads = sampled_softmax_value_and_grad(u, positives, each, **call.options)
    assert each_value == pytest.approx(value, rel=1e-13)
    summed = Candidates(
        embeddings=each_grads.negatives.embeddings.sum(axis=0),
        bias=each_grads.negatives.bias.sum(axis=0),
    )
    _assert_same(each_grads._replace(negatives=summed), grads, rtol=1e-11, atol=1e-14)


SQUARES = (2e4) ** 2
AT_THE_ENDS = {  # of scores a_0 and a_j of ±2e4: losses of (+, −), (−, +), (+, +), (−, −)
    "bpr": (0, 4e4, LN2, LN2),
    "bpr-max": (SQUARES, SQUARES + 4e4, SQUARES + LN2, SQUARES + LN2),
    "top1": (1, 2, 1.5, 1.5),
    "top1-max": (1, 2, 1.5, 1.5),
    "hinge": (0, 4e4 + 1, 1, 1),
    "bce": (0, 4e4, 2e4, 2e4),
    "gbce": (0, 4e4, 2e4, 2e4),
}


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_ten_thousand_stay_finite(dtype, loss):
    if loss == "bpr-max" and dtype == np.float16:
        pytest.skip("2·λ·a·u exceeds float16")
    u = np.full((4, 1), 100, dtype)
    p = np.array([[100], [-100], [100], [-100]], dtype)
    v = np.array([[[-100]], [[100]], [[100]], [[-100]]], dtype)
    positives = Candidates(embeddings=p, log_q=np.zeros(4) if loss == "gbce" else None)
    value, grads = sampled_softmax_value_and_grad(
        u, positives, v, loss=loss, reduction="none", temperature=0.5
    )
    np.testing.assert_allclose(value, AT_THE_ENDS[loss], rtol=1e-6)
    for name, x in _by_name(grads).items():
        assert x is None or np.isfinite(x.astype(np.float64)).all(), name


@every_loss
@both_layouts
@pytest.mark.parametrize("temperature", [1e-10, 1e-4, 1e4, 0.99e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_temperature_gives_finite_gradients(dtype, temperature, shared, loss):
    call = _problem(loss, 6, 5, 3, dtype=dtype, shared=shared, bias=True, temperature=temperature)
    value, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    assert np.isfinite(value)
    for name, x in _by_name(grads).items():
        assert np.isfinite(x).all(), name


def test_squares_that_overflow_float32_leave_no_nan():
    u, p, v = np.ones((1, 1)), np.ones((1, 1)), np.array([[1e20], [-2e20]])
    u, p, v = (x.astype(np.float32) for x in (u, p, v))
    value, grads = sampled_softmax_value_and_grad(u, p, v, loss="bpr-max", loss_parameter=1e-9)
    assert value == pytest.approx(1e31, rel=1e-6)
    np.testing.assert_allclose(grads.negatives.embeddings, [[2e11], [0]], rtol=1e-6)


@every_loss
@pytest.mark.parametrize("way", ["value and grad", "forward and backward"])
def test_memory_is_a_small_part_of_the_scores(way, loss):
    def run(size):
        rng = np.random.default_rng(0)
        u, p, v = (rng.normal(size=(size, 64)).astype(np.float32) / 8 for _ in range(3))
        positives = Candidates(embeddings=p, log_q=np.zeros(size) if loss == "gbce" else None)
        tracemalloc.start()
        try:
            if way == "value and grad":
                sampled_softmax_value_and_grad(u, positives, v, loss=loss)
            else:
                _, saved = sampled_softmax_forward(u, positives, v, loss=loss)
                sampled_softmax_backward(1.0, saved)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    run(16)  # compiles
    size = 4096
    assert run(size) < 0.2 * size * size * 4


@every_loss
@both_layouts
@pytest.mark.parametrize("name", ["queries", "positives.embeddings", "negatives.embeddings"])
def test_nan_is_never_hidden(name, shared, loss):
    def broken(x):
        x = x.copy()
        x.reshape(-1)[0] = np.nan
        return x

    call = _problem(loss, 4, 3, 2, shared=shared, bias=True, reduction="none")
    args = _with(call, name, broken)
    value, grads = sampled_softmax_value_and_grad(*args, **call.options)
    assert np.isnan(value[0])
    assert np.isnan(grads.queries[0]).all()
    # The positive's own term knows nothing of the negatives.
    apart = loss in ("bce", "gbce") and name.startswith("negatives")
    assert np.isnan(grads.positives.embeddings[0]).any() == (not apart)
    assert np.isfinite(value[1:]).all() == (not shared or name != "negatives.embeddings")
    value, saved = sampled_softmax_forward(*args, **call.options)
    assert np.isnan(value[0])
    assert np.isnan(sampled_softmax_backward(1.0, saved).queries[0]).all()


@pytest.mark.parametrize("loss", ["bpr-max", "top1-max"])
def test_repeats_equal_one_copy_with_log_q_less_log_count(loss):
    rng = np.random.default_rng(4)
    call = _problem(loss, 12, 5, 4, dtype=np.float64, bias=True, log_q=True, temperature=0.7)
    u, positives, once = call.args
    counts = np.array([1, 3, 2, 1, 7])
    slots = rng.permutation(np.repeat(np.arange(5), counts))
    repeated = Candidates(*(None if x is None else x[slots] for x in once))
    merged = once._replace(log_q=once.log_q - np.log(counts))
    value, grads = sampled_softmax_value_and_grad(u, positives, repeated, **call.options)
    merged_value, merged_grads = sampled_softmax_value_and_grad(
        u, positives, merged, **call.options
    )
    assert merged_value == pytest.approx(value, rel=1e-13)
    summed = Candidates(embeddings=np.zeros((5, 4)), bias=np.zeros(5))
    np.add.at(summed.embeddings, slots, grads.negatives.embeddings)
    np.add.at(summed.bias, slots, grads.negatives.bias)
    _assert_same(merged_grads, grads._replace(negatives=summed), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", ["bpr-max", "top1-max"])
def test_the_weights_are_corrected_alike_by_both_and_by_negatives(loss):
    call = _problem(loss, 7, 5, 4, log_q=True)
    u, positives, negatives = call.args
    both = sampled_softmax_loss(u, positives, negatives, loss=loss, correction="both")
    for side in (positives, positives._replace(log_q=None)):
        for correction in ("both", "negatives"):
            got = sampled_softmax_loss(u, side, negatives, loss=loss, correction=correction)
            assert got == both
    assert both != sampled_softmax_loss(u, positives, negatives, loss=loss, correction="none")


def test_each_gradient_has_its_own_inputs_dtype():
    u, p, v = np.ones((2, 3), np.float16), np.ones((2, 3)), np.ones((4, 3), np.float32)
    loss, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(embeddings=p, bias=np.ones(2, np.float32)),
        Candidates(embeddings=v, bias=np.ones(4, ml_dtypes.bfloat16)),
        loss="bpr",
    )
    assert loss.dtype == grads.temperature.dtype == np.float64
    assert grads.queries.dtype == np.float16
    assert grads.positives.bias.dtype == grads.negatives.embeddings.dtype == np.float32
    assert grads.negatives.bias.dtype == ml_dtypes.bfloat16


# Consistency: the model that training finds is the true law


def _fitted(loss, correction="both", hits="kept"):
    """Free logits, one an item, trained on expected positives and drawn negatives.

    Every item is a row, weighed by its probability; descent with averaged iterates.
    """
    num_items, num_steps, num_sampled = len(TRUE), 4000, 20
    sampler = PopularitySampler(LogUniform(num_items), num_sampled, unique=hits == "removed")
    log_q = sampler.log_q(np.arange(num_items))
    queries, ids = np.ones((num_items, 1)), np.arange(num_items)
    logits, mean = np.zeros(num_items), np.zeros(num_items)
    rate = 0.02 if loss == "bpr" else 0.005
    for step in range(num_steps):
        drawn = sampler.sample(step=step).negatives.ids
        _, grads = sampled_softmax_value_and_grad(
            queries,
            Candidates(ids if hits == "removed" else None, logits[:, None], log_q),
            Candidates(drawn if hits == "removed" else None, logits[drawn, None], log_q[drawn]),
            sample_weight=TRUE,
            correction=correction,
            loss=loss,
            reduction="sum",
        )
        d_logits = grads.positives.embeddings[:, 0]
        np.add.at(d_logits, drawn, grads.negatives.embeddings[:, 0])
        logits -= rate * d_logits / TRUE
        if step >= num_steps // 4:
            mean += logits / (num_steps - num_steps // 4)
    return mean


def _divergence(logits):
    """KL(P, softmax of the logits)"""
    return (TRUE * (np.log(TRUE) - logits + np.logaddexp.reduce(logits))).sum()


@pytest.mark.parametrize("hits", ["kept", "removed"])
def test_training_by_bpr_with_log_q_finds_the_true_law(hits):
    assert _divergence(_fitted("bpr", hits=hits)) < 0.005


def test_noise_contrastive_estimation_finds_the_true_law_and_its_normaliser():
    logits = _fitted("bce")
    assert _divergence(logits) < 0.005
    assert np.exp(logits).sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("t", "at_rest"), [(1.0, True), (0.75, False)])
def test_gbce_with_t_of_1_is_at_rest_at_the_true_probabilities(t, at_rest):
    sampler = PopularitySampler(LogUniform(len(TRUE)), 20)
    ids = np.arange(len(TRUE))
    logits = np.log(TRUE / (1 - TRUE))[:, None]
    slopes = []
    for step in range(2000):
        drawn = sampler.sample(step=step).negatives.ids
        _, grads = sampled_softmax_value_and_grad(
            np.ones(logits.shape),
            Candidates(ids, logits, sampler.log_q(ids)),
            Candidates(drawn, logits[drawn]),
            sample_weight=TRUE,
            loss="gbce",
            loss_parameter=t,
            reduction="sum",
        )
        slopes.append(grads.positives.embeddings[:, 0])
        np.add.at(slopes[-1], drawn, grads.negatives.embeddings[:, 0])
    errors = np.mean(slopes, axis=0) / (np.std(slopes, axis=0) / len(slopes) ** 0.5)
    assert (np.abs(errors) < 5).all() == at_rest


@pytest.mark.parametrize("loss", ["bpr", "bce"])
def test_training_without_log_q_does_not(loss):
    assert _divergence(_fitted(loss, correction="none")) > 0.2


# The head


@every_loss
@pytest.mark.parametrize("in_batch", [False, True], ids=["table", "in-batch"])
def test_the_head_equals_its_parts(in_batch, loss):
    rng = np.random.default_rng(1)
    law, ids = LogUniform(30), rng.integers(30, size=9)
    table, queries = rng.normal(size=(30, 4)), rng.normal(size=(9, 4))
    sampler = InBatchSampler(law) if in_batch else PopularitySampler(law, 7)
    correction = "none" if loss in ("hinge", "top1") else "both"
    options = {
        "temperature": 0.4, "correction": correction, "loss": loss,
        "loss_parameter": PARAMETERS.get(loss),
    }  # fmt: skip
    head = ContrastiveOutput(sampler, **options, top_ks=(3,))
    items = {"positives": table[ids]} if in_batch else {"items": table}
    out = head(queries, ids, **items, step=2)
    draw = sampler.sample(Candidates(ids, table[ids]), step=2)
    positives, negatives = draw.positives, draw.negatives
    value, grads = sampled_softmax_value_and_grad(
        queries,
        positives._replace(ids=ids, embeddings=table[ids]),
        negatives._replace(embeddings=table[negatives.ids]),
        **options,
    )
    assert out.loss == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(out.grads.queries, grads.queries, rtol=1e-12, atol=1e-15)
    d_table = np.zeros((30, 4))
    np.add.at(d_table, negatives.ids, grads.negatives.embeddings)
    if in_batch:
        expected = grads.positives.embeddings + grads.negatives.embeddings
        np.testing.assert_allclose(out.grads.positives.embeddings, expected, rtol=1e-12, atol=1e-15)
    else:
        np.add.at(d_table, ids, grads.positives.embeddings)
        rows = d_table[out.grads.items.ids]
        np.testing.assert_allclose(out.grads.items.rows, rows, rtol=1e-12, atol=1e-15)
    # The metrics are of the scores alone, whatever the loss.
    plain = ContrastiveOutput(sampler, temperature=0.4, top_ks=(3,))
    assert out.metrics == plain(queries, ids, **items, step=2).metrics
    assert len(out.metrics) == 5


def test_the_head_takes_plain_scores_where_log_q_has_no_meaning():
    head = ContrastiveOutput(PopularitySampler(LogUniform(9), 3), loss="hinge")
    with pytest.raises(ValueError, match=r"^correction: .* log q has no meaning"):
        head(np.ones((2, 4)), np.arange(2), items=np.ones((9, 4)))


# Against PyTorch


@pytest.mark.frameworks
@pytest.mark.parametrize("loss", ["bpr", "hinge", "bce", "gbce", "bpr-max", "top1", "top1-max"])
def test_equals_what_torch_differentiates(loss):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 5)) for n in (8, 8, 11)]
    log_q_0, log_q = np.log(rng.uniform(0.1, 0.9, 8)), np.log(rng.uniform(0.1, 0.9, 11))
    correction = "none" if loss in ("hinge", "top1") else "both"
    value, grads = sampled_softmax_value_and_grad(
        arrays[0],
        Candidates(embeddings=arrays[1], log_q=log_q_0),
        Candidates(embeddings=arrays[2], log_q=log_q),
        loss=loss,
        correction=correction,
        temperature=0.6,
    )
    u, p, v = (torch.tensor(x, requires_grad=True) for x in arrays)
    a_0, a = (u * p).sum(1, keepdim=True) / 0.6, u @ v.T / 0.6
    log_q_0, log_q = torch.tensor(log_q_0)[:, None], torch.tensor(log_q)
    z_0, z = a_0 - log_q_0, a - log_q
    w = torch.softmax(z, 1)
    f = torch.sigmoid(a - a_0) + torch.sigmoid(a**2)
    ones, zeros = torch.ones_like(a_0), torch.zeros_like(a)
    bce = F.binary_cross_entropy_with_logits
    beta = 1 - 0.75 * (1 - log_q_0.exp())
    expected = {
        "bpr": lambda: -F.logsigmoid(z_0 - z).mean(),
        "hinge": lambda: F.margin_ranking_loss(
            a_0.expand_as(a), a, torch.ones_like(a), margin=1.0
        ),
        "bce": lambda: (bce(z_0, ones, reduction="sum") + bce(z, zeros, reduction="sum")) / 8,
        "gbce": lambda: (
            bce(a_0, ones, pos_weight=beta, reduction="sum") + bce(a, zeros, reduction="sum")
        ) / 8,
        "bpr-max": lambda: (
            -torch.log((w * torch.sigmoid(a_0 - a)).sum(1)) + (w * a**2).sum(1)
        ).mean(),
        "top1": lambda: f.mean(),
        "top1-max": lambda: (w * f).sum(1).mean(),
    }[loss]()  # fmt: skip
    assert value == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    for x, got in zip(
        (u, p, v),
        (grads.queries, grads.positives.embeddings, grads.negatives.embeddings),
        strict=True,
    ):
        np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-10, atol=1e-14)


# Errors

B, S, D = 3, 4, 2
SIDES = {"positives": (B,), "negatives": (S,)}


def _side(name, *, log_q=False):
    shape = SIDES[name]
    return Candidates(
        embeddings=np.ones((*shape, D)), log_q=np.full(shape, -1.0) if log_q else None
    )


@pytest.mark.parametrize(
    ("options", "given", "error", "text"),
    [
        (
            {"loss": "bpr", "loss_parameter": 1.0},
            (),
            ValueError,
            "^loss_parameter: expected None, ",
        ),
        (
            {"loss": "softmax", "loss_parameter": 1.0},
            (),
            ValueError,
            "since 'softmax' has none, got 1.0; it is λ of 'bpr-max', the margin of 'hinge', t of",
        ),
        (
            {"loss": "bpr-max", "loss_parameter": -0.1},
            (),
            ValueError,
            "^loss_parameter: expected a finite number from 0, λ of 'bpr-max', got -0.1",
        ),
        ({"loss": "hinge", "loss_parameter": -1}, (), ValueError, "the margin of 'hinge', got -1"),
        ({"loss": "hinge", "loss_parameter": np.inf}, (), ValueError, "finite .* got inf"),
        ({"loss": "hinge", "loss_parameter": np.nan}, (), ValueError, "finite .* got nan"),
        (
            {"loss": "gbce", "loss_parameter": 1.01},
            (),
            ValueError,
            "^loss_parameter: expected a finite number from 0 to 1, t of 'gbce', got 1.01",
        ),
        ({"loss": "hinge", "loss_parameter": "1"}, (), TypeError, "expected a number, got '1'"),
        ({"loss": "hinge", "loss_parameter": True}, (), TypeError, "a number, got True"),
        *(
            (
                {"loss": loss, "correction": correction},
                ("positives", "negatives"),
                ValueError,
                f"^correction: .*log q has no meaning in '{loss}'.*pass correction=\"none\"",
            )
            for loss in ("hinge", "top1")
            for correction in ("both", "negatives")
        ),
        ({"loss": "gbce"}, (), ValueError, r"^positives\.log_q: expected log q, by which 'gbce'"),
        ({"loss": "gbce"}, ("negatives",), ValueError, r"^positives\.log_q: expected log q, by"),
        (
            {"loss": "gbce", "correction": "none"},
            ("positives", "negatives"),
            ValueError,
            '^correction: expected "both" or "negatives", since \'gbce\' weighs',
        ),
        *(
            (
                {"loss": loss},
                ("positives",),
                ValueError,
                r"^negatives\.log_q: expected log q, since",
            )
            for loss in ("bpr", "bce", "bpr-max", "top1-max")
        ),
        ({"loss": "bpr"}, ("negatives",), ValueError, r"^positives\.log_q: expected log q, since"),
    ],
)
def test_errors_name_the_argument(options, given, error, text):
    sides = {name: _side(name, log_q=name in given) for name in SIDES}
    for function in (
        sampled_softmax_loss,
        sampled_softmax_value_and_grad,
        sampled_softmax_forward,
    ):
        with pytest.raises(error, match=text):
            function(np.ones((B, D)), **sides, **options)


def test_errors_of_the_heads_parameter():
    with pytest.raises(ValueError, match=r"^loss_parameter: .* since 'bpr' has none"):
        ContrastiveOutput(PopularitySampler(LogUniform(9), 3), loss="bpr", loss_parameter=1.0)


@pytest.mark.parametrize("loss", [name for name, kind in LOSSES.items() if kind.parameter])
def test_the_parameter_has_a_default(loss):
    kind = {"bpr-max": 1.0, "hinge": 1.0, "gbce": 0.75}
    sides = {name: _side(name, log_q=loss == "gbce") for name in SIDES}
    losses = [
        sampled_softmax_loss(np.ones((B, D)), **sides, loss=loss, loss_parameter=x)
        for x in (None, kind[loss], np.float32(kind[loss]), 0)
    ]
    assert losses[0] == losses[1] == losses[2] != losses[3]
