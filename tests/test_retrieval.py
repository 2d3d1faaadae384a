"""The full catalog against brute force. Small integers make every score exact, and ties many."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

from zipfneg import (
    Candidates,
    full_softmax_loss,
    full_softmax_value_and_grad,
    rank,
    reference,
    scores,
    top_k,
)

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.fixture(params=["1", "3"])
def threads(request, monkeypatch):
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", request.param)


def _integers(B, N, D, dtype=np.float32, bias=False):
    """Queries, items and their exact scores."""
    rng = np.random.default_rng([B, N, D])
    u, v = rng.integers(-2, 3, (B, D)), rng.integers(-2, 3, (N, D))
    b = rng.integers(-3, 4, N) if bias else np.zeros(N, int)
    items = (
        Candidates(embeddings=v.astype(dtype), bias=b.astype(dtype)) if bias else v.astype(dtype)
    )
    return u.astype(dtype), items, u @ v.T + b


def _ragged(rng, B, N):
    rows = [rng.permutation(N)[: rng.integers(0, N // 2 + 1)] for _ in range(B)]
    return np.cumsum([0, *map(len, rows)]), np.concatenate([*rows, np.zeros(0, int)]).astype(int)


def _left_out(exclude, B, N, first_id=0):
    out = np.zeros((B, N), bool)
    out[:, :first_id] = True
    indptr, ids = exclude
    for row in range(B):
        out[row, ids[indptr[row] : indptr[row + 1]]] = True
    return out


def test_by_hand():
    u, v = np.array([[1.0, 0.0]]), np.array([[3.0, 9.0], [5.0, 0.0], [3.0, 1.0], [4.0, 0.0]])
    items = Candidates(embeddings=v, bias=np.array([0.0, -2.0, 0.0, 0.5]))
    assert scores(u, items, temperature=0.5).tolist() == [[6, 6, 6, 9]]
    assert scores(u, v).tolist() == [[3, 5, 3, 4]]
    best = top_k(u, v, 2, temperature=0.5)
    assert (best.ids.tolist(), best.scores.tolist()) == ([[1, 3]], [[10, 8]])
    assert rank(u, v, np.array([2])) == ([2], [1])
    assert rank(u, v, np.array([2]), first_id=1) == ([2], [0])
    assert rank(u, items, np.array([1])) == ([1], [2])
    expected = np.log(np.exp(-1) + np.exp(1) + np.exp(-1) + 1)
    assert full_softmax_loss(u, v, np.array([3])) == pytest.approx([expected])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("B", "N", "D"), [(0, 4, 3), (1, 1, 1), (7, 37, 5), (33, 101, 64)])
def test_scores_are_exact_on_integers(B, N, D, bias, dtype):
    u, items, exact = _integers(B, N, D, dtype, bias)
    got = scores(u, items, temperature=0.5)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_array_equal(got, 2 * exact)


@pytest.mark.parametrize(("B", "N", "k"), [(9, 42, 1), (9, 42, 17), (9, 42, 40), (131, 485, 30)])
@pytest.mark.parametrize("first_id", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_top_k_equals_a_full_sort(threads, bias, first_id, B, N, k):
    u, items, exact = _integers(B, N, 3, bias=bias)
    exclude = _ragged(np.random.default_rng(k), B, N)
    for excluded in (None, exclude):
        z = exact.astype(float)
        z[:, :first_id] = -np.inf
        if excluded is not None:
            z[_left_out(excluded, B, N, first_id)] = -np.inf
        order = np.argsort(-z, axis=1, kind="stable")[:, :k]
        expected = np.take_along_axis(z, order, axis=1)
        got = top_k(u, items, k, first_id=first_id, exclude=excluded)
        np.testing.assert_array_equal(got.scores, expected)
        # Ids in ascending order within a tie; which of them come last is open.
        certain = expected > expected[:, -1:]
        np.testing.assert_array_equal(got.ids[certain], order[certain])
        found = expected > -np.inf
        chosen = np.take_along_axis(z, got.ids, axis=1)
        np.testing.assert_array_equal(chosen[found], expected[found])
        for row, here in zip(got.ids, found, strict=True):
            assert len(set(row[here])) == here.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_of_every_dtype(dtype):
    u, items, exact = _integers(5, 30, 4, dtype)
    got = top_k(u, items, 30, temperature=0.25)
    order = np.argsort(-exact, axis=1, kind="stable")
    np.testing.assert_array_equal(got.scores, 4 * np.take_along_axis(exact, order, axis=1))
    certain = got.scores > got.scores[:, -1:]
    np.testing.assert_array_equal(got.ids[certain], order[certain])


def test_top_k_never_returns_a_reserved_id():
    # One item is left, in a list of three.
    got = top_k(
        np.ones((1, 1)),
        np.ones((4, 1)),
        3,
        first_id=1,
        exclude=(np.array([0, 2]), np.array([1, 3])),
    )
    assert got.scores.tolist() == [[1, -np.inf, -np.inf]]
    assert got.ids.tolist() == [[2, -1, -1]]


@pytest.mark.parametrize("first_id", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_rank_equals_brute_force(threads, bias, first_id):
    B, N = 11, 40
    u, items, exact = _integers(B, N, 2, bias=bias)
    rng = np.random.default_rng(first_id)
    targets = rng.integers(first_id, N, B)
    own = np.arange(N) == targets[:, None]
    pair = _ragged(rng, B, N)
    matrix = scipy.sparse.csr_array((np.ones(pair[1].size), pair[1], pair[0]), (B, N))
    for exclude in (None, pair, matrix):
        out = _left_out(pair if exclude is not None else (np.zeros(B + 1, int), []), B, N, first_id)
        counted = ~out & ~own
        score = exact[np.arange(B), targets][:, None]
        got = rank(u, items, targets, first_id=first_id, exclude=exclude)
        np.testing.assert_array_equal(got.num_better, (counted & (exact > score)).sum(axis=1))
        np.testing.assert_array_equal(got.num_tied, (counted & (exact == score)).sum(axis=1))


def _assert_copies_tie(B, N, D, dtype):
    rng = np.random.default_rng([B, N, D])
    which = rng.permutation(N) % (N // 4)
    items = rng.normal(size=(N // 4, D)).astype(dtype)[which]
    targets = rng.integers(N, size=B)
    got = rank(rng.normal(size=(B, D)).astype(dtype), items, targets)
    copies = np.bincount(which)[which[targets]] - 1
    assert (got.num_tied >= copies).all()
    # Among thousands of float32 scores a few others lie within rounding of a target's.
    assert (got.num_tied == copies).mean() > 0.98


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("D", [3, 13, 64])
def test_copies_of_a_row_tie_wherever_they_stand(threads, D, dtype):
    _assert_copies_tie(8, 45, D, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "N"), [(1, 5000), (513, 2049), (7, 100), (3, 4099)])
def test_copies_of_a_row_tie_in_blocks_of_full_size(B, N, dtype):
    _assert_copies_tie(B, N, 64, dtype)


@pytest.mark.parametrize("first_id", [0, 2])
def test_a_model_of_nan_gets_the_worst_rank(threads, first_id):
    N = 21
    worst = N - first_id - 1
    got = rank(np.full((3, 2), np.nan), np.ones((N, 2)), np.array([2, 5, 20]), first_id=first_id)
    assert (got.num_better >= worst).all()
    assert (got.num_tied == 0).all()
    # A single item's NaN counts as better than every target, and is the worst target.
    items = np.ones((N, 1))
    items[5] = np.nan
    got = rank(np.ones((3, 1)), items, np.array([2, 5, 20]), first_id=first_id)
    assert got.num_better[[0, 2]].tolist() == [1, 1]
    assert got.num_better[1] >= worst
    assert got.num_tied.tolist() == [worst - 1, 0, worst - 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_full_softmax_loss_equals_the_reference(threads, bias, dtype):
    rng = np.random.default_rng(3)
    B, N, D, first_id = 10, 33, 6, 2
    u, v, b = (rng.normal(size=shape).astype(dtype) for shape in ((B, D), (N, D), N))
    targets = rng.integers(first_id, N, B)
    got = full_softmax_loss(
        u,
        Candidates(embeddings=v, bias=b) if bias else v,
        targets,
        temperature=0.3,
        first_id=first_id,
    )
    # A bias is one more dimension, in which every query is 1.
    exact_u, exact_v = u.astype(float), v.astype(float)
    if bias:
        exact_u = np.column_stack([exact_u, np.ones(B)])
        exact_v = np.column_stack([exact_v, b.astype(float)])
    expected = reference.full_softmax_loss(
        exact_u, exact_v[first_id:], targets - first_id, temperature=0.3
    )
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    largest = np.abs(exact_u @ exact_v.T).max() / 0.3
    np.testing.assert_allclose(got, expected, atol=4 * np.finfo(got.dtype).eps * largest, rtol=0)


def test_full_softmax_loss_of_extreme_scores_and_nan(threads):
    u, v = np.array([[100.0], [-100.0]], np.float16), np.array([[100.0], [-100.0]], np.float16)
    assert full_softmax_loss(u, v, np.array([0, 0])).tolist() == [0, 20_000]
    v[1] = np.nan
    assert np.isnan(full_softmax_loss(u, v, np.array([0, 1]))).all()


def test_an_empty_batch(threads):
    u, v, none = np.ones((0, 3)), np.ones((5, 3)), np.zeros(0, int)
    assert top_k(u, v, 2).ids.shape == (0, 2)
    assert rank(u, v, none).num_better.shape == (0,)
    assert full_softmax_loss(u, v, none).shape == (0,)


@pytest.mark.parametrize("function", [top_k, rank, full_softmax_loss])
def test_memory_is_a_small_part_of_the_scores(function):
    rng = np.random.default_rng(0)
    B, N = 64, 200_000
    u, v = rng.normal(size=(B, 8)).astype(np.float32), rng.normal(size=(N, 8)).astype(np.float32)
    last = 10 if function is top_k else np.arange(B)
    tracemalloc.start()
    try:
        function(u, v, last)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * B * N * 4


U, V, T = np.ones((2, 3)), np.ones((5, 3)), np.array([1, 2])


@pytest.mark.parametrize(
    ("function", "args", "options", "error", "text"),
    [
        (scores, (U[0], V), {}, ValueError, r"^queries: expected two dimensions, got shape \(3,\)"),
        (scores, (U, V[0]), {}, ValueError, "^items.*: expected two dimensions"),
        (
            scores,
            (U, V[:, :2]),
            {},
            ValueError,
            r"^items: .* \(N, D\) with D as queries = \(5, 3\)",
        ),
        (scores, (U, V.astype(int)), {}, TypeError, "^items: expected float16, .* got int64"),
        (scores, (U.astype(int), V), {}, TypeError, "^queries: expected float16"),
        (scores, (None, V), {}, ValueError, "^queries: expected an array, got None"),
        (scores, (U, None), {}, ValueError, "^items: expected an array, got None"),
        (scores, (U.tolist(), V), {}, TypeError, "^queries: expected an array .* got list"),
        (scores, (U, (V, None)), {}, TypeError, "^items: expected Candidates .* got a tuple"),
        (scores, (U, np.ma.array(V)), {}, TypeError, r"^items\.embeddings: a masked array"),
        (
            scores,
            (U, Candidates(embeddings=V, bias=np.ones(2))),
            {},
            ValueError,
            r"^items\.bias: expected shape \(N,\) = \(5,\)",
        ),
        (scores, (U, V), {"temperature": 0.0}, ValueError, "^temperature: expected a finite"),
        (top_k, (U, V, 0), {}, ValueError, "^k: expected an integer from 1 to 5, got 0"),
        (top_k, (U, V, 6), {}, ValueError, "^k: expected an integer from 1 to 5, got 6"),
        (top_k, (U, V, 5), {"first_id": 1}, ValueError, "^k: expected an integer from 1 to 4"),
        (top_k, (U, V, 2.0), {}, TypeError, "^k: expected an integer, got 2.0"),
        (
            top_k,
            (U, V, 1),
            {"first_id": 6},
            ValueError,
            "^first_id: expected an integer from 0 to 5",
        ),
        (top_k, (U, V, 1), {"first_id": -1}, ValueError, "^first_id: expected an integer from 0"),
        (
            top_k,
            (U, V, 1),
            {"exclude": T},
            TypeError,
            r"^exclude: expected the pair \(indptr, ids\)",
        ),
        (
            top_k,
            (U, V, 1),
            {"exclude": (np.array([0, 1, 3]), T)},
            ValueError,
            "^exclude: expected indptr to rise",
        ),
        (rank, (U, V, T[:1]), {}, ValueError, r"^target_ids: expected shape \(B,\) = \(2,\)"),
        (rank, (U, V, T.astype(float)), {}, TypeError, "^target_ids: expected an integer dtype"),
        (rank, (U, V, T + 3), {}, ValueError, "^target_ids: expected ids from 0 to 4, got 4 to 5"),
        (rank, (U, V, T - 2), {}, ValueError, "^target_ids: expected ids from 0 to 4, got -1 to 0"),
        (rank, (U, V, T), {"first_id": 2}, ValueError, "^target_ids: expected ids from 2 to 4"),
        (rank, (U, V, T.tolist()), {}, TypeError, "^target_ids: expected an array"),
        (rank, (U, V, None), {}, (TypeError, ValueError), "^target_ids: "),
        (full_softmax_loss, (U, V, None), {}, (TypeError, ValueError), "^target_ids: "),
        (full_softmax_loss, (U, V, T + 3), {}, ValueError, "^target_ids: expected ids from 0 to 4"),
        (
            full_softmax_loss,
            (U, V, T),
            {"temperature": np.ones(2)},
            TypeError,
            "^temperature: expected a number",
        ),
    ],
)
def test_errors(function, args, options, error, text):
    with pytest.raises(error, match=text):
        function(*args, **options)


# Exact loss and gradients


@pytest.mark.parametrize("first_id", [0, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_full_gradients_against_the_reference(first_id, dtype, with_bias):
    rng = np.random.default_rng(7)
    u, v = rng.normal(size=(13, 5)).astype(dtype), rng.normal(size=(41, 5)).astype(dtype)
    bias = rng.normal(size=41).astype(dtype) if with_bias else None
    targets, weight = rng.integers(first_id, 41, 13), rng.uniform(0, 2, 13)
    loss, grads = full_softmax_value_and_grad(
        u,
        Candidates(embeddings=v, bias=bias),
        targets,
        temperature=0.6,
        first_id=first_id,
        sample_weight=weight.astype(dtype),
    )
    # dL/da = softmax − one-hot.
    plain = v.astype(np.float64)[first_id:]
    a = (u.astype(np.float64) @ plain.T + (0 if bias is None else bias[first_id:])) / 0.6
    p = np.exp(a - a.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(13), targets - first_id
    expected = -(weight * np.log(p[rows])).sum() / 13
    p[rows] -= 1
    d_a = p * weight[:, None] / 13
    close = {"rel": 1e-4, "abs": 1e-6} if dtype == np.float32 else {"rel": 1e-11, "abs": 1e-13}
    assert loss == pytest.approx(expected, **close)
    assert grads.queries == pytest.approx(d_a @ plain / 0.6, **close)
    assert grads.items.embeddings[first_id:] == pytest.approx(d_a.T @ u / 0.6, **close)
    assert (grads.items.embeddings[:first_id] == 0).all()
    assert grads.temperature == pytest.approx(-(d_a * a).sum() / 0.6, **close)
    assert grads.queries.dtype == grads.items.embeddings.dtype == dtype
    if with_bias:
        assert grads.items.bias[first_id:] == pytest.approx(d_a.sum(axis=0) / 0.6, **close)
    else:
        assert grads.items.bias is None


def test_the_full_loss_has_two_ways():
    rng = np.random.default_rng(8)
    u, v, targets = rng.normal(size=(9, 4)), rng.normal(size=(30, 4)), rng.integers(0, 30, 9)
    loss, _ = full_softmax_value_and_grad(u, v, targets, reduction="none")
    assert loss == pytest.approx(full_softmax_loss(u, v, targets), rel=1e-12)
