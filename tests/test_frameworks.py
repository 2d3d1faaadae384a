"""Arrays of PyTorch, JAX and TensorFlow in, the same out: every public function, every dtype."""

import gc
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from test_interop import CALLS, FLOATS, LAW, assert_apart, assert_same, inputs, leaves

import zipfneg
from zipfneg import Candidates, LogUniform, PopularitySampler, as_array
from zipfneg.interop import home

pytestmark = pytest.mark.frameworks

NAMES = ["torch", "jax", "tensorflow"]
DTYPES = [
    np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, np.int64, np.bool_,
]  # fmt: skip


class Framework:
    """A framework, and how its user makes an array."""

    def __init__(self, name):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what frameworks do while they are imported
            self.module = pytest.importorskip(name)
        self.name = name

    def array(self, x):
        """A copy of a NumPy array."""
        if self.name == "torch":
            if x.dtype == ml_dtypes.bfloat16:
                bits = self.module.tensor(np.asarray(x).view(np.int16))
                return bits.view(self.module.bfloat16)
            return self.module.tensor(np.asarray(x))
        if self.name == "jax":
            return self.module.numpy.array(x)
        return self.module.constant(x)

    def inputs(self, dtype=np.float32, ids=np.int64):
        given = vars(inputs(dtype, ids))
        return SimpleNamespace(**{name: self.array(x) for name, x in given.items()})

    def owns(self, x):
        if self.name == "jax":
            return isinstance(x, self.module.Array)
        return isinstance(x, self.module.Tensor)

    def address(self, x):
        """Of an array's first element, asked of the framework itself."""
        if self.name == "torch":
            return x.data_ptr()
        if self.name == "jax":
            return x.unsafe_buffer_pointer()
        return x.__array__().__array_interface__["data"][0]

    def dtype(self, dtype):
        """What it makes of a NumPy dtype: JAX halves the wide ones."""
        if self.name != "jax":
            return np.dtype(dtype)
        return np.dtype(self.module.dtypes.canonicalize_dtype(dtype))


@pytest.fixture(scope="session", params=NAMES)
def framework(request):
    return Framework(request.param)


@pytest.fixture(scope="session")
def torch():
    return Framework("torch").module


@pytest.fixture(scope="session")
def jax():
    return Framework("jax").module


@pytest.fixture(scope="session")
def tf():
    return Framework("tensorflow").module


