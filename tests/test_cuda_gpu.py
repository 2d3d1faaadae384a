"""The samplers on a GPU: the CPU's ids, no waiting, captured graphs, the cost of a launch."""

import time
from collections import Counter

import numpy as np
import pytest

import zipfneg.cuda
from zipfneg import (
    Candidates,
    Empirical,
    LogUniform,
    PopularitySampler,
    Uniform,
    ZipfMandelbrot,
    merge_repeats,
)
from zipfneg.popularity import stream_words

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install zipfneg[cu12] or [cu13]")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"needs an NVIDIA GPU: {error}", allow_module_level=True)
if zipfneg.cuda.SIMULATED:
    pytest.skip("the simulator needs no GPU", allow_module_level=True)

from zipfneg.cuda import sampling  # noqa: E402

LAWS = [
    LogUniform(10**9, first_id=1),
    Uniform(2**40),
    ZipfMandelbrot(10**8, 1.2, 2.0),
    Empirical(1 / np.arange(1.0, 10**6)),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)


@each_law
def test_ids_are_those_of_the_cpu(law, record_property):
    # exp and log may differ by an ulp, and move an id to its neighbour.
    size = 2**24
    found = law.draw(size, seed=3, step=2**32 - 1, device="cuda").get()
    expected = law.draw(size, seed=3, step=2**32 - 1)
    ties = int((found != expected).sum())
    record_property("ties", ties)
    record_property("draws", size)
    assert ties <= 2
    assert (np.abs(found - expected) <= 1).all() or isinstance(law, Empirical)


@each_law
@pytest.mark.parametrize("num_sampled", [1, 1000, 65_536])
def test_unique_ids_are_those_of_the_cpu(law, num_sampled):
    sampler = PopularitySampler(law, num_sampled, seed=5)
    positive_ids = law.draw(1000, seed=6)
    expected = sampler.sample(positive_ids, step=7)
    for _ in range(5):  # threads race anew
        found = sampler.sample(cupy.asarray(positive_ids), step=7)
        assert isinstance(found.negatives.ids, cupy.ndarray)
        assert (found.negatives.ids.get() == expected.negatives.ids).all()
        assert int(found.num_tries) == expected.num_tries
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert a.log_q.get() == pytest.approx(b.log_q, rel=1e-13)


def test_hits():
    law = LogUniform(10**6)
    sampler = sampling.UniqueSampler(law, 8192, PopularitySampler(law, 8192)._time)
    positive_ids = cupy.asarray(law.draw(2000, seed=6))
    drawn = sampler.sample(sampling.device_words(stream_words(1, 2, 3)), positive_ids)
    column = {x: j for j, x in enumerate(drawn.ids.tolist())}
    assert drawn.hit_columns.tolist() == [column.get(x, -1) for x in positive_ids.tolist()]


def test_races():
    sampler = PopularitySampler(LogUniform(10**5), 10**5 - 10)
    expected, found = sampler.sample(step=1), sampler.sample(step=1, device="cuda")
    assert (found.negatives.ids.get() == expected.negatives.ids).mean() > 0.999
    assert int(found.num_tries) == pytest.approx(expected.num_tries, rel=1e-9)


def test_repeats():
    law = LogUniform(10**6)
    draw = PopularitySampler(law, 8192, unique=False).sample(device="cuda")
    merged = merge_repeats(draw.negatives)
    count = Counter(draw.negatives.ids.tolist())
    n = len(count)
    log_q = law.log_prob(merged.ids[:n].get()) + np.log(8192)
    copies = np.rint(np.exp(log_q - merged.log_q[:n].get()))
    assert dict(zip(merged.ids[:n].tolist(), copies.tolist(), strict=True)) == count
    assert cupy.isposinf(merged.log_q[n:]).all()


@pytest.mark.parametrize("is_unique", [True, False])
def test_captured_graphs(is_unique):
    # A step that waited for the device, or took memory from it, could not be captured.
    sampler = PopularitySampler(LogUniform(10**6), 4096, unique=is_unique)
    positives = cupy.arange(100)
    step = cupy.zeros(1, np.int64)
    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        sampler.sample(positives, step=step)  # compiles, and takes its memory
        stream.begin_capture()
        draw = sampler.sample(positives, step=step)
        graph = stream.end_capture()
        for now in (3, 0, 2**32 - 1):
            step.fill(now)
            graph.launch()
            stream.synchronize()
            expected = sampler.sample(positives.get(), step=now)
            assert (draw.negatives.ids.get() == expected.negatives.ids).all()
            assert int(draw.num_tries) == expected.num_tries
            assert draw.positives.log_q.get() == pytest.approx(expected.positives.log_q, rel=1e-13)


def test_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch knows no GPU")
    law = LogUniform(10**6)
    out = torch.empty(100, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert law.draw(100, seed=1, device="cuda", out=out) is out
        draw = PopularitySampler(law, 64).sample(Candidates(out), step=3)
        log_prob = law.log_prob(out)
    stream.synchronize()
    assert (out.cpu().numpy() == law.draw(100, seed=1)).all()
    expected = PopularitySampler(law, 64).sample(out.cpu(), step=3)
    for x in (draw.negatives.ids, draw.negatives.log_q, draw.positives.log_q, log_prob):
        assert x.device == out.device
    assert (draw.negatives.ids.cpu() == expected.negatives.ids).all()


def test_nothing_is_moved():
    sampler = PopularitySampler(LogUniform(100), 5)
    with pytest.raises(TypeError, match=r"positives\.ids: expected one of CuPy or PyTorch on cuda"):
        sampler.sample(np.arange(3), device="cuda")
    with pytest.raises(NotImplementedError, match="computes on the CPU only"):
        sampler.sample(cupy.arange(3), device="cpu")


def test_a_launch_is_cheap():
    law, out = LogUniform(10**6), cupy.empty(64, np.int64)
    words = sampling.device_words(stream_words(1, 2, 3))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        sampling.fill(law, out, words)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 30e-6
