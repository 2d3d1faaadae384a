"""The sampled softmax against the float64 reference, and what must hold of it by itself.

Accuracy rule: no further from float64 than the plain NumPy version in the same dtype, below.
"""

import tracemalloc
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

from zipfneg import (
    Candidates,
    Empirical,
    LogUniform,
    PopularitySampler,
    reference,
    sampled_softmax_backward,
    sampled_softmax_diagnostics,
    sampled_softmax_forward,
    sampled_softmax_loss,
    sampled_softmax_value_and_grad,
)

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
QUANTITIES = (
    "queries", "positives", "negatives", "positive_bias", "negative_bias", "temperature",
)  # fmt: skip


class Call(NamedTuple):
    """Arguments of the library, and the same problem as the reference takes it."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    oracle: dict[str, Any]
    weight: Any  # (B,) dloss/dL_i


def _call(
    B,
    S,
    D,
    dtype=np.float32,
    *,
    shared=True,
    bias=False,
    log_q=False,
    ids=None,
    known=None,
    mask=None,
    weight=False,
    correction="both",
    temperature=1.0,
    reduction="sum",
):
    rng = np.random.default_rng([B, S, D])
    columns = (S,) if shared else (B, S)
    num_ids = {"unique": 2 * S, "repeats": max(2, S // 3), None: 2 * S}[ids]

    def normal(*shape):
        x = (rng.normal(size=shape) * D**-0.25).astype(dtype)
        x.flags.writeable = False  # inputs are only borrowed
        return x

    def side(shape, side_ids):
        return Candidates(
            ids=side_ids if ids else None,
            embeddings=normal(*shape, D),
            log_q=rng.uniform(-6, 0, size=shape) if log_q else None,
            bias=normal(*shape) if bias else None,
        )

    if ids == "repeats":
        negative_ids = rng.integers(num_ids, size=columns)
    else:
        negative_ids = rng.permuted(
            np.broadcast_to(np.arange(num_ids), (*columns[:-1], num_ids)), axis=-1
        )[..., :S]
    positive_ids = rng.integers(max(1, num_ids), size=B)
    u, positives, negatives = normal(B, D), side((B,), positive_ids), side(columns, negative_ids)

    pair = drop = None
    if known:
        indptr = np.cumsum([0, *rng.integers(0, 4, B)])
        pair = (indptr, rng.integers(num_ids, size=indptr[-1]))
    if mask:
        drop = rng.random((S,) if mask == "shared" else (B, S)) < 0.3
    weights = rng.uniform(0, 2, B) if weight else None
    csr = pair
    if known == "scipy":
        csr = scipy.sparse.csr_array((np.ones(pair[1].size), pair[1], pair[0]), (B, num_ids))
    dropped = reference.dropped_negatives(
        negative_ids if ids else np.zeros(S, int), positive_ids if ids else None, pair, drop, B
    )

    def exact(x):
        return 0.0 if x is None else np.asarray(x, np.float64)

    oracle = {
        "queries": exact(u),
        "positives": exact(positives.embeddings),
        "negatives": exact(negatives.embeddings),
        "positive_bias": exact(positives.bias),
        "negative_bias": exact(negatives.bias),
        "positive_log_q": exact(positives.log_q if correction == "both" else None),
        "negative_log_q": exact(negatives.log_q if correction != "none" else None),
        "dropped": dropped,
        "temperature": float(temperature),
    }
    options = {"correction": correction, "reduction": reduction, "temperature": temperature}
    given = {"known_positives": csr, "mask": drop, "sample_weight": weights}
    options |= {name: x for name, x in given.items() if x is not None}
    row_weight = np.ones(B) if weights is None else weights
    if reduction == "mean":
        row_weight = row_weight / max(1, B)
    return Call((u, positives, negatives), options, oracle, row_weight)


def _plain(oracle, d_loss, dtype):
    """Loss and gradients as one writes them in NumPy, in one dtype, all logits at once."""
    x = {name: np.asarray(value).astype(dtype) for name, value in oracle.items()}
    u, p, v, tau = x["queries"], x["positives"], x["negatives"], x["temperature"]
    d = np.asarray(d_loss, dtype)
    shared = v.ndim == 2
    a_0 = ((u * p).sum(axis=1) + x["positive_bias"]) / tau
    scores = u @ v.T if shared else (v @ u[:, :, None])[:, :, 0]
    a = (scores + x["negative_bias"]) / tau
    z_0 = a_0 - x["positive_log_q"]
    z = np.where(oracle["dropped"], dtype(-np.inf), a - x["negative_log_q"])
    z = np.concatenate([z_0[:, None], z], axis=1)
    shift = z.max(axis=1)
    e = np.exp(z - shift[:, None])
    total = e.sum(axis=1)
    loss = np.log(total) + shift - z_0
    g = e / total[:, None]
    g[:, 0] -= 1
    g *= d[:, None]
    g_0, g_s = g[:, 0], g[:, 1:]
    d_u = (g_s @ v if shared else (g_s[:, None] @ v)[:, 0]) + g_0[:, None] * p
    d_v = g_s.T @ u if shared else g_s[:, :, None] * u[:, None]
    d_bias = g_s.sum(axis=0) if shared else g_s
    d_tau = -((g_0 * a_0).sum() + (g_s * a).sum()) / tau
    # What rounding is relative to: the largest logit, and the size of the terms that d_tau sums.
    largest = np.abs(z[np.isfinite(z)]).max(initial=1)
    size = (np.abs(g_0 * a_0).sum() + np.abs(g_s * a).sum()) / tau
    grads = (d_u / tau, g_0[:, None] * u / tau, d_v / tau, g_0 / tau, d_bias / tau, d_tau)
    return loss * d, dict(zip(QUANTITIES, grads, strict=True)), size, largest


def _by_name(grads):
    return {
        "queries": grads.queries,
        "positives": grads.positives.embeddings,
        "negatives": grads.negatives.embeddings,
        "positive_bias": grads.positives.bias,
        "negative_bias": grads.negatives.bias,
        "temperature": grads.temperature,
    }


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
    for name, (got, rounded, expected, scale) in pairs.items():
        if np.size(expected) == 0:
            continue
        errors = [np.abs(np.asarray(x, np.float64) - expected).max() for x in (got, rounded)]
        slack = np.finfo(dtype).eps * largest * np.max(scale)
        assert errors[0] <= errors[1] + slack, (name, errors, slack)


def _check(call):
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    _assert_accurate(call, loss, grads)
    return loss, grads


def _assert_same(got, expected, **tolerance):
    for name, x in _by_name(got).items():
        y = _by_name(expected)[name]
        if y is None:
            assert x is None, name
        else:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)


# By hand


@pytest.mark.parametrize(
    ("correction", "log_ratio"),
    # z = 4 + c against ln 4 and 2 + ln 8; c = ln 2 for "both".
    [
        ("both", np.log((4 + 8 * np.e**2) / (2 * np.e**4))),
        ("negatives", np.log((4 + 8 * np.e**2) / np.e**4)),
        ("none", np.log((1 + np.e**2) / np.e**4)),
    ],
)
def test_one_row_by_hand(correction, log_ratio):
    u, p, v = np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [1.0, 0.0]])
    loss, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(embeddings=p, log_q=np.log([0.5])),
        Candidates(embeddings=v, log_q=np.log([0.25, 0.125])),
        temperature=0.5,
        correction=correction,
    )
    assert loss == pytest.approx(np.log1p(np.exp(log_ratio)), rel=1e-14)
    wrong = 1 / (1 + np.exp(-log_ratio))  # the share of the negatives
    assert grads.positives.embeddings == pytest.approx(np.array([[-2 * wrong, 0]]), rel=1e-13)
    first = 1 / (1 + np.e**2) if correction == "none" else 1 / (1 + 2 * np.e**2)
    expected = np.array([[2 * wrong * first, 0], [2 * wrong * (1 - first), 0]])
    assert grads.negatives.embeddings == pytest.approx(expected, rel=1e-13)


def test_reductions_and_weights_by_hand():
    # All scores are equal: each row's loss is ln 2.
    x = (np.zeros((2, 3)), np.ones((2, 3)), np.ones((1, 3)))
    weight, ln2 = np.array([1.0, 4.0]), np.log(2)
    assert sampled_softmax_loss(*x) == pytest.approx(ln2)
    assert sampled_softmax_loss(*x, reduction="none") == pytest.approx([ln2, ln2])
    options = {"sample_weight": weight}
    assert sampled_softmax_loss(*x, **options) == pytest.approx(2.5 * ln2)
    assert sampled_softmax_loss(*x, **options, reduction="sum") == pytest.approx(5 * ln2)
    assert sampled_softmax_loss(*x, **options, reduction="none") == pytest.approx([ln2, 4 * ln2])


# Against the reference

EVERYTHING = {
    "bias": True,
    "log_q": True,
    "ids": "repeats",
    "known": "pair",
    "mask": "per-query",
    "weight": True,
    "temperature": 0.3,
}
OPTIONS = [
    {},
    {"log_q": True, "reduction": "mean"},
    {"log_q": True, "correction": "negatives", "reduction": "none"},
    {"log_q": True, "correction": "none", "bias": True},
    {"bias": True, "temperature": 0.2},
    {"bias": True, "temperature": np.array(3.0, np.float32)},
    {"weight": True, "reduction": "mean"},
    {"weight": True, "reduction": "none"},
    {"ids": "unique"},
    {"ids": "repeats"},
    {"ids": "unique", "known": "pair"},
    {"ids": "repeats", "known": "scipy", "log_q": True},
    {"mask": "shared"},
    {"mask": "per-query"},
    EVERYTHING | {"known": "scipy", "correction": "negatives", "reduction": "mean"},
]


def _name(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "embeddings"


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "S", "D"), [(1, 1, 1), (1, 7, 5), (7, 1, 3), (37, 101, 17), (64, 33, 32), (5, 257, 100)]
)
def test_as_accurate_as_plain_numpy(B, S, D, dtype, shared):
    _check(_call(B, S, D, dtype, shared=shared, **EVERYTHING))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_every_option(options, dtype, shared):
    call = _call(13, 31, 6, dtype, shared=shared, **options)
    assert call.oracle["dropped"].any() == bool(options.keys() & {"ids", "mask"})
    loss, grads = _check(call)
    assert (grads.positives.bias is None) == (not options.get("bias"))
    assert grads.negatives.ids is grads.negatives.log_q is None
    np.testing.assert_array_equal(sampled_softmax_loss(*call.args, **call.options), loss)


# Forward and backward


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_of_any_upstream_gradient(reduction, dtype, shared):
    call = _call(29, 31, 6, dtype, shared=shared, **EVERYTHING, reduction=reduction)
    loss, saved = sampled_softmax_forward(*call.args, **call.options)
    upstreams = [1.0, -3, np.float32(0.5), np.array(2.0, np.float16)]
    if reduction == "none":
        upstreams.append(np.random.default_rng(3).normal(size=29).astype(np.float32))
        upstreams.append(np.zeros(29))
    for d_loss in upstreams:
        d = np.asarray(d_loss, np.float64)
        _assert_accurate(call, loss, sampled_softmax_backward(d_loss, saved), d)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_forward_and_backward_equal_value_and_grad(shared):
    call = _call(17, 11, 4, np.float64, shared=shared, **EVERYTHING)
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    forward, saved = sampled_softmax_forward(*call.args, **call.options)
    assert forward == loss == sampled_softmax_loss(*call.args, **call.options)
    _assert_same(sampled_softmax_backward(1.0, saved), grads, rtol=1e-12, atol=1e-15)


# Invariants


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_all_items_once_are_the_full_softmax(shared, dtype, tolerance):
    rng = np.random.default_rng(5)
    B, N, D = 21, 67, 9
    items, u = (rng.normal(size=(n, D)).astype(dtype) / 3 for n in (N, B))
    targets = rng.integers(N, size=B)
    order = rng.permutation(N) if shared else np.array([rng.permutation(N) for _ in range(B)])
    loss, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(targets, items[targets], np.zeros(B)),
        Candidates(order, items[order], np.zeros(order.shape)),
        temperature=0.4,
        reduction="none",
    )
    expected = reference.full_softmax_loss(u, items, targets, temperature=0.4)
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    # dL/dU = (Σ_k softmax_k·V_k − V_target)/τ
    logits = u.astype(np.float64) @ items.T.astype(np.float64) / 0.4
    share = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    share[np.arange(B), targets] -= 1
    np.testing.assert_allclose(grads.queries, share @ items / 0.4, atol=5 * tolerance)
    d_items = np.zeros((N, D))
    np.add.at(d_items, targets, grads.positives.embeddings)
    np.add.at(d_items, order, grads.negatives.embeddings)
    np.testing.assert_allclose(d_items, share.T @ u / 0.4, atol=5 * tolerance)


@pytest.mark.parametrize("how", ["mask", "own", "known"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_a_dropped_negative_equals_a_removed_one(shared, how):
    B, S = 9, 14
    call = _call(B, S, 4, np.float64, shared=shared, bias=True, log_q=True, temperature=0.5)
    u, positives, negatives = call.args
    rng = np.random.default_rng(8)
    # The same number leaves each row, so that what remains is an array.
    columns = np.arange(S) if shared else np.array([rng.permutation(S) for _ in range(B)])
    gone, kept = columns[..., :3], columns[..., 3:]
    ids = np.full(negatives.bias.shape, 100)
    ids[...] = 100 + np.arange(S)
    np.put_along_axis(ids, gone, 7, axis=-1)
    options = {"temperature": 0.5}
    if how == "mask":
        options["mask"] = ids == 7
    else:
        negatives = negatives._replace(ids=ids)
        if how == "own":
            positives = positives._replace(ids=np.full(B, 7))
        else:
            options["known_positives"] = (np.arange(B + 1), np.full(B, 7))

    def take(x):
        at = kept[..., None] if x.ndim > kept.ndim else kept
        return np.take_along_axis(x, at, axis=kept.ndim - 1)

    fewer = Candidates(None, *(take(x) for x in negatives[1:]))
    loss, grads = sampled_softmax_value_and_grad(u, positives, negatives, **options)
    expected, removed = sampled_softmax_value_and_grad(u, positives, fewer, temperature=0.5)
    assert loss == pytest.approx(expected, rel=1e-14)
    assert (grads.negatives.embeddings[ids == 7] == 0).all()
    assert (grads.negatives.bias[ids == 7] == 0).all()
    remaining = Candidates(
        embeddings=take(grads.negatives.embeddings), bias=take(grads.negatives.bias)
    )
    _assert_same(grads._replace(negatives=remaining), removed, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("S", [0, 1, 2, 3, 127, 4096])
@pytest.mark.parametrize("B", [0, 1, 2, 3, 127, 4096])
def test_every_size(B, S):
    for shared in (True, False):
        if not shared and B * S > 127 * 127:
            continue
        call = _call(B, S, 8, shared=shared, bias=True, log_q=True, reduction="mean")
        loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
        assert loss == 0 if B * S == 0 else 0 < loss < np.inf
        for name, x in _by_name(grads).items():
            assert np.isfinite(x).all(), name
            assert np.shape(x) == np.shape(call.oracle[name]), name
        # Each row's g sums to 0.
        assert abs(grads.negatives.bias.sum() + grads.positives.bias.sum()) < 1e-4
        if B * S <= 127 * 4096:
            _assert_accurate(call, loss, grads)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_a_row_without_negatives_has_loss_0_and_gradient_0(shared):
    call = _call(6, 5, 3, shared=shared, bias=True, log_q=True, temperature=0.1)
    mask = np.zeros((6, 5), bool)
    mask[[1, 4]] = True
    options = {"temperature": 0.1, "mask": mask, "reduction": "none"}
    loss, saved = sampled_softmax_forward(*call.args, **options)
    _, grads = sampled_softmax_value_and_grad(*call.args, **options)
    for x in (grads, sampled_softmax_backward(1.0, saved)):
        assert (loss[[1, 4]] == 0).all()
        assert (loss[[0, 2, 3, 5]] > 0).all()
        assert (x.queries[[1, 4]] == 0).all()
        assert (x.positives.embeddings[[1, 4]] == 0).all()
        assert (x.positives.bias[[1, 4]] == 0).all()
    loss, grads = sampled_softmax_value_and_grad(*call.args, mask=np.ones(5, bool))
    assert loss == 0
    for name, x in _by_name(grads).items():
        assert (np.asarray(x) == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_scores_of_ten_thousand_stay_finite(shared, dtype):
    # Positive and negative scores of ±1e4, every pairing of them.
    u = np.full((4, 1), 100, dtype)
    p = np.array([[100], [100], [-100], [-100]], dtype)
    v = np.array([[[100]], [[-100]], [[100]], [[-100]]], dtype)
    if shared:
        u, p, v = np.array([[100], [-100]], dtype), np.array([[100], [100]], dtype), v[:2, 0]
    loss, grads = sampled_softmax_value_and_grad(u, p, v, reduction="none", temperature=0.5)
    a_0 = 2 * (u.astype(float) * p.astype(float)).sum(axis=1)
    a = 2 * np.einsum(
        "bd,bsd->bs", u.astype(float), np.broadcast_to(v.astype(float), (len(u), *v.shape[-2:]))
    )
    expected = np.logaddexp.reduce(np.column_stack([a_0, a]), axis=1) - a_0
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, x in _by_name(grads).items():
        assert x is None or np.isfinite(x.astype(np.float64)).all(), name


FLOATS = [
    "queries", "positives.embeddings", "negatives.embeddings", "positives.bias", "negatives.bias",
]  # fmt: skip


def _with(call, name, change):
    """The call's arguments with one array changed."""
    sides = dict(zip(("queries", "positives", "negatives"), call.args, strict=True))
    side, _, field = name.partition(".")
    if field:
        sides[side] = sides[side]._replace(**{field: change(getattr(sides[side], field))})
    else:
        sides[side] = change(sides[side])
    return tuple(sides.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
@pytest.mark.parametrize("name", FLOATS)
def test_nan_is_never_hidden(name, shared, value):
    def broken(x):
        x = x.copy()
        x.reshape(-1)[0] = value
        return x

    call = _call(4, 3, 2, shared=shared, bias=True)
    args = _with(call, name, broken)
    with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got {value} at \(0"):
        sampled_softmax_loss(*args, validate=True)
    if name.endswith("bias"):  # checked in any case
        with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got {value}"):
            sampled_softmax_loss(*args)
    elif np.isnan(value):
        loss, grads = sampled_softmax_value_and_grad(*args, reduction="none")
        assert np.isnan(loss[0])
        assert np.isnan(grads.queries[0]).all()
        assert np.isnan(sampled_softmax_loss(*args))
        _, saved = sampled_softmax_forward(*args)
        assert np.isnan(sampled_softmax_backward(1.0, saved).queries[0]).all()


def test_nan_in_a_weight_is_never_hidden():
    call = _call(4, 3, 2)
    options = {"sample_weight": np.array([1, np.nan, 1, 1])}
    assert np.isnan(sampled_softmax_loss(*call.args, **options))
    with pytest.raises(ValueError, match=r"^sample_weight: expected finite values, got nan at \(1"):
        sampled_softmax_loss(*call.args, **options, validate=True)


def test_a_constant_in_every_log_q_cancels_under_both_only():
    def at(constant, correction):
        call = _call(11, 13, 4, np.float64, bias=True, log_q=True, temperature=0.3)
        u, *sides = call.args
        sides = [side._replace(log_q=side.log_q + constant) for side in sides]
        return sampled_softmax_value_and_grad(u, *sides, temperature=0.3, correction=correction)

    (loss, grads), (shifted_loss, shifted) = at(0.0, "both"), at(5.0, "both")
    assert shifted_loss == pytest.approx(loss, rel=1e-12)
    _assert_same(shifted, grads, rtol=1e-10, atol=1e-13)
    assert at(5.0, "negatives")[0] < 0.9 * at(0.0, "negatives")[0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_order_of_the_negatives_does_not_matter(shared):
    call = _call(12, 17, 5, np.float64, shared=shared, bias=True, log_q=True, ids="repeats")
    u, positives, negatives = call.args
    order = np.random.default_rng(2).permutation(17)
    axis = 0 if shared else 1
    moved = Candidates(*(np.take(x, order, axis) for x in negatives))
    loss, grads = sampled_softmax_value_and_grad(u, positives, negatives)
    moved_loss, moved_grads = sampled_softmax_value_and_grad(u, positives, moved)
    assert moved_loss == pytest.approx(loss, rel=1e-14)
    expected = Candidates(
        embeddings=np.take(grads.negatives.embeddings, order, axis),
        bias=np.take(grads.negatives.bias, order, axis),
    )
    _assert_same(moved_grads, grads._replace(negatives=expected), rtol=1e-12, atol=1e-15)


def test_repeats_equal_one_copy_with_log_q_less_log_count():
    rng = np.random.default_rng(4)
    call = _call(12, 5, 4, np.float64, bias=True, log_q=True, ids="unique", temperature=0.7)
    u, positives, once = call.args
    counts = np.array([1, 3, 2, 1, 7])
    slots = rng.permutation(np.repeat(np.arange(5), counts))
    repeated = Candidates(*(x[slots] for x in once))
    merged = once._replace(log_q=once.log_q - np.log(counts))
    loss, grads = sampled_softmax_value_and_grad(u, positives, repeated, temperature=0.7)
    merged_loss, merged_grads = sampled_softmax_value_and_grad(
        u, positives, merged, temperature=0.7
    )
    assert merged_loss == pytest.approx(loss, rel=1e-13)
    summed = Candidates(embeddings=np.zeros((5, 4)), bias=np.zeros(5))
    np.add.at(summed.embeddings, slots, grads.negatives.embeddings)
    np.add.at(summed.bias, slots, grads.negatives.bias)
    _assert_same(merged_grads, grads._replace(negatives=summed), rtol=1e-11, atol=1e-14)


def test_per_query_negatives_that_are_equal_are_shared_ones():
    call = _call(7, 9, 4, np.float64, **EVERYTHING)
    u, positives, negatives = call.args
    each = Candidates(*(np.broadcast_to(x, (7, *x.shape)) for x in negatives))
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    each_loss, each_grads = sampled_softmax_value_and_grad(u, positives, each, **call.options)
    assert each_loss == pytest.approx(loss, rel=1e-13)
    summed = Candidates(
        embeddings=each_grads.negatives.embeddings.sum(axis=0),
        bias=each_grads.negatives.bias.sum(axis=0),
    )
    _assert_same(each_grads._replace(negatives=summed), grads, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
def test_memory_layout_and_dtypes_of_the_sides_do_not_matter(shared):
    call = _call(7, 9, 4, np.float64, shared=shared, **EVERYTHING)

    def strided(x):
        # Every other element, backwards, of an array twice as long in each dimension.
        wide = np.zeros([2 * n for n in x.shape], x.dtype, order="F")
        view = wide[tuple(slice(None, None, -2) for _ in x.shape)]
        view[...] = x
        return view

    u, positives, negatives = call.args
    options = call.options | {name: strided(call.options[name]) for name in ("mask",)}
    sides = [Candidates(*map(strided, side)) for side in (positives, negatives)]
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    other_loss, other = sampled_softmax_value_and_grad(strided(u), *sides, **options)
    assert other_loss == pytest.approx(loss, rel=1e-14)
    _assert_same(other, grads, rtol=1e-12, atol=1e-15)


def test_each_gradient_has_its_own_inputs_dtype():
    u, p, v = np.ones((2, 3), np.float16), np.ones((2, 3)), np.ones((4, 3), np.float32)
    loss, grads = sampled_softmax_value_and_grad(
        u,
        Candidates(embeddings=p, bias=np.ones(2, np.float32)),
        Candidates(embeddings=v, bias=np.ones(4, ml_dtypes.bfloat16)),
    )
    assert loss.dtype == grads.temperature.dtype == np.float64
    assert grads.queries.dtype == np.float16
    assert (grads.positives.embeddings.dtype, grads.positives.bias.dtype) == (
        np.float64,
        np.float32,
    )
    assert grads.negatives.embeddings.dtype == np.float32
    assert grads.negatives.bias.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("way", ["value and grad", "forward and backward"])
def test_memory_is_a_part_of_the_logits(way, with_ids):
    def run(size):
        rng = np.random.default_rng(0)
        u, p, v = (rng.normal(size=(size, 64)).astype(np.float32) / 8 for _ in range(3))
        ids = np.arange(size) if with_ids else None
        positives, negatives = Candidates(ids, p), Candidates(ids, v)
        tracemalloc.start()
        try:
            if way == "value and grad":
                sampled_softmax_value_and_grad(u, positives, negatives)
            else:
                _, saved = sampled_softmax_forward(u, positives, negatives)
                sampled_softmax_backward(1.0, saved)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    run(16)  # compiles
    size = 8192
    assert run(size) < 64 * 2**20 < 0.26 * size * size * 4


# Consistency: the model that training finds is the true law


def _fitted_divergence(sampler, prob, *, log_q=None, correction="both", hits="removed"):
    """KL(P, model) of free logits, one an item, trained on expected positives and drawn negatives.

    Every item is a row, weighed by its probability; descent with averaged iterates.
    """
    num_items, num_steps = len(prob), 4000
    if log_q is None:
        log_q = sampler.log_q(np.arange(num_items))
    queries, ids = np.ones((num_items, 1)), np.arange(num_items)
    logits, mean = np.zeros(num_items), np.zeros(num_items)
    for step in range(num_steps):
        drawn = sampler.sample(step=step).negatives.ids
        _, grads = sampled_softmax_value_and_grad(
            queries,
            Candidates(ids if hits == "removed" else None, logits[:, None], log_q),
            Candidates(drawn if hits == "removed" else None, logits[drawn, None], log_q[drawn]),
            sample_weight=prob,
            correction=correction,
            reduction="sum",
        )
        d_logits = grads.positives.embeddings[:, 0]
        np.add.at(d_logits, drawn, grads.negatives.embeddings[:, 0])
        logits -= 0.005 * d_logits / prob
        if step >= num_steps // 4:
            mean += logits / (num_steps - num_steps // 4)
    return (prob * (np.log(prob) - mean + np.logaddexp.reduce(mean))).sum()


TRUE = np.arange(1, 201) ** -0.5 / (np.arange(1, 201) ** -0.5).sum()
LAWS = {"log-uniform": LogUniform(200), "empirical": Empirical(TRUE)}
SHIFTED = np.append(LogUniform(200).log_prob(np.arange(1, 200)), LogUniform(200).log_prob(199))


@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("log-uniform", {}),
        ("empirical", {}),
        ("log-uniform", {"unique": False, "hits": "kept"}),
    ],
)
def test_training_with_log_q_finds_the_true_law(law, options):
    options = dict(options)
    sampler = PopularitySampler(LAWS[law], 20, unique=options.pop("unique", True))
    assert _fitted_divergence(sampler, TRUE, **options) < 0.005


@pytest.mark.parametrize(
    ("options", "at_least"),
    [
        ({"correction": "none"}, 0.2),
        # S in the place of the number of tries: log(S·p) for a sample of distinct ids.
        ({"log_q": LogUniform(200).log_prob(np.arange(200))}, 0.02),
        # The table off by one.
        ({"log_q": SHIFTED}, 0.01),
    ],
    ids=["no correction", "tries taken for S", "shifted by one"],
)
def test_training_with_a_wrong_log_q_does_not(options, at_least):
    sampler = PopularitySampler(LAWS["log-uniform"], 20)
    assert _fitted_divergence(sampler, TRUE, **options) > at_least


# Errors

B, S, D = 3, 4, 2
BOTH = {"positives.log_q": np.zeros(B), "negatives.log_q": np.zeros(S)}
IDS = {"positives.ids": np.arange(B), "negatives.ids": np.arange(S)}
EMPTY = (np.zeros(B + 1, int), np.zeros(0, int))


def _changed(changes):
    args = {
        "queries": np.ones((B, D)),
        "positives": Candidates(embeddings=np.ones((B, D))),
        "negatives": Candidates(embeddings=np.ones((S, D))),
    }
    for name, value in changes.items():
        side, _, field = name.partition(".")
        args[side] = args[side]._replace(**{field: value}) if field else value
    return args


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        # Shapes
        ({"queries": np.ones(B)}, ValueError, r"^queries: expected shape \(B, D\), got \(3,\)"),
        (
            {"queries": np.ones((B, 3))},
            ValueError,
            r"^positives\.embeddings: expected shape \(B, D\)",
        ),
        (
            {"queries": np.ones((9, D))},
            ValueError,
            r"^positives\.embeddings: .* = \(9, 2\), got \(3",
        ),
        ({"positives": np.ones((B, 1, D))}, ValueError, r"^positives\.embeddings: expected shape"),
        ({"negatives": np.ones(D)}, ValueError, r"^negatives\.embeddings: .* \(S, D\), shared"),
        (
            {"negatives": np.ones((S, 5))},
            ValueError,
            r"^negatives\.embeddings: .*\(S, D\) as queries",
        ),
        (
            {"negatives": np.ones((9, S, D))},
            ValueError,
            r"^negatives\.embeddings: expected shape \(B, S, D\) as queries = \(3, 4, 2\)",
        ),
        ({"positives.ids": np.arange(S)}, ValueError, r"^positives\.ids: expected shape \(B,\)"),
        ({"negatives.ids": np.arange(B)}, ValueError, r"^negatives\.ids: expected shape \(S,\)"),
        (
            {"positives.bias": np.ones((B, 1))},
            ValueError,
            r"^positives\.bias: expected shape \(B,\)",
        ),
        ({"negatives.bias": np.ones(B)}, ValueError, r"^negatives\.bias: expected shape \(S,\)"),
        (BOTH | {"negatives.log_q": np.ones(1)}, ValueError, r"^negatives\.log_q: expected shape"),
        (
            {"negatives": Candidates(bias=np.ones(S), embeddings=np.ones((B, S, D)))},
            ValueError,
            r"^negatives\.bias: expected shape \(B, S\)",
        ),
        ({"mask": np.ones((S, B), bool)}, ValueError, r"^mask: expected shape \(B, S\), or \(S,\)"),
        ({"sample_weight": np.ones(S)}, ValueError, r"^sample_weight: expected shape \(B,\)"),
        # Dtypes
        ({"queries": np.ones((B, D), int)}, TypeError, "^queries: expected float16, .* got int64"),
        (
            {"positives": np.ones((B, D), int)},
            TypeError,
            r"^positives\.embeddings: expected float16",
        ),
        (
            {"negatives": np.ones((S, D), complex)},
            TypeError,
            r"^negatives\.embeddings: .*complex128",
        ),
        ({"positives.ids": np.ones(B)}, TypeError, r"^positives\.ids: expected an integer dtype"),
        (
            {"negatives.ids": np.ones(S)},
            TypeError,
            r"^negatives\.ids: expected an integer .*float64",
        ),
        ({"negatives.bias": np.ones(S, int)}, TypeError, r"^negatives\.bias: expected float16"),
        (
            BOTH | {"positives.log_q": np.zeros(B, int)},
            TypeError,
            r"^positives\.log_q: expected float16",
        ),
        ({"mask": np.ones(S)}, TypeError, "^mask: expected bool, True to drop .* got float64"),
        ({"mask": np.ones(S, int)}, TypeError, "^mask: expected bool"),
        ({"sample_weight": np.ones(B, complex)}, TypeError, "^sample_weight: expected float16"),
        # What is no array
        ({"queries": None}, ValueError, "^queries: expected an array, got None"),
        ({"positives": Candidates()}, ValueError, r"^positives\.embeddings: .* got None"),
        ({"negatives": None}, ValueError, r"^negatives\.embeddings: expected an array, got None"),
        ({"queries": [[1.0, 2.0]] * B}, TypeError, "^queries: expected an array .* got list"),
        ({"positives": [[1.0, 2.0]] * B}, TypeError, r"^positives\.embeddings: .* got list"),
        ({"positives": (np.ones((B, D)),)}, TypeError, "^positives: expected Candidates .* tuple"),
        ({"negatives": (None, np.ones((S, D)))}, TypeError, "^negatives: expected Candidates"),
        ({"negatives": np.ma.ones((S, D))}, TypeError, r"^negatives\.embeddings: a masked array"),
        ({"sample_weight": [1.0] * B}, TypeError, "^sample_weight: expected an array"),
        # Temperature
        ({"temperature": 0}, ValueError, "^temperature: expected a finite number above 0, got 0"),
        ({"temperature": -1.0}, ValueError, "^temperature: .* got -1"),
        ({"temperature": np.nan}, ValueError, "^temperature: .* got nan"),
        ({"temperature": np.array(np.inf)}, ValueError, "^temperature: .* got inf"),
        ({"temperature": np.ones(1)}, TypeError, r"^temperature: expected a number, .*\(1,\)"),
        ({"temperature": np.ones(B)}, TypeError, "^temperature: expected a number"),
        ({"temperature": "1"}, TypeError, "^temperature: expected an array .* got str"),
        ({"temperature": None}, TypeError, "^temperature: .* got NoneType"),
        # Log q
        (
            {"positives.log_q": np.zeros(B)},
            ValueError,
            r"^negatives\.log_q: .* since positives\.log_q is given, got None",
        ),
        (
            {"negatives.log_q": np.zeros(S)},
            ValueError,
            r'^positives\.log_q: .* got None; pass it, or correction="negatives"',
        ),
        (
            {"positives.log_q": np.zeros(B), "correction": "negatives"},
            ValueError,
            r"^negatives\.log_q: expected log q",
        ),
        (
            BOTH | {"negatives.log_q": np.array([0, 0, -np.inf, 0])},
            ValueError,
            r"^negatives\.log_q: expected finite values, got -inf at \(2,\): an id outside the law",
        ),
        (
            BOTH | {"positives.log_q": np.array([0, np.nan, 0])},
            ValueError,
            r"^positives\.log_q: expected finite values, got nan at \(1,\)",
        ),
        # Names
        ({"correction": "logq"}, ValueError, "^correction: expected one of 'both', 'negatives', "),
        ({"loss": "hingeloss"}, ValueError, "^loss: expected one of 'softmax'"),
        ({"reduction": "avg"}, ValueError, "^reduction: expected one of 'mean', 'sum', 'none'"),
        # Known positives
        ({"known_positives": EMPTY}, ValueError, r"^known_positives: needs negatives\.ids"),
        (IDS | {"known_positives": EMPTY[1]}, TypeError, "^known_positives: expected the pair"),
        (
            IDS | {"known_positives": (np.zeros(B, int), EMPTY[1])},
            ValueError,
            r"^known_positives\.indptr: expected shape \(B \+ 1,\) = \(4,\)",
        ),
        (
            IDS | {"known_positives": (np.array([0, 2, 1, 1]), np.zeros(1, int))},
            ValueError,
            "^known_positives: expected indptr to rise",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, text):
    arguments = _changed(changes)
    for function in (
        sampled_softmax_loss,
        sampled_softmax_value_and_grad,
        sampled_softmax_forward,
    ):
        with pytest.raises(error, match=text):
            function(**arguments)


def test_one_sided_log_q_is_allowed_where_it_is_not_used():
    plain = sampled_softmax_loss(**_changed({}))
    for changes in (
        {"positives.log_q": np.zeros(B), "correction": "none"},
        {"negatives.log_q": np.full(S, -np.inf), "correction": "none"},
        {"negatives.log_q": np.zeros(S), "correction": "negatives"},
    ):
        assert sampled_softmax_loss(**_changed(changes)) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("reduction", "d_loss", "error", "text"),
    [
        ("mean", np.ones(B), ValueError, '^d_loss: expected a scalar after reduction="mean"'),
        ("sum", np.ones(1), ValueError, '^d_loss: expected a scalar after reduction="sum"'),
        ("none", np.ones(S), ValueError, r"^d_loss: expected shape \(B,\) = \(3,\), got \(4,\)"),
        ("none", np.ones((B, 1)), ValueError, r"^d_loss: expected shape \(B,\)"),
        ("none", [1.0] * B, TypeError, "^d_loss: expected an array"),
    ],
)
def test_upstream_gradients_of_the_wrong_shape(reduction, d_loss, error, text):
    _, saved = sampled_softmax_forward(**_changed({}), reduction=reduction)
    with pytest.raises(error, match=text):
        sampled_softmax_backward(d_loss, saved)


@pytest.mark.parametrize("scale", [1, 10, 30, 100])
def test_forward_and_backward_are_as_accurate_as_one_pass(scale):
    rng = np.random.default_rng(scale)
    u, p, v = (scale * rng.normal(size=(n, 32)) for n in (64, 64, 256))
    u, p, v = (x.astype(np.float32) for x in (u, p, v))
    _, expected = reference.sampled_softmax(u, p, v, d_loss=1 / 64)
    _, whole = sampled_softmax_value_and_grad(u, p, v)
    _, saved = sampled_softmax_forward(u, p, v)
    pair = sampled_softmax_backward(1.0, saved)
    for of in (lambda g: g.queries, lambda g: getattr(g.negatives, "embeddings", g.negatives)):
        error = np.abs(of(whole) - of(expected)).max()
        assert np.abs(of(pair) - of(expected)).max() <= 1.01 * error


# Each query's own negatives, as rows of a table


@pytest.mark.parametrize("loss", ["softmax", "bpr", "bce"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("size", "num_sampled", "dim", "num_items"),
    [(1, 1, 1, 1), (7, 13, 5, 9), (3, 70, 33, 200), (5, 0, 4, 3)],
)
def test_rows_of_a_table_equal_what_they_hold(size, num_sampled, dim, num_items, dtype, loss):
    rng = np.random.default_rng([size, dim])
    u, p = rng.normal(size=(2, size, dim)).astype(dtype)
    table = rng.normal(size=(num_items, dim)).astype(dtype)
    ids = rng.integers(0, num_items, (size, num_sampled))
    log_q, bias = rng.normal(size=(2, size, num_sampled)).astype(dtype)
    positives = Candidates(rng.integers(0, num_items, size), p, log_q=rng.normal(size=size))
    options = {"temperature": 0.9, "loss": loss, "sample_weight": rng.uniform(0, 2, size)}
    value, grads = sampled_softmax_value_and_grad(
        u, positives, Candidates(ids, table, log_q, bias), **options
    )
    expected, whole = sampled_softmax_value_and_grad(
        u, positives, Candidates(ids, table[ids], log_q, bias), **options
    )
    d_table = np.zeros((num_items, dim))
    np.add.at(d_table, ids, whole.negatives.embeddings.astype(np.float64))
    close = {np.float16: 2e-2, np.float32: 1e-5, np.float64: 1e-12}[dtype]
    assert value == pytest.approx(expected, rel=close)
    assert grads.queries == pytest.approx(whole.queries, rel=close, abs=close)
    assert grads.negatives.bias == pytest.approx(whole.negatives.bias, rel=close, abs=close)
    assert grads.negatives.embeddings.shape == table.shape
    assert grads.negatives.embeddings.dtype == dtype
    assert grads.negatives.embeddings == pytest.approx(d_table, rel=close, abs=close)
    assert grads.temperature == pytest.approx(whole.temperature, rel=close, abs=close)


def test_rows_of_a_table_do_not_depend_on_threads(monkeypatch):
    rng = np.random.default_rng(1)
    u, p = rng.normal(size=(2, 40, 9)).astype(np.float32)
    table, ids = rng.normal(size=(50, 9)).astype(np.float32), rng.integers(0, 50, (40, 21))
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("ZIPFNEG_NUM_THREADS", threads)
        _, grads = sampled_softmax_value_and_grad(u, p, Candidates(ids, table))
        found.append(grads.negatives.embeddings.tobytes() + grads.queries.tobytes())
    assert found[0] == found[1] == found[2]


def test_rows_outside_the_table():
    u = np.ones((2, 3))
    for ids in ([[0, 1], [2, 4]], [[0, 1], [-1, 2]]):
        with pytest.raises(
            ValueError, match=r"negatives.ids: expected rows of the table .* 0 to 3"
        ):
            sampled_softmax_value_and_grad(u, u, Candidates(np.array(ids), np.ones((4, 3))))
    with pytest.raises(ValueError, match=r"negatives.ids: expected shape \(B, S\)"):
        sampled_softmax_value_and_grad(u, u, Candidates(np.zeros((3, 2), int), np.ones((4, 3))))


# Diagnostics


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize(("size", "num_sampled"), [(1, 1), (5, 0), (7, 13), (130, 500)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_diagnostics_by_their_equations(size, num_sampled, per_query, dtype):
    rng = np.random.default_rng([size, num_sampled])
    u, p = rng.normal(size=(2, size, 6)).astype(dtype)
    columns = (size, num_sampled) if per_query else (num_sampled,)
    v = rng.normal(size=(*columns, 6)).astype(dtype)
    log_q, bias = rng.normal(size=(2, *columns)).astype(dtype)
    log_q_0, mask = rng.normal(size=size).astype(dtype), rng.random((size, num_sampled)) < 0.3
    options = {"mask": mask, "temperature": 0.5}
    arguments = (u, Candidates(None, p, log_q_0), Candidates(None, v, log_q, bias))
    loss, grads, found = sampled_softmax_diagnostics(*arguments, **options)
    a = np.einsum("bd,...sd->bs" if not per_query else "bd,bsd->bs", u, v).astype(np.float64)
    a = np.where(mask, -np.inf, (a + bias) / 0.5)
    a_0 = np.einsum("bd,bd->b", u, p).astype(np.float64) / 0.5
    w, w_0 = np.exp(a - log_q), np.exp(a_0 - log_q_0)
    close = {"rel": 1e-4 if dtype == np.float32 else 1e-11}
    with np.errstate(divide="ignore", invalid="ignore"):
        assert found.log_normalizer == pytest.approx(np.log(w.sum(axis=1)), **close, abs=1e-5)
        size_of = np.nan_to_num(w.sum(axis=1) ** 2 / (w**2).sum(axis=1))
    assert found.positive_prob == pytest.approx(w_0 / (w_0 + w.sum(axis=1)), **close)
    assert found.effective_size == pytest.approx(size_of, **close)
    assert found.num_better.tolist() == (a > a_0[:, None]).sum(axis=1).tolist()
    assert found.num_dropped.tolist() == mask.sum(axis=1).tolist()
    assert (found.num_tied == 0).all()
    same_loss, same = sampled_softmax_value_and_grad(*arguments, **options)
    assert loss == same_loss
    assert (grads.queries == same.queries).all()
    assert found.effective_size.dtype == dtype


def test_diagnostics_are_the_softmaxs():
    u = np.ones((2, 3))
    with pytest.raises(ValueError, match='loss: expected "softmax" for diagnostics'):
        sampled_softmax_diagnostics(u, u, u, loss="bpr")