def _run(script):
    """In a process of its own, since what is tested may abort it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


# -- Views


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_viewed_without_a_copy(framework, dtype):
    x = np.arange(12).reshape(3, 4).astype(dtype)
    given = framework.array(x)
    view = as_array(given)
    assert view.dtype == framework.dtype(dtype)
    assert view.__array_interface__["data"][0] == framework.address(given)
    np.testing.assert_array_equal(view.astype(np.float64), x.astype(np.float64))
    assert view.flags.writeable == (framework.name == "torch")
    del given
    framework.array(np.zeros_like(x))
    np.testing.assert_array_equal(view.astype(np.float64), x.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_empty_and_without_dimensions(framework, dtype):
    empty = as_array(framework.array(np.zeros((0, 3), dtype)))
    assert (empty.shape, empty.dtype) == ((0, 3), framework.dtype(dtype))
    scalar = as_array(framework.array(np.ones((), dtype)))
    assert (scalar.shape, scalar.dtype, float(scalar)) == ((), framework.dtype(dtype), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_torch_layouts(torch, dtype):
    x = Framework("torch").array(np.arange(30).reshape(5, 6).astype(dtype))
    for y in (x.T, x[1:, ::2], x[:1].expand(9, 6), x[2, 3], x[:0], x[..., None]):
        view = as_array(y)
        assert view.shape == tuple(y.shape)
        if view.size:
            steps = tuple(s * view.itemsize for s in y.stride())
            assert (view.strides, view.ctypes.data) == (steps, y.data_ptr())
        np.testing.assert_array_equal(view.astype(float), y.double().numpy())


def test_torch_views_are_writable(torch):
    x = torch.zeros(3)
    as_array(x)[1] = 5
    assert x.tolist() == [0, 5, 0]


def test_torch_tensors_that_only_look_special(torch):
    with torch.inference_mode():
        x = torch.arange(3.0)
    assert as_array(x).tolist() == [0, 1, 2]
    assert as_array(torch.nn.Parameter(torch.ones(2), requires_grad=False)).tolist() == [1, 1]

    class Named(torch.Tensor):
        pass

    assert as_array(torch.ones(2).as_subclass(Named)).tolist() == [1, 1]


def test_jax_waits_for_the_result(jax):
    @jax.jit
    def slow(x):
        return (x @ x @ x)[:2] / len(x) ** 2

    assert (as_array(slow(jax.numpy.ones((700, 700)))) == 1).all()


# -- Every function


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("call", CALLS)
def test_same_framework_out(framework, call, dtype):
    given = framework.inputs(dtype)
    before = {name: as_array(x).tobytes() for name, x in vars(given).items()}
    result = CALLS[call](given)
    assert {name: as_array(x).tobytes() for name, x in vars(given).items()} == before

    # The same arrays in NumPy: JAX may have halved them.
    views = SimpleNamespace(**{name: as_array(x) for name, x in vars(given).items()})
    expected = CALLS[call](views)
    place = home(given.queries, "queries")
    for path, x in leaves(result).items():
        if not isinstance(x, int | float):
            assert framework.owns(x), path
            assert home(x, path) == place, path
            assert as_array(x).dtype == framework.dtype(leaves(expected)[path].dtype), path
    assert_same(result, expected)
    assert_apart(result, given)


@pytest.mark.parametrize("call", CALLS)
def test_narrow_ids(framework, call):
    given = framework.inputs(ids=np.int32)
    assert_same(CALLS[call](given), CALLS[call](inputs()))


def test_results_outlive_inputs(framework):
    def copied(results):
        return [
            np.copy(x if isinstance(x, int | float) else as_array(x))
            for result in results
            for x in leaves(result).values()
        ]

    results = [call(framework.inputs()) for call in CALLS.values()]
    expected = copied(results)
    gc.collect()
    kept = [framework.inputs() for _ in range(20)]  # takes memory that was let go of
    for x, y in zip(copied(results), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    del kept


@pytest.mark.parametrize("call", CALLS)
def test_torch_layouts_in_every_function(torch, call):
    given = Framework("torch").inputs()
    for name, x in vars(given).items():
        wide = torch.zeros((*x.shape, 2), dtype=x.dtype)
        wide[..., 1] = x
        setattr(given, name, wide[..., 1])
    result = CALLS[call](given)
    assert_same(result, CALLS[call](inputs()))
    assert_apart(result, given)


def test_draw_into_a_tensor(torch):
    for dtype in (torch.int32, torch.int64):
        out = torch.full((2, 5), -1, dtype=dtype)
        assert LAW.draw((2, 5), seed=3, out=out) is out
        np.testing.assert_array_equal(out.numpy(), LAW.draw((2, 5), seed=3))
    with pytest.raises(ValueError, match="out: expected writable, C-contiguous memory"):
        LAW.draw((5, 2), seed=3, out=out.T)
    with pytest.raises(ValueError, match="out: expected writable, C-contiguous memory"):
        LAW.draw((4, 5), seed=3, out=out[:1].expand(4, 5))
    with pytest.raises(TypeError, match="out: expected int32 or int64, got float32"):
        LAW.draw(3, seed=3, out=torch.zeros(3))


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_draw_leaves_immutable_arrays_alone(name):
    out = Framework(name).array(np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="out: expected writable, C-contiguous memory"):
        LAW.draw(4, seed=3, out=out)
    assert as_array(out).tolist() == [0, 0, 0, 0]


# -- Refusals


def _numpy(x):
    return np.array(as_array(x))


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("positives", "positives.embeddings"),
        ("negative_ids", "negatives.ids"),
        ("negative_log_q", "negatives.log_q"),
        ("sample_weight", "sample_weight"),
        ("mask", "mask"),
    ],
)
def test_frameworks_do_not_mix(framework, argument, name):
    given = framework.inputs()
    setattr(given, argument, _numpy(getattr(given, argument)))
    text = f"^{name}: expected an array of {framework.name} on .*, as queries is, got one of numpy"
    with pytest.raises(TypeError, match=text):
        CALLS["loss"](given)


def test_two_frameworks_do_not_mix(torch, jax):
    x = Framework("torch").inputs()
    y = Framework("jax").inputs()
    with pytest.raises(
        TypeError, match=r"items.embeddings: expected an array of jax on .*torch on"
    ):
        zipfneg.scores(y.queries, x.items)
    with pytest.raises(TypeError, match=r"target_ids: expected an array of torch on .*jax on"):
        zipfneg.rank(x.queries, x.items, y.positive_ids)
    with pytest.raises(TypeError, match=r"positive_ids: expected an array of jax on .*torch on"):
        CALLS["head, a table"](SimpleNamespace(**{**vars(y), "positive_ids": x.positive_ids}))


def _fake(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3), torch.ones(3, dtype=torch.bfloat16)


REFUSED_TORCH = {
    "requires grad": (
        lambda torch: torch.ones(3, requires_grad=True),
        r"requires grad, .* pass x\.detach\(\)",
    ),
    "parameter": (lambda torch: torch.nn.Parameter(torch.ones(3)), "requires grad"),
    "result of a graph": (lambda torch: torch.ones(3, requires_grad=True) * 2, "requires grad"),
    "bfloat16 with grad": (
        lambda torch: torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
        "requires grad",
    ),
    "lazy negative": (
        lambda torch: torch.ones(3, dtype=torch.complex64).conj().imag,
        r"lazy negative or conjugate; pass x\.resolve_conj\(\)\.resolve_neg\(\)",
    ),
    "lazy conjugate": (lambda torch: torch.ones(3, dtype=torch.complex64).conj(), "lazy"),
    "sparse": (lambda torch: torch.eye(3).to_sparse(), "cannot view this torch.Tensor: .*parse"),
    "meta": (lambda torch: torch.ones(3, device="meta"), "cannot view this torch.Tensor: .*meta"),
    "fake": (lambda torch: _fake(torch)[0], "cannot view this .*FakeTensor: it is fake"),
    "fake bfloat16": (lambda torch: _fake(torch)[1], "cannot view this .*FakeTensor: it is fake"),
    "nested": (
        lambda torch: torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged),
        "cannot view this .*NestedTensor: it is .*nested",
    ),
    "size": (lambda torch: torch.ones(3).shape, "expected an array .*, got torch.Size"),
    "module": (lambda torch: torch.nn.Linear(2, 2), "expected an array .*Linear"),
}


@pytest.mark.parametrize("kind", REFUSED_TORCH)
def test_torch_refused(torch, kind):
    make, text = REFUSED_TORCH[kind]
    with pytest.raises(TypeError, match=f"^x: .*{text}"):
        as_array(make(torch))


# PyTorch scripts its own forward-mode decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_transforms_are_refused(torch):
    x = torch.ones(2, 3)

    def loss(u):
        return zipfneg.sampled_softmax_loss(u, x, x)

    with pytest.raises(TypeError, match=r"^queries: cannot view .*requires grad"):
        torch.func.grad(loss)(x)
    with pytest.raises(TypeError, match=r"^queries: cannot view"):
        torch.func.vmap(loss)(x[None])
    with pytest.raises(TypeError, match=r"^queries: cannot view"):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(TypeError, match=r"^queries: cannot view .*functionalized"):
        torch.func.functionalize(loss)(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(TypeError, match=r"^queries: cannot view .*requires grad"):
            loss(dual)
        assert float(loss(x)) > 0


def test_jax_refused(jax):
    x = jax.numpy.ones((2, 3))

    def loss(u):
        return zipfneg.sampled_softmax_loss(u, u, u)

    for transformed in (jax.jit(loss), jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(
            TypeError, match=r"^queries: .*a JAX tracer.* outside jit, grad and vmap"
        ):
            transformed(x)
    with pytest.raises(TypeError, match=r"^queries: .*a JAX tracer"):
        jax.vmap(loss)(x[None])
    with pytest.raises(TypeError, match=r"^ids: .*a JAX tracer"):
        jax.jit(LAW.log_prob)(jax.numpy.arange(3))
    with pytest.raises(TypeError, match=r"^temperature: .*a JAX tracer"):
        jax.grad(lambda t: zipfneg.sampled_softmax_loss(x, x, x, temperature=t))(1.0)
    with pytest.raises(TypeError, match=r"^x: .*PRNGKeyArray"):
        as_array(jax.random.key(0))
    with pytest.raises(TypeError, match=r"^x: expected an array .*ShapeDtypeStruct"):
        as_array(jax.ShapeDtypeStruct((3,), np.float32))
    for dtype in (np.float32, ml_dtypes.bfloat16):
        deleted = jax.numpy.ones(3, dtype)
        deleted.delete()
        with pytest.raises(TypeError, match=r"^x: cannot view .*deleted"):
            as_array(deleted)


def test_tensorflow_refused(tf):
    with pytest.raises(TypeError, match=r"^x: .*a tf.Variable, .* pass x\.value\(\)"):
        as_array(tf.Variable([1.0]))
    with pytest.raises(TypeError, match=r"^x: expected an array .*SparseTensor"):
        as_array(tf.sparse.from_dense([[1.0]]))
    with pytest.raises(TypeError, match=r"^x: expected an array .*RaggedTensor"):
        as_array(tf.ragged.constant([[1.0], []]))
    with pytest.raises(TypeError, match=r"^x: expected an array .*TensorShape"):
        as_array(tf.ones(3).shape)
    with pytest.raises(TypeError, match=r"^ids: .*string is not numeric"):  # DLPack would abort
        LAW.log_prob(tf.constant(["a"]))

    @tf.function(autograph=False)
    def loss(u):
        return zipfneg.sampled_softmax_loss(u, u, u)

    with pytest.raises(TypeError, match=r"^queries: .*symbolic tensor.* outside tf.function"):
        loss(tf.ones((2, 3)))


def test_a_variables_value_is_welcome(tf):
    value = tf.Variable(tf.ones((2, 3))).value()
    assert zipfneg.scores(value, value).numpy().tolist() == [[3, 3], [3, 3]]


# -- What frameworks do to the results


def test_results_change_without_changing_inputs(torch):
    for name, call in CALLS.items():
        given = Framework("torch").inputs()
        before = {k: x.clone() for k, x in vars(given).items()}
        passed_on = {id(x) for x in vars(given).values()}
        for x in leaves(call(given)).values():
            if isinstance(x, torch.Tensor) and id(x) not in passed_on:
                x.zero_()
        for k, x in vars(given).items():
            assert torch.equal(x, before[k]), (name, k)


def test_jax_ids_that_do_not_fit(jax):
    if jax.config.jax_enable_x64:
        pytest.skip("JAX runs with x64")
    wide = LogUniform(2**36)
    assert wide.ppf(jax.numpy.array([0.0, 0.5])).dtype == np.int32
    with pytest.raises(OverflowError, match="do not fit JAX's int32: enable jax_enable_x64"):
        wide.ppf(jax.numpy.array([0.0, 1.0]))
    with pytest.raises(OverflowError, match="do not fit JAX's int32"):
        PopularitySampler(LogUniform(9, first_id=2**31), 9).sample(jax.numpy.zeros(0, np.int32))
    assert LogUniform(2**31).ppf(jax.numpy.array([1.0])).tolist() == [2**31 - 1]
    with jax.enable_x64(True):
        assert wide.ppf(jax.numpy.array([1.0])).tolist() == [2**36 - 1]


def test_jax_with_x64_and_two_devices(jax):
    _run("""
