import numpy as np
import pytest

from zipfneg import (
    Candidates,
    reference,
    sampled_softmax_value_and_grad,
    symmetric_softmax_value_and_grad,
)


def pairs(size, dim=5, seed=0, dtype=np.float64, **which):
    rng = np.random.default_rng([seed, size])
    sides = []
    for _ in range(2):
        embeddings, log_q, bias = (
            rng.normal(size=shape) for shape in ((size, dim), (size,), (size,))
        )
        ids = rng.integers(0, max(1, size // 2), size)
        sides.append(
            Candidates(
                ids if which.get("ids", True) else None,
                embeddings.astype(dtype),
                log_q.astype(dtype) if which.get("log_q", True) else None,
                bias.astype(dtype) if which.get("bias", True) else None,
            )
        )
    return sides


def by_the_reference(queries, items, *, temperature=1.0, correction="both", weight=None):
    """Both directions over (B, B), and their gradients."""
    size = len(queries.embeddings)
    dropped = np.eye(size, dtype=bool)
    for side in (queries, items):
        if side.ids is not None:
            dropped |= side.ids[:, None] == side.ids
    parts = []
    for anchors, found in ((queries, items), (items, queries)):
        log_q = np.zeros(size) if found.log_q is None else found.log_q
        bias = np.zeros(size) if found.bias is None else found.bias
        parts.append(
            reference.sampled_softmax(
                anchors.embeddings,
                found.embeddings,
                found.embeddings,
                positive_bias=bias,
                negative_bias=bias,
                positive_log_q=log_q if correction == "both" else 0.0,
                negative_log_q=log_q if correction != "none" else 0.0,
                dropped=dropped,
                temperature=temperature,
                d_loss=1.0 if weight is None else weight,
            )
        )
    return parts


def test_two_pairs_by_hand():
    # a = [[1, 0], [0, 2]]: softplus(−1) and softplus(−2), the same either way.
    u, v = np.array([[1.0, 0], [0, 2.0]]), np.eye(2)
    loss, grads = symmetric_softmax_value_and_grad(u, v, reduction="none")
    assert loss == pytest.approx(np.log1p(np.exp([-1, -2])))
    s = 1 / (1 + np.exp([1, 2]))
    # Each of the two directions gives half of: −s on the diagonal, s beside it.
    d_a = (np.array([[-s[0], s[0]], [s[1], -s[1]]]) + np.array([[-s[0], s[1]], [s[0], -s[1]]])) / 2
    assert grads.queries.embeddings == pytest.approx(d_a @ v)
    assert grads.items.embeddings == pytest.approx(d_a.T @ u)
    assert grads.temperature == pytest.approx(-(d_a * (u @ v.T)).sum())
    assert grads.items.bias is None


@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
@pytest.mark.parametrize("size", [1, 2, 7, 33])
@pytest.mark.parametrize("which", [{}, {"ids": False}, {"bias": False}, {"log_q": False}])
def test_against_the_reference(size, correction, which):
    queries, items = pairs(size, **which)
    loss, grads = symmetric_softmax_value_and_grad(
        queries, items, temperature=0.7, correction=correction, reduction="sum"
    )
    (loss_1, g_1), (loss_2, g_2) = by_the_reference(
        queries, items, temperature=0.7, correction=correction
    )
    assert loss == pytest.approx((loss_1.sum() + loss_2.sum()) / 2, rel=1e-12, abs=1e-12)
    for got, anchor, own in ((grads.queries, g_1, g_2), (grads.items, g_2, g_1)):
        total = (anchor.queries + own.positives + own.negatives) / 2
        assert got.embeddings == pytest.approx(total, rel=1e-11, abs=1e-12)
        if queries.bias is not None:
            bias = (own.positive_bias + own.negative_bias) / 2
            assert got.bias == pytest.approx(bias, rel=1e-11, abs=1e-12)
    both = (g_1.temperature + g_2.temperature) / 2
    assert grads.temperature == pytest.approx(both, rel=1e-11, abs=1e-12)


def test_one_side_with_log_q_alone():
    queries, items = pairs(9)
    plain = queries._replace(log_q=None)
    loss, _ = symmetric_softmax_value_and_grad(plain, items, reduction="none")
    (loss_1, _), (loss_2, _) = by_the_reference(plain, items)
    assert loss == pytest.approx((loss_1 + loss_2) / 2, rel=1e-12)


def test_exchanging_the_sides_exchanges_the_gradients():
    queries, items = pairs(12)
    loss, grads = symmetric_softmax_value_and_grad(queries, items)
    other_loss, other = symmetric_softmax_value_and_grad(items, queries)
    assert loss == pytest.approx(other_loss, rel=1e-14)
    assert grads.queries.embeddings == pytest.approx(other.items.embeddings, rel=1e-13)


def test_weights_scale_the_rows():
    queries, items = pairs(6)
    weight = np.array([1.0, 0, 2, 0.5, 0, 3])
    loss, grads = symmetric_softmax_value_and_grad(queries, items, sample_weight=weight)
    rows, _ = symmetric_softmax_value_and_grad(queries, items, reduction="none")
    assert loss == pytest.approx((weight * rows).sum() / 6, rel=1e-13)
    (_, g_1), (_, g_2) = by_the_reference(queries, items, weight=weight / 12)
    total = g_1.queries + g_2.positives + g_2.negatives
    assert grads.queries.embeddings == pytest.approx(total, rel=1e-11)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dtypes_come_back(dtype):
    queries, items = pairs(20, dtype=dtype)
    loss, grads = symmetric_softmax_value_and_grad(queries, items)
    assert loss.dtype == np.float32
    assert grads.queries.embeddings.dtype == grads.items.bias.dtype == dtype
    exact, _ = symmetric_softmax_value_and_grad(
        *(Candidates(x.ids, *(part.astype(np.float64) for part in x[1:])) for x in (queries, items))
    )
    assert loss == pytest.approx(exact, rel=1e-6)


def test_one_direction_is_the_in_batch_loss():
    queries, items = pairs(10, bias=False, log_q=False)
    queries = queries._replace(ids=None)
    loss, _ = sampled_softmax_value_and_grad(queries.embeddings, items, items, reduction="none")
    (loss_1, _), _ = by_the_reference(queries, items)
    assert loss == pytest.approx(loss_1, rel=1e-12)


@pytest.mark.parametrize(
    ("queries", "items", "text"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), r"items: expected shape \(B, D\) as queries"),
        (np.ones(3), np.ones((3, 2)), r"queries: expected embeddings \(B, D\)"),
        (np.ones((3, 2)), Candidates(np.arange(3)), r"items: expected embeddings \(B, D\)"),
        (
            Candidates(np.arange(2), np.ones((3, 2))),
            np.ones((3, 2)),
            r"queries.ids: expected shape \(B,\)",
        ),
    ],
)
def test_bad_pairs(queries, items, text):
    with pytest.raises(ValueError, match=text):
        symmetric_softmax_value_and_grad(queries, items)
