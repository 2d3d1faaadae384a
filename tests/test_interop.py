"""The boundary in NumPy: what is viewed, what is refused, and that nothing given is changed."""

import os
import subprocess
import sys
import types
from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import zipfneg
from zipfneg import (
    Candidates,
    ContrastiveOutput,
    Empirical,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    Uniform,
    as_array,
)
from zipfneg.interop import NUMPY, Home, on_device

DTYPES = [
    np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, np.int64, np.bool_,
]  # fmt: skip
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T,
    "sliced": lambda x: x[1:, ::2],
    "negative stride": lambda x: x[::-1, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1], (9, *x.shape)),
    "zero-size": lambda x: x[:0],
    "no dimension": lambda x: x[1, 2, ...],
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape),
}
B, S, D, N = 5, 7, 3, 13
LAW = LogUniform(N)


def inputs(dtype=np.float32, ids=np.int64):
    """One array for every argument; ids 0 to N − 1 are rows of `items`."""
    rng = np.random.default_rng(11)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    return SimpleNamespace(
        queries=normal(B, D),
        positives=normal(B, D),
        negatives=normal(S, D),
        own_negatives=normal(B, S, D),
        items=normal(N, D),
        positive_ids=rng.permutation(N)[:B].astype(ids),
        negative_ids=rng.permutation(N)[:S].astype(ids),
        own_negative_ids=rng.integers(0, N, (B, S)).astype(ids),
        positive_log_q=normal(B),
        negative_log_q=normal(S),
        own_negative_log_q=normal(B, S),
        positive_bias=normal(B),
        negative_bias=normal(S),
        own_negative_bias=normal(B, S),
        item_bias=normal(N),
        mask=rng.random((B, S)) < 0.2,
        column_mask=rng.random(S) < 0.2,
        sample_weight=rng.random(B).astype(dtype),
        d_loss=normal(B),
        temperature=np.asarray(0.5, dtype),
        indptr=np.arange(0, 2 * B + 1, 2, dtype=ids),
        known_ids=rng.integers(0, N, 2 * B).astype(ids),
        probabilities=rng.random((2, 3)).astype(dtype),
        counts=rng.integers(1, 9, N).astype(ids),
    )


def _shared(x):
    positives = Candidates(x.positive_ids, x.positives, x.positive_log_q, x.positive_bias)
    negatives = Candidates(x.negative_ids, x.negatives, x.negative_log_q, x.negative_bias)
    return x.queries, positives, negatives


def _own(x):
    negatives = Candidates(
        x.own_negative_ids, x.own_negatives, x.own_negative_log_q, x.own_negative_bias
    )
    return (*_shared(x)[:2], negatives)


def _options(x):
    return {
        "temperature": x.temperature,
        "mask": x.mask,
        "sample_weight": x.sample_weight,
        "known_positives": (x.indptr, x.known_ids),
    }


def _forward_backward(arguments, d_loss, **options):
    loss, saved = zipfneg.sampled_softmax_forward(*arguments, reduction="none", **options)
    return loss, zipfneg.sampled_softmax_backward(d_loss, saved)


def _tied(x):
    return {
        "items": Candidates(embeddings=x.items, bias=x.item_bias),
        "sample_weight": x.sample_weight,
        "known_positives": (x.indptr, x.known_ids),
        "step": 3,
    }


_SAMPLER = PopularitySampler(LAW, S)
_TIED = ContrastiveOutput(_SAMPLER, temperature=0.5, store_negative_ids=True)
_TOWERS = ContrastiveOutput(InBatchSampler(LAW), top_ks=(1, 3), store_negative_ids=True)
_MIXTURE = MixtureSampler([InBatchSampler(LAW), PopularitySampler(Uniform(N), S)])


def _items(x):
    return Candidates(embeddings=x.items, bias=x.item_bias)


