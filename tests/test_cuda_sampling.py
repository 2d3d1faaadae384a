"""CUDA's samplers in Numba's simulator, against the CPU: in a process of its own, with

NUMBA_ENABLE_CUDASIM=1 pytest -m cudasim
"""

import gc
import inspect
import pickle
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zipfneg.cuda
from zipfneg import (
    Candidates,
    Empirical,
    InBatchSampler,
    LogUniform,
    PopularitySampler,
    Uniform,
    ZipfMandelbrot,
    interop,
    logq,
    merge_repeats,
    sampled_softmax_loss,
)
from zipfneg.cpu import sampling as cpu
from zipfneg.popularity import stream_words, uniforms

pytestmark = pytest.mark.cudasim
if not zipfneg.cuda.SIMULATED:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from numba.cuda.simulator.kernelapi import FakeCUDAShared  # noqa: E402

from zipfneg.cuda import launch, sampling  # noqa: E402

LAWS = [
    LogUniform(1000, first_id=3),
    Uniform(2**40),
    ZipfMandelbrot(100_000, 1.3, 2.5, first_id=1),
    Empirical([5, 0, 1, 2, 9, 1, 0, 1], first_id=10),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
KEY = dict(seed=2**64 - 3, step=2**32 - 1, stream=5)
WORDS = sampling.device_words(stream_words(**KEY))


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """The simulator is slow for each thread, and few blocks make kernels stride."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (launch, sampling):
            patch.setattr(module, "BLOCK", 8)
        patch.setattr(launch, "MAX_BLOCKS", 5)
        # Threads take turns often: quicker, since the simulator waits for them in a loop, and races
        # show. The simulator has one of its own, in which threads do not share what is shared.
        interval, lock, array = sys.getswitchinterval(), threading.Lock(), FakeCUDAShared.array

        def one_at_a_time(self, shape, dtype):
            with lock:
                return array(self, shape, dtype)

        patch.setattr(FakeCUDAShared, "array", one_at_a_time)
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(interval)


@pytest.fixture
def numpy_on_cuda(monkeypatch):
    """NumPy's arrays count as CUDA's."""
    monkeypatch.setattr(interop, "NUMPY", interop.Home("numpy", "cuda"))


def unique(law, num_sampled, positive_ids=None, num_tries=None, words=WORDS):
    time = PopularitySampler(law, num_sampled)._time
    return sampling.UniqueSampler(law, num_sampled, time, num_tries).sample(words, positive_ids)


def assert_as_on_the_cpu(drawn, law, num_sampled, **key):
    sampler = PopularitySampler(law, num_sampled, seed=key.pop("seed"))
    expected = sampler.sample(**key)
    assert drawn.ids.tolist() == expected.negatives.ids.tolist()
    assert drawn.ids.dtype == np.int64
    assert drawn.num_tries == expected.num_tries
    assert drawn.num_tries.shape == ()
    assert drawn.log_q == pytest.approx(expected.negatives.log_q, rel=1e-14, abs=1e-15)


# By hand


def test_unique_by_hand():
    law = Uniform(1)
    drawn = unique(law, 1, np.array([0, 1, -1, 0]))
    assert drawn.ids.tolist() == [0]
    assert drawn.log_q.tolist() == [0]
    assert drawn.num_tries == 1
    assert drawn.positive_log_q.tolist() == [0, -np.inf, -np.inf, 0]
    assert drawn.hit_columns.tolist() == [0, -1, -1, 0]


def test_repeats_by_hand():
    merged = sampling.merge_repeats(np.array([7, 2, 7, 9, 2, 7]))
    assert merged.ids.tolist() == [7, 2, 9, 7, 7, 7]
    assert merged.first.tolist() == [0, 1, 3, 0, 0, 0]
    assert merged.copies.tolist() == [3, 2, 1, 0, 0, 0]
    assert merged.num_distinct == 3
    assert merged.num_distinct.shape == ()


def test_repeats_by_hand_on_cuda(numpy_on_cuda):
    given = Candidates(np.array([7, 2, 7]), np.array([[7.0], [2], [7]]), np.array([-1.0, -2, -1]))
    merged = merge_repeats(given)
    assert merged.ids.tolist() == [7, 2, 7]
    assert merged.log_q.tolist() == [-1 - np.log(2), -2, np.inf]
    assert merged.embeddings.tolist() == [[7], [2], [7]]
    assert merged.bias is None


# Draws with replacement


@each_law
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65, 300])
def test_draws(law, size):
    out = np.full(size, -1)
    sampling.fill(law, out, WORDS)
    assert out.tolist() == law.draw(size, **KEY).tolist()


@pytest.mark.parametrize("size", [1, 33, 97])
def test_uniforms(size):
    out = np.empty(size)
    sampling.draw_uniforms(size, out, *WORDS)
    assert out.tolist() == uniforms(size, WORDS[:4]).tolist()


@pytest.mark.parametrize(("block", "max_blocks"), [(8, 1), (32, 3), (256, 1024)])
def test_draws_do_not_depend_on_the_launch(monkeypatch, block, max_blocks):
    for module in (launch, sampling):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(launch, "MAX_BLOCKS", max_blocks)
    law = LAWS[0]
    assert law.draw(300, **KEY, device="cuda").tolist() == law.draw(300, **KEY).tolist()
    assert_as_on_the_cpu(unique(law, 100), law, 100, **KEY)


def test_draws_beyond_32_bits_of_counters():
    # What a draw of 2**34 comes to, by the function that makes it.
    words = WORDS[:4]
    for index in (2**33 - 1, 2**33, 2**33 + 32, 2**40 + 33):
        group, within = divmod(index, 64)
        counter = group * 32 + within % 32
        high_low = sampling.philox(
            np.uint64(counter % 2**32), np.uint64(counter >> 32), words[2], words[3], *words[:2]
        )
        half = high_low[:2] if within < 32 else high_low[2:]
        assert sampling._uniform(index, *words) == cpu.uniform_53(*half)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_step_as_device_data(dtype, shape):
    law, step = LAWS[0], np.full(shape, 200, dtype)
    drawn = law.draw(40, seed=1, step=step, device="cuda")
    assert drawn.tolist() == law.draw(40, seed=1, step=200).tolist()
    sampler = PopularitySampler(law, 20, seed=3)
    drawn = sampler.sample(step=step, device="cuda")
    assert drawn.negatives.ids.tolist() == sampler.sample(step=200).negatives.ids.tolist()


def test_the_step_is_read_when_the_kernel_runs():
    law, step = LAWS[0], np.array([4])
    words = sampling.device_words(stream_words(1, 0, 0), step)
    drawn = []
    for now in (4, 2**32 - 1):
        step[0] = now
        # Too few tries: what is drawn after them takes the same step.
        drawn = unique(law, 30, words=words, num_tries=20)
        assert_as_on_the_cpu(drawn, law, 30, seed=1, step=now)


def test_draws_into_an_array():
    law = LAWS[0]
    for dtype in (np.int32, np.int64):
        out = np.zeros((3, 5), dtype)
        assert law.draw((3, 5), seed=4, device="cuda:0", out=out) is out
        assert (out == law.draw((3, 5), seed=4)).all()


# log P and log inclusion


@each_law
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_log_probabilities(law, dtype, numpy_on_cuda):
    ids = np.array([0, 1, 3, 10, 11, 14, 15, 17, 18, 100, 127], dtype)
    if dtype is np.int64:
        ids = np.append(ids, [-1, -(2**63), 2**63 - 1, law.first_id + law.num_items])
    on_cuda = law.log_prob(ids), law.log_inclusion(ids, 5.0)
    interop.NUMPY = interop.Home("numpy", "cpu")
    for found, expected in zip(
        on_cuda, (law.log_prob(ids), law.log_inclusion(ids, 5.0)), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-14)
        assert (np.isfinite(found) == np.isfinite(expected)).all()


# Unique draws


@each_law
@pytest.mark.parametrize("num_sampled", [1, 2, 5])
def test_few_unique(law, num_sampled):
    assert_as_on_the_cpu(unique(law, num_sampled), law, num_sampled, **KEY)


@pytest.mark.parametrize(
    ("law", "num_sampled"),
    [
        (LogUniform(50), 40),
        (Uniform(300, first_id=2**50), 200),
        (ZipfMandelbrot(2000, 1.1, 3.0), 150),
        (Empirical(np.arange(100) ** 2), 31),
    ],
)
def test_many_unique(law, num_sampled):
    assert_as_on_the_cpu(unique(law, num_sampled), law, num_sampled, **KEY)


@pytest.mark.parametrize(
    ("law", "num_sampled"),
    [
        (LogUniform(60), 60),
        (LogUniform(200), 197),
        (Uniform(33, first_id=4), 33),
        (Empirical([1e12, 1, 0, 1, 1]), 4),
        (Empirical([10_000, 2, 2] + [0] * 50), 3),
    ],
)
def test_races(law, num_sampled):
    positive_ids = np.arange(-1, law.num_items + 5)
    drawn = unique(law, num_sampled, positive_ids)
    assert_as_on_the_cpu(drawn, law, num_sampled, **KEY)
    assert_hits(drawn, positive_ids)


@each_law
@pytest.mark.parametrize("num_tries", [1, 3, 5])
def test_tries_that_are_too_few_are_continued(law, num_tries):
    positive_ids = np.arange(30)
    drawn = unique(law, 5, positive_ids, num_tries)
    assert_as_on_the_cpu(drawn, law, 5, **KEY)
    assert_hits(drawn, positive_ids)


def assert_hits(drawn, positive_ids):
    column = {x: j for j, x in enumerate(drawn.ids.tolist())}
    assert drawn.hit_columns.tolist() == [column.get(x, -1) for x in positive_ids.tolist()]


@pytest.mark.parametrize("num_positives", [1, 100])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_hits_and_positives(num_positives, dtype):
    law = LAWS[0]
    positive_ids = law.draw(num_positives, seed=8).astype(dtype)
    # Both what was drawn before the cut and after it.
    drawn = unique(law, 64, positive_ids)
    assert_hits(drawn, positive_ids)
    expected = PopularitySampler(law, 64).log_q(positive_ids)
    assert drawn.positive_log_q == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("home", ["zero", "last", "reversed"])
@pytest.mark.parametrize("room", [0, 1, 100])
def test_nothing_depends_on_where_an_id_lands(monkeypatch, home, room):
    homes = {
        "zero": lambda x, size: 0,
        "last": lambda x, size: size - 1,
        "reversed": lambda x, size: size - 1 - int(x) % size,
    }
    monkeypatch.setattr(sampling, "_home", homes[home])
    law, num_sampled, num_tries = LAWS[0], 30, 40
    sampler = sampling.UniqueSampler(law, num_sampled, 40.0, num_tries)
    # At first sight of the last id the table is full but for one slot, which ends a search.
    distinct = max(num_sampled, len(set(law.draw(num_tries, **KEY).tolist())))
    table = np.empty(distinct + 1 + room, np.int32)
    sampler.workspace = sampler.workspace._replace(table=table)
    positive_ids = law.draw(50, seed=9)
    drawn = sampler.sample(WORDS, positive_ids)
    expected = PopularitySampler(law, num_sampled, seed=KEY["seed"]).sample(
        step=KEY["step"], stream=5
    )
    assert drawn.ids.tolist() == expected.negatives.ids.tolist()
    assert drawn.num_tries == expected.num_tries
    assert_hits(drawn, positive_ids)


def test_memory_is_used_again():
    law = LAWS[0]
    sampler = sampling.UniqueSampler(law, 20, PopularitySampler(law, 20)._time)
    first = sampler.sample(sampling.device_words(stream_words(1, 0, 0)))
    copies = [x.copy() for x in first[:3]]
    other = sampler.sample(sampling.device_words(stream_words(1, 1, 0)))
    again = sampler.sample(sampling.device_words(stream_words(1, 0, 0)))
    for a, b, c in zip(copies, first[:3], again[:3], strict=True):
        assert (a == b).all()
        assert (a == c).all()
    assert (first.ids != other.ids).any()


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    law=st.builds(LogUniform, st.integers(5, 3000), first_id=st.integers(0, 2**40))
    | st.builds(Uniform, st.integers(5, 2**40), first_id=st.integers(0, 5))
    | st.builds(ZipfMandelbrot, st.integers(5, 10**6), st.floats(0, 1.5), st.floats(-0.5, 9.0))
    | st.lists(st.integers(1, 9), min_size=5, max_size=50).map(Empirical),
    num_sampled=st.integers(1, 5),
    num_tries=st.none() | st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_any_unique_draw(law, num_sampled, num_tries, seed, step, stream):
    words = sampling.device_words(stream_words(seed, step, stream))
    drawn = unique(law, num_sampled, num_tries=num_tries, words=words)
    assert_as_on_the_cpu(drawn, law, num_sampled, seed=seed, step=step, stream=stream)


# The number of tries


def missed(num_items, num_sampled, num_tries):
    """P(fewer than S distinct among the tries), all items alike: by the number found so far."""
    found = np.zeros(num_items + 1)
    found[0] = 1
    k = np.arange(num_items + 1)
    for _ in range(num_tries):
        stays = found * k / num_items
        found = stays + np.concatenate([[0], (found - stays)[:-1]])
    return found[:num_sampled].sum()


@pytest.mark.parametrize(
    ("num_items", "num_sampled"), [(1, 1), (3, 2), (50, 1), (50, 40), (200, 60)]
)
@pytest.mark.parametrize("miss", [1e-12, 1e-3])
def test_enough_tries_are_enough(num_items, num_sampled, miss):
    spectrum = Uniform(num_items).spectrum()
    time = min(logq.sampling_time(*spectrum, num_sampled), 1e4)
    num_tries = sampling.enough_tries(*spectrum, num_sampled, time, miss)
    assert missed(num_items, num_sampled, num_tries) <= miss


@pytest.mark.parametrize(
    ("law", "num_sampled", "most"),
    [
        (LogUniform(10**6), 8192, 1.15),
        (LogUniform(10**6), 65_536, 1.05),
        (LogUniform(10**9), 65_536, 1.05),
        (Uniform(10**9), 1000, 1.4),
        (Empirical(1 / np.arange(1.0, 10_001)), 5000, 1.2),
    ],
)
def test_enough_tries_are_not_too_many(law, num_sampled, most):
    time = PopularitySampler(law, num_sampled)._time
    num_tries = sampling.enough_tries(*law.spectrum(), num_sampled, time)
    assert 1 < num_tries / time < most
    # A larger miss takes fewer.
    assert num_tries > sampling.enough_tries(*law.spectrum(), num_sampled, time, 1e-3)


def test_more_tries_than_the_table_can_number():
    with pytest.raises(ValueError, match="num_sampled: on CUDA distinct ids take fewer than 2"):
        sampling.Workspace.of(2**31, 2**40, 5)


# Repeats


@pytest.mark.parametrize("size", [1, 31, 97])
@each_law
def test_repeats(law, size):
    ids = law.draw(size, seed=12)
    merged = sampling.merge_repeats(ids)
    distinct, first, copies = np.unique(ids, return_index=True, return_counts=True)
    order = np.argsort(first)
    n = merged.num_distinct
    assert n == len(distinct)
    assert merged.ids[:n].tolist() == distinct[order].tolist()
    assert merged.first[:n].tolist() == first[order].tolist()
    assert merged.copies[:n].tolist() == copies[order].tolist()
    assert (merged.ids[n:] == ids[0]).all()
    assert (merged.first[n:] == 0).all()
    assert (merged.copies[n:] == 0).all()


def test_padded_columns_add_nothing_to_the_loss(numpy_on_cuda):
    rng = np.random.default_rng(0)
    law, table = LogUniform(30), rng.normal(size=(30, 4))
    draw = PopularitySampler(law, 60, unique=False).sample(np.array([3, 0, 29]))
    negatives = draw.negatives._replace(embeddings=table[draw.negatives.ids])
    merged = merge_repeats(negatives)
    assert np.isposinf(merged.log_q).any()
    interop.NUMPY = interop.Home("numpy", "cpu")
    queries, positives = (
        rng.normal(size=(3, 4)),
        draw.positives._replace(embeddings=table[[3, 0, 29]]),
    )
    expected = sampled_softmax_loss(queries, positives, negatives)
    finite = Candidates(*(x[np.isfinite(merged.log_q)] for x in merged[:3]))
    assert sampled_softmax_loss(queries, positives, finite) == pytest.approx(expected, rel=1e-12)
    scores = queries @ merged.embeddings.T - merged.log_q
    assert (np.exp(scores)[:, np.isposinf(merged.log_q)] == 0).all()


# The samplers


@pytest.mark.parametrize("positives", [None, np.array([3, 4, 1003, 2]), np.arange(40)[::2]])
@pytest.mark.parametrize("is_unique", [True, False])
def test_samplers(is_unique, positives):
    sampler = PopularitySampler(LAWS[0], 25, unique=is_unique, seed=9)
    found = sampler.sample(positives, step=4, stream=2, device="cuda")
    expected = sampler.sample(positives, step=4, stream=2)
    assert found.num_tries == expected.num_tries
    for a, b in zip(found[:2], expected[:2], strict=True):
        if b is None:
            assert a is None
            continue
        assert a.ids.tolist() == b.ids.tolist()
        assert a.log_q == pytest.approx(b.log_q, rel=1e-14)


@pytest.mark.parametrize(
    "settings",
    [dict(exclude=[4]), dict(per_query=True), dict(by_tries=True), dict(unique="poisson")],
)
def test_what_samplers_cannot_do_on_cuda_yet(settings):
    with pytest.raises(NotImplementedError, match="exclude, per_query, by_tries and unique"):
        PopularitySampler(LAWS[0], 5, **settings).sample(np.arange(3), device="cuda")
    with pytest.raises(NotImplementedError, match="exclude: expected None on CUDA"):
        PopularitySampler(LAWS[0], 5).sample(device="cuda", exclude=np.array([3]))


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (np.array([1, 2]), ValueError, r"step: expected one number, got shape \(2,\)"),
        (np.array([1.0]), TypeError, "step: expected an integer dtype, got float64"),
        (2**32, ValueError, "step: expected an integer from 0 to 4294967295"),
        (1.5, TypeError, "step: expected an integer, got 1.5"),
        ([1], TypeError, "step: expected an array"),
    ],
)
def test_bad_steps(step, error, text):
    with pytest.raises(error, match=text):
        LAWS[0].draw(3, seed=0, step=step, device="cuda")


def test_bad_ids(numpy_on_cuda):
    with pytest.raises(TypeError, match="ids: expected an integer dtype, got float64"):
        LAWS[0].log_prob(np.zeros(3))
    with pytest.raises(TypeError, match=r"positives\.ids: expected an integer dtype, got float64"):
        PopularitySampler(LAWS[0], 3).sample(np.zeros(3))
    with pytest.raises(ValueError, match="device: expected one of None, 'cpu', got 'cuda'"):
        InBatchSampler(LAWS[0]).sample(np.zeros(3, int), device="cuda")


def test_what_is_kept_beside_a_sampler_goes_with_it():
    sampler = PopularitySampler(Empirical([3, 2, 1]), 2)
    size = len(pickle.dumps(sampler))
    sampler.sample(device="cuda")
    kept = len(launch._beside)
    assert abs(len(pickle.dumps(sampler)) - size) < 100
    del sampler
    gc.collect()
    assert len(launch._beside) == kept - 2  # the sampler's memory, the law's tables


def test_twins():
    for name in ("draw", "log_prob", "log_inclusion"):
        ours = list(inspect.signature(getattr(sampling.log_uniform, name).function).parameters)
        theirs = list(inspect.signature(getattr(cpu.log_uniform, name).py_func).parameters)
        # Threads take what spans of the array are there, and the step may stand on the device.
        assert [x for x in ours if x != "step_at"] == [
            x for x in theirs if x not in ("start", "stop")
        ]
    assert set(vars(sampling)) >= {law._kernels for law in LAWS}