import os
os.environ.update(JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np, pytest, zipfneg
from types import SimpleNamespace
from test_interop import CALLS, assert_same, inputs, leaves
first, second = jax.devices()
for dtype in (np.float64, np.float32):
    for name, call in CALLS.items():
        given = {k: jax.device_put(x, second) for k, x in vars(inputs(dtype)).items()}
        assert given["positive_ids"].dtype == np.int64 and given["queries"].dtype == dtype
        result, expected = call(SimpleNamespace(**given)), call(inputs(dtype))
        for path, x in leaves(expected).items():
            if not isinstance(x, int | float):
                y = leaves(result)[path]
                assert isinstance(y, jax.Array) and y.dtype == x.dtype, (name, path, y.dtype)
                assert y.devices() == {second}, (name, path)
        assert_same(result, expected)

x = jax.device_put(np.ones((2, 3)), first)
with pytest.raises(TypeError, match=r"items.embeddings: .*jax on .*jax on .*nothing is moved"):
    zipfneg.scores(x, jax.device_put(x, second))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
for spec in (jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()):
    for dtype in (np.float64, jax.numpy.bfloat16):
        y = jax.device_put(x.astype(dtype), jax.sharding.NamedSharding(mesh, spec))
        with pytest.raises(TypeError, match="x: .*several devices"):
            zipfneg.as_array(y)
        assert zipfneg.as_array(y.addressable_data(1)).dtype == dtype
""")


AWKWARD = """
import numpy as np, ml_dtypes, zipfneg
from zipfneg.interop import Home, home
rng = np.random.default_rng(0)
def awkward():
    # Arrays as they may stand behind a result: reversed, strided, unaligned, read-only, empty.
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_):
        for n in (1, 17, 1001, 70_001):
            x = (9 * rng.random(n + 3)).astype(dtype)
            yield from (x[::-1], x[1:], x[::3], x[:0], x[-1], x.reshape(-1, 1).T)
            raw = np.frombuffer(b"\\0" + x.tobytes(), dtype, x.size, 1)
            yield from (raw, raw[::-1], np.broadcast_to(x[0], (5, 3)))