# Every public function that takes arrays, as a function of `inputs`.
CALLS = {
    "log_prob": lambda x: LAW.log_prob(x.own_negative_ids),
    "log_prob of Empirical": lambda x: Empirical(x.counts).log_prob(x.positive_ids),
    "cdf": lambda x: LAW.cdf(x.positive_ids),
    "ppf": lambda x: LAW.ppf(x.probabilities),
    "PopularitySampler.sample": lambda x: _SAMPLER.sample(x.positive_ids, step=2),
    "PopularitySampler.sample, candidates": lambda x: PopularitySampler(
        LAW, S, unique=False
    ).sample(_shared(x)[1]),
    "PopularitySampler.log_q": lambda x: _SAMPLER.log_q(x.own_negative_ids),
    "InBatchSampler.sample": lambda x: InBatchSampler(x.counts).sample(_shared(x)[1]),
    "InBatchSampler.log_q": lambda x: InBatchSampler(LAW).log_q(x.positive_ids, batch_size=B),
    "MixtureSampler.sample": lambda x: _MIXTURE.sample(x.positive_ids),
    "MixtureSampler.log_q": lambda x: _MIXTURE.log_q(x.positive_ids, batch_size=B),
    "loss": lambda x: zipfneg.sampled_softmax_loss(*_shared(x), **_options(x)),
    "loss, plain arrays": lambda x: zipfneg.sampled_softmax_loss(
        x.queries, x.positives, x.negatives, mask=x.column_mask, reduction="none"
    ),
    "value and grad": lambda x: zipfneg.sampled_softmax_value_and_grad(*_shared(x), **_options(x)),
    "value and grad, own negatives": lambda x: zipfneg.sampled_softmax_value_and_grad(
        *_own(x), **_options(x)
    ),
    "forward, backward": lambda x: _forward_backward(_shared(x), x.d_loss, **_options(x)),
    "head, a table": lambda x: _TIED(x.queries, x.positive_ids, **_tied(x)),
    "head, two towers": lambda x: _TOWERS(
        x.queries, x.positive_ids, positives=Candidates(embeddings=x.positives)
    ),
    "head, two towers with bias": lambda x: _TOWERS(
        x.queries,
        x.positive_ids,
        positives=Candidates(embeddings=x.positives, bias=x.positive_bias),
        sample_weight=x.sample_weight,
    ),
    "head.scores": lambda x: _TIED.scores(x.queries, _items(x)),
    "head.top_k": lambda x: _TIED.top_k(x.queries, x.items, 4),
    "scores": lambda x: zipfneg.scores(x.queries, _items(x), temperature=x.temperature),
    "top_k": lambda x: zipfneg.top_k(
        x.queries, _items(x), 4, first_id=2, exclude=(x.indptr, x.known_ids)
    ),
    "rank": lambda x: zipfneg.rank(x.queries, _items(x), x.positive_ids),
    "full_softmax_loss": lambda x: zipfneg.full_softmax_loss(
        x.queries, _items(x), x.positive_ids, temperature=x.temperature
    ),
    "log_normalizer": lambda x: zipfneg.log_normalizer(x.queries, x.items),
}


def leaves(value, path="result"):
    """The arrays and numbers of nested tuples and dicts, each with its path; None is left out."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:
        return {} if value is None else {path: value}
    return {k: v for name, part in parts for k, v in leaves(part, f"{path}.{name}").items()}


def assert_same(result, expected):
    """Equal up to the rounding of products whose terms are added in another order."""
    result, expected = leaves(result), leaves(expected)
    assert result.keys() == expected.keys()
    for path, x in result.items():
        x = np.asarray(x if isinstance(x, int | float) else as_array(x))
        exact = x.dtype.kind in "iu"
        tolerance = 0 if exact else 8 * float(ml_dtypes.finfo(x.dtype).eps)
        x, y = x.astype(np.float64), np.asarray(expected[path], np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=path)


def assert_apart(result, given):
    """No result shares memory with another or with an argument, unless it is that very object."""
    arrays = {k: v for k, v in leaves(result).items() if not isinstance(v, int | float)}
    views = {path: as_array(x) for path, x in arrays.items()}
    arguments = {name: (x, as_array(x)) for name, x in vars(given).items()}
    for path, x in arrays.items():
        if not any(x is y for y, _ in arguments.values()):
            assert views[path].flags.c_contiguous, path
        for name, (y, view) in arguments.items():
            assert x is y or not np.shares_memory(views[path], view), (path, name)
        for other, y in arrays.items():
            assert x is y or not np.shares_memory(views[path], views[other]), (path, other)


class Exporter:
    """An array of a library that zipfneg does not know, on any device it says."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        if self.device[0] not in (1, 3):
            raise BufferError("there is no such memory")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def _address(x):
    return x.__array_interface__["data"][0]


# -- Views


def test_by_hand():
    x = np.arange(6).reshape(2, 3)
    assert as_array(x) is x
    assert as_array(np.float32(2)).shape == ()
    assert as_array(np.float32(2)).dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writeable", [True, False])
