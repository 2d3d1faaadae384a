"""Every CUDA kernel compiles, to PTX and to machine code, on a machine without a GPU."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from zipfneg import Empirical, LogUniform, Uniform, ZipfMandelbrot
from zipfneg.cuda import launch, sampling

pytestmark = pytest.mark.cudacompile
pytest.importorskip("cuda.core", reason="needs the compiler: pip install zipfneg[cuda-compile]")
if launch.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

LAWS = [LogUniform(9), Uniform(9), ZipfMandelbrot(99, 1.5), Empirical([3, 1])]
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]

i32, i64, f64 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float64)
WORDS = (np.uint64,) * 4 + (i64,)
FOUND = (int, i32, i32, i64)  # num_tries, table, slots, counts
LAWLESS = {
    "draw_uniforms": (f64, *WORDS),
    "find_first": (i64, int, i32, i32),
    "count_first": FOUND,
    "keep_distinct": (i64, i64, i64, i64, *FOUND, i32),
    "count_copies": (i64, int, i32, i32, i32),
}


def kinds(parameters):
    return tuple(x.dtype if isinstance(x, np.ndarray) else type(x) for x in parameters)


def signature(law, name):
    draw = (*WORDS, int, *kinds(law._rank_parameters()))
    prob = (int, int, *kinds(law._log_prob_parameters()))
    return {
        "draw": (i64, *draw),
        "draw_tries": (i64, int, i32, *draw),
        "keep_unique": (i64, i64, i64, *FOUND, i32, *draw),
        "log_prob": (f64, i64, *prob),
        "log_inclusion": (f64, i64, float, *prob),
        "log_q": (f64, f64, i64, i64, i64, i64, i32, i32, float, *prob),
    }[name]


@pytest.fixture(params=CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
def capability(request, monkeypatch):
    # Numba asks the current device for what it is given here.
    device = SimpleNamespace(compute_capability=request.param)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    return request.param


def check(kernel, kinds, capability):
    ptx = kernel.ptx(kinds, capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    # Seven parameters an array, one a scalar: what the launch passes.
    arrays = sum(isinstance(kind, np.dtype) for kind in kinds)
    widths = re.findall(r"\.param \.(\w+) (?:\.ptr \.align 1 )?\w+_param_", ptx.split("{")[0])
    assert len(widths) == len(kinds) + 6 * arrays
    assert set(widths) <= {"u64", "f64"}
    cubin, name = kernel.compiled(kinds, capability)
    assert cubin[:4] == b"\x7fELF"
    assert name.encode() in cubin


@pytest.mark.parametrize("name", sorted(LAWLESS))
def test_kernels_without_a_law(name, capability):
    check(getattr(sampling, name), LAWLESS[name], capability)


@pytest.mark.parametrize("name", sampling.LawKernels._fields)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_kernels_of_a_law(law, name, capability):
    check(getattr(sampling._kernels_of(law), name), signature(law, name), capability)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_other_integers(dtype, monkeypatch):
    device = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    x, law = np.dtype(dtype), (int, int, float)
    check(sampling.log_uniform.log_q, (f64, f64, i64, i64, x, i64, i32, i32, float, *law), (9, 0))
    words = (np.uint64,) * 4 + (x,)
    check(sampling.uniform.draw, (i32, *words, int, int), (9, 0))


def test_launches_by_cupy(monkeypatch):
    """What CuPy is given: one module for each device and signature, flat arguments, a grid."""
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device",
        lambda: SimpleNamespace(compute_capability=(9, 0)),
    )
    loaded, launched, device = [], [], [0]

    class Module:
        def load(self, cubin):
            loaded.append(cubin)

        def get_function(self, name):
            return lambda *launch: launched.append((name, *launch))

    monkeypatch.setitem(
        sys.modules,
        "cupy",
        SimpleNamespace(
            cuda=SimpleNamespace(
                Device=lambda: SimpleNamespace(compute_capability="90"),
                runtime=SimpleNamespace(getDevice=lambda: device[0]),
                function=SimpleNamespace(Module=Module),
            )
        ),
    )

    def array(size, dtype, address):
        return SimpleNamespace(
            ndim=1, size=size, dtype=np.dtype(dtype), itemsize=np.dtype(dtype).itemsize,
            data=SimpleNamespace(ptr=address),
        )  # fmt: skip

    kernel = launch.Kernel(sampling.uniform.draw.function)
    words = (*np.array([1, 2, 3, 4], np.uint64), array(0, np.int64, 0))
    kernel(10**9, array(5, np.int32, 4096), *words, 7, 100)
    name, grid, block, arguments = launched.pop()
    assert "draw" in name
    assert (grid, block) == ((launch.MAX_BLOCKS,), (launch.BLOCK,))
    assert arguments == (0, 0, 5, 4, 4096, 5, 4, 1, 2, 3, 4, 0, 0, 0, 8, 0, 0, 8, 7, 100)
    kernel(1, array(6, np.int32, 4096), *words, 7, 100)
    assert launched.pop()[1] == (1,)
    assert len(loaded) == 1
    kernel(1, array(6, np.int64, 4096), *words, 7, 100)
    device[0] = 1
    kernel(1, array(6, np.int64, 4096), *words, 7, 100)
    assert len(loaded) == 3