"""


def test_torch_computes_on_any_result(torch):
    _run(
        AWKWARD
        + """
import torch
place = home(torch.ones(1), "x")
for x in awkward():
    y = place.give(x)
    assert y.is_contiguous()
    assert np.isclose(float(y.double().sum()), x.astype(float).sum())
    y.fill_(1)  # read-only and broadcast memory would not survive
    assert float(y.double().sum()) == y.numel()
"""
    )


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_immutable_frameworks_compute_on_any_result(name):
    Framework(name)
    _run(
        AWKWARD
        + f"""
import {name}
if "{name}" == "jax":
    from jax import numpy as np_
    make, total = np_.asarray, lambda y: (y + y).astype("float32").sum() / 2
else:
    import tensorflow as tf
    make, total = tf.constant, lambda y: tf.reduce_sum(tf.cast(y, "float32") * 2) / 2
place = home(make([1.0]), "x")
for x in awkward():
    if x.dtype == bool and "{name}" == "jax":
        continue
    y = place.give(x)
    assert tuple(y.shape) == x.shape
    assert np.isclose(float(total(y)), x.astype(float).sum(), rtol=1e-2), (x.dtype, x.shape)
for shape in [(1, 1, 1), (2, 3, 5), (7, 129, 33), (31, 1, 17), (3, 1000, 1)]:
    b, s, d = shape
    u, v = rng.normal(size=(b, d)).astype("f"), rng.normal(size=(s, d)).astype("f")
    loss, grads = zipfneg.sampled_softmax_value_and_grad(make(u), make(u), make(v))
    numpy_loss, numpy_grads = zipfneg.sampled_softmax_value_and_grad(u, u, v)
    best = zipfneg.top_k(make(u), make(v), min(s, 3))
    # What was computed in NumPy goes to the framework by the user's own hand.
    for y, x in [(grads.queries, numpy_grads.queries),
                 (grads.negatives.embeddings, numpy_grads.negatives.embeddings),
                 (make(numpy_grads.queries), numpy_grads.queries),
                 (best.scores, zipfneg.top_k(u, v, min(s, 3)).scores)]:
        assert np.isclose(float(total(y)), x.sum(), atol=1e-3), shape
    assert int(np.asarray(best.ids).max()) < s
"""
    )


def test_numpy_results_enter_torch(torch):
    """Results of NumPy inputs have strides and memory that torch takes."""
    for call in CALLS.values():
        for path, x in leaves(call(inputs())).items():
            if isinstance(x, np.ndarray) and x.dtype != ml_dtypes.bfloat16:
                assert torch.from_numpy(x).shape == x.shape, path


def test_candidates_are_a_pytree(jax, torch):
    side = Candidates(ids=jax.numpy.arange(3), embeddings=jax.numpy.ones((3, 2)))
    doubled = jax.tree.map(lambda x: 2 * x, side)
    assert isinstance(doubled, Candidates)
    assert doubled.log_q is None
    assert doubled.ids.tolist() == [0, 2, 4]
    values, _ = torch.utils._pytree.tree_flatten(Candidates(embeddings=torch.ones(2)))
    assert any(isinstance(x, torch.Tensor) for x in values)