def test_numpy_is_viewed(layout, dtype, writeable):
    x = LAYOUTS[layout](np.arange(30).reshape(5, 6).astype(dtype))
    if not writeable:
        x = np.asarray(x).view()
        x.flags.writeable = False
    view = as_array(x)
    assert (view.shape, view.strides, view.dtype) == (x.shape, x.strides, x.dtype)
    assert _address(view) == _address(x)
    assert view.flags.writeable == x.flags.writeable


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "unaligned"])
@pytest.mark.parametrize("device", [(1, 0), (3, 0)], ids=["cpu", "pinned"])
def test_foreign_exporter_is_viewed(layout, device):
    x = LAYOUTS[layout](np.arange(30.0).reshape(5, 6))
    view = as_array(Exporter(x, device))
    assert (view.shape, view.dtype, _address(view)) == (x.shape, x.dtype, _address(x))
    np.testing.assert_array_equal(view, x)


def test_view_keeps_foreign_memory_alive():
    view = as_array(Exporter(np.full(100_000, 7.0)))
    np.zeros(100_000)
    assert (view == 7).all()


def test_module_that_only_has_a_frameworks_name(monkeypatch):
    for name in ("cupy", "torch", "jax", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert LAW.log_prob(np.arange(3)).shape == (3,)
    with pytest.raises(TypeError, match="queries: expected an array"):
        zipfneg.scores([[1.0]], np.ones((1, 1)))


# -- What every function keeps


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("call", CALLS)
def test_numpy_in_and_out(call, dtype):
    given = inputs(dtype)
    result = CALLS[call](given)
    for path, x in leaves(result).items():
        assert isinstance(x, np.ndarray | np.generic | int | float), path
        if path.endswith(("queries", "embeddings", "bias", "rows")):
            assert x.dtype == dtype, path
    assert_apart(result, given)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "reversed", "read-only", "narrow ids"])
def test_nothing_given_is_written_to(call, layout):
    given = inputs(ids=np.int32 if layout == "narrow ids" else np.int64)
    for name, x in vars(given).items():
        if layout == "strided":
            wide = np.zeros((*x.shape, 3), x.dtype)
            wide[..., 1] = x
            x = wide[..., 1]
        elif layout == "reversed":
            x = np.flip(np.flip(x).copy())
        elif layout == "read-only":
            x.flags.writeable = False
        setattr(given, name, x)
    before = {name: x.tobytes() for name, x in vars(given).items()}
    result = CALLS[call](given)
    assert {name: x.tobytes() for name, x in vars(given).items()} == before
    assert_same(result, CALLS[call](inputs()))
    assert_apart(result, given)


@pytest.mark.parametrize("call", CALLS)
def test_results_outlive_inputs(call):
    given = inputs()
    result = CALLS[call](given)
    copies = {k: np.copy(v) for k, v in leaves(result).items()}
    passed_on = {id(x) for x in vars(given).values()}
    for x in vars(given).values():
        x[...] = 1
    for path, x in leaves(result).items():
        if id(x) not in passed_on:
            np.testing.assert_array_equal(x, copies[path], err_msg=path)


def test_samplers_pass_the_callers_arrays_on():
    given = Candidates(np.arange(3), np.ones((3, 2)), bias=np.zeros(3))
    for sampler in (_SAMPLER, _MIXTURE, InBatchSampler(LAW)):
        positives = sampler.sample(given).positives
        assert (positives.ids, positives.embeddings, positives.bias) == (
            pytest.approx(given.ids), pytest.approx(given.embeddings), pytest.approx(given.bias),
        )  # fmt: skip
        assert positives.ids is given.ids
        assert positives.embeddings is given.embeddings
        assert positives.bias is given.bias
    negatives = InBatchSampler(LAW).sample(given).negatives
    assert negatives.embeddings is given.embeddings


def test_out_is_filled_in_place():
    for dtype in (np.int32, np.int64):
        out = np.full((2, 5), -1, dtype)
        assert LAW.draw((2, 5), seed=3, out=out) is out
        np.testing.assert_array_equal(out, LAW.draw((2, 5), seed=3))


# -- What is refused


