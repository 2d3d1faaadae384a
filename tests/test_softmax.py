"""The tiles behind the sampled softmax: their edges, their threads, their memory.

What the results must be stands in `test_loss`.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_loss import EVERYTHING, _assert_accurate, _assert_same, _by_name, _call, _check

from zipfneg import (
    Candidates,
    reference,
    sampled_softmax_backward,
    sampled_softmax_forward,
    sampled_softmax_loss,
    sampled_softmax_value_and_grad,
)
from zipfneg.cpu import softmax
from zipfneg.cpu.product import COLUMNS, ROWS, product
from zipfneg.cpu.softmax import HEIGHT, PITCH, WIDTH
from zipfneg.loss import prepare

both_kinds = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])


def _tiles(number, dtype=np.float32):
    """Bytes of a block of so many tiles."""
    return number * WIDTH * PITCH * np.dtype(dtype).itemsize


def _everything(call):
    """Loss, gradients, the pair and the ranks, as one list of arrays."""
    loss, grads = sampled_softmax_value_and_grad(*call.args, **call.options)
    forward, saved = sampled_softmax_forward(*call.args, **call.options)
    pair = sampled_softmax_backward(0.5, saved)
    options = {name: x for name, x in call.options.items()}
    prepared = prepare(*call.args, **options)
    ranked, _ = softmax.value_and_gradients(prepared.problem, prepared.weight, ranks=True)
    return [loss, forward, *_by_name(grads).values(), *_by_name(pair).values(), *ranked]


# The product


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 0), (ROWS, COLUMNS, 7), (ROWS + 1, COLUMNS + 1, 64), (97, 130, 33)]
)
def test_product_of_any_strides(shape, dtype):
    rng = np.random.default_rng(1)
    m, n, k = shape
    room_m, room_n = m + ROWS, n + COLUMNS
    a, b = rng.normal(size=(2, k, room_m)).astype(dtype), rng.normal(size=(k, room_n)).astype(dtype)
    c = np.full((2, room_m, room_n), 7, dtype)
    start = room_m * room_n
    # a is read transposed, from its second part on.
    product(a, k * room_m, 1, room_m, b, 0, room_n, c, start, room_n, shape, False)
    expected = a[1].T[:m].astype(np.float64) @ b[:, :n]
    tolerance = 4 * (k + 1) * np.finfo(dtype).eps
    np.testing.assert_allclose(c[1, :m, :n], expected, atol=tolerance)
    product(a, k * room_m, 1, room_m, b, 0, room_n, c, start, room_n, shape, True)
    np.testing.assert_allclose(c[1, :m, :n], 2 * expected, atol=2 * tolerance)
    # Nothing is written beyond the next multiple of a tile.
    assert (c[0] == 7).all()
    assert (c[1, -(-m // ROWS) * ROWS :] == 7).all()
    assert (c[1, :, -(-n // COLUMNS) * COLUMNS :] == 7).all()


# Edges of tiles and blocks


@pytest.mark.parametrize("D", [1, COLUMNS - 1, COLUMNS + 1])
@pytest.mark.parametrize("S", [ROWS + 1, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH + ROWS])
@pytest.mark.parametrize("B", [ROWS - 1, HEIGHT - 1, HEIGHT, HEIGHT + 1])
def test_edges_of_tiles(B, S, D):
    _check(_call(B, S, D, **EVERYTHING))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tiles", [0, 1, 5, 8, 13])
def test_any_division_into_blocks(monkeypatch, tiles, dtype):
    call = _call(5 * HEIGHT + 3, 3 * WIDTH + 5, 9, dtype, **EVERYTHING)
    loss, grads = _check(call)
    whole = _everything(call)
    monkeypatch.setattr(softmax, "BLOCK", _tiles(tiles, dtype))
    blocked_loss, blocked = _check(call)
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(blocked_loss, loss, rtol=tolerance)
    _assert_same(blocked, grads, rtol=tolerance, atol=tolerance)
    for x, y in zip(_everything(call)[-2:], whole[-2:], strict=True):  # better, tied
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_own_negatives_are_converted_in_any_blocks(monkeypatch, dtype):
    call = _call(11, 13, 5, dtype, shared=False, **EVERYTHING)
    expected = _everything(call)
    monkeypatch.setattr(softmax, "BLOCK", 3 * 2 * 13 * 5 * 4)
    for x, y in zip(_everything(call), expected, strict=True):
        np.testing.assert_array_equal(x, y)


# Threads


@both_kinds
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("tiles", [4, 1000])
def test_bits_do_not_depend_on_the_threads(monkeypatch, tiles, dtype, shared):
    B, S = (5 * HEIGHT + 3, 3 * WIDTH + 5) if shared else (41, 37)
    call = _call(B, S, 33, dtype, shared=shared, **EVERYTHING)
    monkeypatch.setattr(softmax, "BLOCK", _tiles(tiles))
    monkeypatch.setenv("ZIPFNEG_NUM_THREADS", "1")
    expected = _everything(call)
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("ZIPFNEG_NUM_THREADS", threads)
        for x, y in zip(_everything(call), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_calls_from_several_threads_do_not_meet():
    calls = [_call(2 * HEIGHT, n * WIDTH, 8, **EVERYTHING) for n in (1, 2, 3)]
    expected = [_everything(call) for call in calls]
    with ThreadPoolExecutor(3) as pool:
        for got in (list(pool.map(_everything, calls)) for _ in range(5)):
            for one, other in zip(got, expected, strict=True):
                for x, y in zip(one, other, strict=True):
                    np.testing.assert_array_equal(x, y)


# The shift


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_a_largest_logit_in_any_tile(order, temperature):
    """Each tile raises, or does not raise, the shift of the tiles before."""
    call = _call(2 * HEIGHT, 4 * WIDTH, 6, temperature=temperature, log_q=True)
    u, positives, negatives = call.args
    column = np.arange(4 * WIDTH)
    place = {
        "rising": column,
        "falling": -column,
        "mixed": np.random.default_rng(0).permutation(column),
    }
    # Logits of −60 to 0 by their place, for every row alike.
    log_q = place[order] * (-60 / (4 * WIDTH)) + (60 if order == "falling" else 0)
    call = call._replace(args=(u, positives, negatives._replace(log_q=log_q)))
    call.oracle["negative_log_q"] = log_q
    _check(call)


@pytest.mark.parametrize("norm", [1e2, 1e4, 1e15])
def test_huge_embeddings_stay_finite(norm):
    rng = np.random.default_rng(2)
    u, p, v = (norm * rng.normal(size=(n, 7)).astype(np.float32) for n in (150, 150, 600))
    loss, grads = sampled_softmax_value_and_grad(u, p, v, reduction="none")
    exact = reference.sampled_softmax(*(x.astype(np.float64) for x in (u, p, v)), d_loss=1.0)[0]
    np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-6 * norm**2)
    for name, x in _by_name(grads).items():
        assert x is None or np.isfinite(x).all(), name


def test_tiles_without_a_negative_left():
    call = _call(HEIGHT + 2, 3 * WIDTH, 5, bias=True, log_q=True)
    for dropped in (slice(0, WIDTH), slice(0, 2 * WIDTH), slice(WIDTH, None), slice(None)):
        mask = np.zeros((HEIGHT + 2, 3 * WIDTH), bool)
        mask[::3, dropped] = True
        call.options["mask"], call.oracle["dropped"] = mask, mask
        _, grads = _check(call)
        loss, saved = sampled_softmax_forward(*call.args, **call.options)
        _assert_accurate(call, loss, sampled_softmax_backward(1.0, saved))
        if dropped == slice(None):
            assert (grads.queries[::3] == 0).all()


# NaN and infinity


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tiles", [4, 1000])
def test_nan_and_infinity_reach_what_they_belong_to(monkeypatch, tiles, value):
    monkeypatch.setattr(softmax, "BLOCK", _tiles(tiles))
    B, S, row = 3 * HEIGHT, 3 * WIDTH, HEIGHT + 9
    u, positives, negatives = _call(B, S, 5, bias=True).args

    def broken(x, at):
        x = x.copy()
        x[at, 2] = value
        return x

    others = np.arange(B) != row
    for args in (
        (broken(u, row), positives, negatives),
        (u, positives._replace(embeddings=broken(positives.embeddings, row)), negatives),
    ):
        loss, grads = sampled_softmax_value_and_grad(*args, reduction="none")
        assert not np.isfinite(loss[row]) or not np.isfinite(grads.queries[row]).all()
        assert np.isfinite(loss[others]).all()
        assert np.isfinite(grads.queries[others]).all()
        if np.isnan(value):
            assert np.isnan(loss[row])
            assert np.isnan(grads.negatives.embeddings).all()
    args = u, positives, negatives._replace(embeddings=broken(negatives.embeddings, WIDTH + 7))
    loss, grads = sampled_softmax_value_and_grad(*args)
    assert np.isnan(loss)
    assert np.isnan(grads.queries).any(axis=1).all()
    assert np.isnan(sampled_softmax_loss(*args))


@both_kinds
def test_nan_ranks_above_the_positive(shared):
    u, p, v = np.ones((2, 1)), np.ones((2, 1)), np.array([[0.0], [np.nan], [1.0], [2.0]])
    prepared = prepare(u, p, v if shared else np.array([v, v]))
    ranked, _ = softmax.value_and_gradients(prepared.problem, prepared.weight, ranks=True)
    assert (ranked.num_better.tolist(), ranked.num_tied.tolist()) == ([2, 2], [1, 1])


@both_kinds
def test_ranks_are_counted_by_the_uncorrected_score(shared):
    rng = np.random.default_rng(6)
    B, S, D = HEIGHT + 5, WIDTH + 9, 3
    # Small integers: scores are exact, and often tie.
    u, p, v = (rng.integers(-2, 3, (n, D)).astype(np.float64) for n in (B, B, S))
    bias, dropped = rng.integers(-2, 3, S).astype(np.float64), rng.random((B, S)) < 0.1
    columns = (S,) if shared else (B, S)
    negatives = Candidates(
        None, *(np.broadcast_to(x, (*columns, *x.shape[1:])) for x in (v, rng.normal(size=S), bias))
    )
    positives = Candidates(embeddings=p, log_q=np.zeros(B))
    prepared = prepare(u, positives, negatives, mask=dropped)
    ranked, _ = softmax.value_and_gradients(prepared.problem, prepared.weight, ranks=True)
    a_0, a = (u * p).sum(axis=1)[:, None], u @ v.T + bias
    better, tied = ((x & ~dropped).sum(axis=1) for x in (a > a_0, a == a_0))
    np.testing.assert_array_equal(ranked.num_better, better)
    np.testing.assert_array_equal(ranked.num_tied, tied)
    assert tied.sum() > B


# Memory

MEASURE = """
import sys
import numpy as np
from zipfneg import Candidates, sampled_softmax_value_and_grad

def high_water():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

def run(B, S, D):
    u, p, v = (np.ones((n, D), np.float32) for n in (B, B, S))
    ids = np.arange(B), np.arange(S)
    open("/proc/self/clear_refs", "w").write("5")  # the high water mark starts anew
    before = high_water()
    _, grads = sampled_softmax_value_and_grad(u, Candidates(ids[0], p), Candidates(ids[1], v))
    given = grads.queries, grads.positives.embeddings, grads.negatives.embeddings
    return high_water() - before - sum(x.nbytes for x in given)

run(64, 64, 8)
print(run(*map(int, sys.argv[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", [(12_000, 12_000, 16), (300, 200_000, 32), (200_000, 300, 32)])
def test_memory_beyond_the_gradients_is_bounded(shape):
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, shape)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(measured.stdout) < 64 * 2**20