class _Frame:
    """Like a data frame: converts itself to an array when asked, and exports nothing."""

    def __array__(self, dtype=None, copy=None):
        return np.ones(3)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ([1.0, 2.0], "x: expected an array .*, got list; convert it first, .* numpy.asarray"),
        ((1, 2), "x: expected an array .*, got tuple"),
        (None, "x: expected an array .*, got NoneType"),
        (3, "x: expected an array .*, got int"),
        ("abc", "x: expected an array .*, got str"),
        (_Frame(), "x: expected an array .*, got .*_Frame"),
        (np.float32, "x: expected an array .*, got type"),
        (np.dtype("f4"), "x: expected an array .*, got numpy"),
        (np.random.default_rng(0), "x: expected an array .*, got numpy.random"),
        (memoryview(b"abc"), "x: expected an array .*, got memoryview"),
        (np.ma.array([1, 2], mask=[0, 1]), r"x: a masked array .* pass x.filled\(...\)"),
        (np.ma.masked, "x: a masked array would lose its mask"),
        (np.array([1, None]), "x: cannot view .*: object is not numeric"),
        (np.array(["a"]), "x: cannot view .*: <U1 is not numeric"),
        (np.array(["2020-01-01"], "M8[D]"), "x: cannot view .* is not numeric"),
        (np.zeros(2, [("a", object)]), "x: cannot view .* is not numeric"),
        (np.ones(3, ">f8"), "x: cannot view .*: the bytes of >f8 are swapped; .* float64 first"),
        (Exporter(np.ones(3), (2, 1)), "x: cannot view this .*Exporter: "),
        (Exporter(np.ones(3), (8, 0)), "x: cannot view this .*Exporter: .*DLPack type 8"),
        (Exporter(np.array([None])), "x: cannot view this .*Exporter: "),
    ],
)  # fmt: skip
def test_refused(x, text):
    with pytest.raises(TypeError, match=text):
        as_array(x)


def test_cuda_memory_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # its import fails
    with pytest.raises(TypeError, match=r"queries: .* lives on cuda:1, .*zipfneg\[cu12\]"):
        zipfneg.scores(Exporter(np.ones((2, 3)), (2, 1)), np.ones((4, 3)))


@pytest.mark.parametrize("call", CALLS)
def test_foreign_exporter_is_told_to_convert(call):
    given = SimpleNamespace(**{k: Exporter(v) for k, v in vars(inputs()).items()})
    with pytest.raises(TypeError, match=r"of no framework .* pass zipfneg\.as_array"):
        CALLS[call](given)
    converted = SimpleNamespace(**{k: as_array(v) for k, v in vars(given).items()})
    assert_same(CALLS[call](converted), CALLS[call](inputs()))


@pytest.mark.parametrize(
    ("argument", "name", "call"),
    [
        ("positive_ids", "ids", "cdf"),
        ("probabilities", "u", "ppf"),
        ("counts", "counts", "log_prob of Empirical"),
        ("own_negative_ids", "ids", "PopularitySampler.log_q"),
        ("positive_ids", "positives.ids", "PopularitySampler.sample"),
        ("positive_ids", "positives.ids", "MixtureSampler.sample"),
        ("queries", "queries", "loss"),
        ("positives", "positives.embeddings", "loss"),
        ("negatives", "negatives.embeddings", "loss"),
        ("positive_ids", "positives.ids", "loss"),
        ("negative_log_q", "negatives.log_q", "loss"),
        ("negative_bias", "negatives.bias", "loss"),
        ("mask", "mask", "loss"),
        ("sample_weight", "sample_weight", "loss"),
        ("temperature", "temperature", "loss"),
        ("indptr", "known_positives.indptr", "loss"),
        ("known_ids", "known_positives.ids", "loss"),
        ("d_loss", "d_loss", "forward, backward"),
        ("queries", "queries", "head, a table"),
        ("positive_ids", "positive_ids", "head, a table"),
        ("sample_weight", "sample_weight", "head, a table"),
        ("queries", "queries", "scores"),
        ("items", "items.embeddings", "scores"),
        ("item_bias", "items.bias", "scores"),
        ("known_ids", "exclude.ids", "top_k"),
        ("positive_ids", "target_ids", "rank"),
    ],
)
def test_refusals_name_the_argument(argument, name, call):
    given = inputs()
    masked = np.ma.array(getattr(given, argument))
    setattr(given, argument, masked)
    with pytest.raises(TypeError, match=f"^{name}: a masked array"):
        CALLS[call](given)


@pytest.mark.parametrize(
    ("argument", "name", "call"),
    [("items", "items", "head, a table"), ("positives", "positives", "head, two towers")],
)
def test_the_heads_refusals_name_the_argument(argument, name, call):
    given = inputs()
    setattr(given, argument, np.ma.array(getattr(given, argument)))
    with pytest.raises(TypeError, match=f"^{name}.*: a masked array"):
        CALLS[call](given)


@pytest.mark.parametrize("u", [np.array([True]), np.array([0.5 + 0j])], ids=["bool", "complex"])
def test_ppf_wants_real_numbers(u):
    with pytest.raises(TypeError, match="u: expected"):
        LAW.ppf(u)


def test_out_refused():
    with pytest.raises(TypeError, match="out: expected an array"):
        LAW.draw(3, seed=0, out=[0, 0, 0])
    out = np.zeros(3, np.int64)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected writable, C-contiguous memory"):
        LAW.draw(3, seed=0, out=out)
    with pytest.raises(ValueError, match="out: expected writable, C-contiguous memory"):
        LAW.draw(3, seed=0, out=np.zeros(6, np.int64)[::2])
    with pytest.raises(TypeError, match="out: expected int32 or int64, got float64"):
        LAW.draw(3, seed=0, out=np.zeros(3))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda0", 0])
def test_unknown_devices_are_refused(device):
    for call in (partial(LAW.draw, 3, seed=0), _SAMPLER.sample):
        with pytest.raises(ValueError, match=r"device: expected one of 'cpu', 'cuda', .*, got "):
            call(device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_what_draws_on_the_cpu_only_says_so(device):
    for sampler in (_MIXTURE, InBatchSampler(LAW)):
        with pytest.raises(ValueError, match=r"device: expected one of .*'cpu', got '"):
            sampler.sample(np.arange(3), device=device)


def test_cuda_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for call in (partial(LAW.draw, 3, seed=0), _SAMPLER.sample):
        with pytest.raises(
            RuntimeError, match=r"device: 'cuda' takes CuPy: install zipfneg\[cu12\]"
        ):
            call(device="cuda")


def _cupy_with(num_devices):
    class CUDARuntimeError(RuntimeError):
        pass

    def count():
        if not num_devices:
            raise CUDARuntimeError("no CUDA-capable device is detected")
        return num_devices

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=count, getDevice=lambda: 1
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), ndarray=_NoArray)


class _NoArray:
    pass


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", _cupy_with(0))
    with pytest.raises(RuntimeError, match=r"device: 'cuda:0' takes an NVIDIA GPU .* no CUDA-cap"):
        LAW.draw(3, seed=0, device="cuda:0")


def test_cuda_devices_by_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", _cupy_with(2))
    assert on_device("cuda") == Home("cupy", "cuda:1")
    assert on_device("cuda:0") == Home("cupy", "cuda:0")
    with pytest.raises(ValueError, match="device: 'cuda:2' is not among the 2 of this machine"):
        LAW.draw(3, seed=0, device="cuda:2")
    with pytest.raises(
        TypeError, match=r"positives\.ids: expected one of CuPy or PyTorch on cuda:1"
    ):
        _SAMPLER.sample(np.arange(3), device="cuda")


def test_work_on_cuda_goes_to_the_stream_of_the_caller(monkeypatch):
    current = []

    class Context:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            current.append(self.what)

        def __exit__(self, *error):
            current.remove(self.what)

    cupy = SimpleNamespace(
        cuda=SimpleNamespace(Device=Context, ExternalStream=Context), ndarray=_NoArray
    )
    streams = {"cuda:2": SimpleNamespace(cuda_stream=77)}
    torch = SimpleNamespace(
        cuda=SimpleNamespace(current_stream=streams.get), from_dlpack=lambda x: ("torch", x)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    result = _NoArray()
    with Home("cupy", "cuda:1").current():
        assert current == [(1,)]
        assert Home("cupy", "cuda:1").give(result) is result
    with Home("torch", "cuda:2").current():
        assert current == [(2,), (77, 2)]
        assert Home("torch", "cuda:2").give(result) == ("torch", result)
    for place in (NUMPY, Home("torch", "cpu")):
        with place.current():
            assert not current


def test_results_go_to_known_frameworks_only():
    with pytest.raises(NotImplementedError, match="cupy on cuda:0"):
        Home("cupy", "cuda:0").give(np.ones(3))


# -- The import


def _run(script):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_framework():
    script = (
        "import sys, numba; before = set(sys.modules); import zipfneg; "
        "print(*set(sys.modules) - before); print(*sys.modules)"
    )
    ours, loaded = map(str.split, _run(script).splitlines())
    heavy = {"cupy", "numba.cuda", "torch", "jax", "tensorflow", "pyarrow", "matplotlib"}
    assert not heavy & set(loaded)
    # Numba looks for SciPy's version where it is installed; nothing more of it is loaded.
    assert not [name for name in ours if name.partition(".")[0] == "scipy"]


def test_import_is_quick():
    # Processor time, which other work on the machine does not add to; and the best of several.
    script = (
        "import time, numpy; start = time.process_time(); import zipfneg; "
        "print(time.process_time() - start)"
    )
    assert min(float(_run(script)) for _ in range(3)) < 0.6
