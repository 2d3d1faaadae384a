"""The boundary: arrays of any framework in, the same framework and device out.

No framework is imported here: the framework of an array is already loaded, or it could not exist.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .checks import NDArray
from .cuda import SIMULATED

# An array of NumPy, CuPy, PyTorch, JAX or TensorFlow.
Array = Any

_ARRAY_TYPES = {
    "numpy": ("ndarray", "generic"),
    "cupy": ("ndarray",),
    "torch": ("Tensor",),
    "jax": ("Array",),
    "tensorflow": ("Tensor", "Variable"),
}


def _framework(x: Any) -> str | None:
    if type(x) is np.ndarray:  # the frequent case
        return "numpy"
    for framework, names in _ARRAY_TYPES.items():
        module = sys.modules.get(framework)
        if isinstance(x, tuple(getattr(module, name) for name in names if hasattr(module, name))):
            return framework
    return None


def as_array(x: Array, name: str = "x") -> NDArray:
    """A NumPy or CuPy view of any DLPack exporter's memory, without a copy.

    Parameters
    ----------
    x : array of NumPy, CuPy, PyTorch, JAX, TensorFlow or any other DLPack exporter.
        bfloat16 becomes ``ml_dtypes.bfloat16``. JAX's and TensorFlow's memory comes read-only.
    name : what to call `x` in an error.

    Raises
    ------
    TypeError
        For what is no array (a list, a data frame), has no memory to view (a JAX tracer, a sparse
        or fake tensor, an array over several devices), lies on a device whose library is missing,
        or would lose its meaning in a view: a tensor that requires grad, one with its lazy
        negative or conjugate bit set, a masked array, a ``tf.Variable``; or holds no numbers.

    Examples
    --------
    >>> import numpy as np, zipfneg
    >>> x = np.arange(3)
    >>> zipfneg.as_array(x) is x
    True
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array would lose its mask; pass x.filled(...) instead")
    view = _VIEWS.get(_framework(x), _from_dlpack if hasattr(x, "__dlpack__") else None)
    if view is None:
        raise TypeError(
            f"{name}: expected an array (NumPy, CuPy, PyTorch, JAX, TensorFlow, or another "
            f"exporter of DLPack), got {_type_name(x)}; convert it first, for instance by "
            f"numpy.asarray"
        )
    try:
        return view(x)
    except Exception as error:  # exporters raise what they like; none names the argument
        raise TypeError(f"{name}: cannot view this {_type_name(x)}: {error}") from error


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _from_numpy(x: Any) -> NDArray:
    if x.dtype.kind not in "biufcV" or x.dtype.hasobject:  # V: bfloat16 among others
        raise TypeError(f"{x.dtype} is not numeric")
    if not x.dtype.isnative:  # equal to no dtype by name, and foreign to kernels and frameworks
        raise TypeError(f"the bytes of {x.dtype} are swapped; convert it to {x.dtype.name} first")
    return np.asarray(x)


def _from_dlpack(x: Any) -> NDArray:
    device_type, device_id = x.__dlpack_device__()
    if device_type in (1, 3):  # the CPU's memory, pageable or pinned
        return np.from_dlpack(x)
    if device_type not in (2, 13):  # CUDA's memory, plain or managed
        raise TypeError(f"it lives on a device of DLPack type {device_type}, not a CPU or CUDA's")
    try:
        import cupy
    except ImportError as error:
        raise TypeError(
            f"it lives on cuda:{device_id}, which takes CuPy: install zipfneg[cu12] or [cu13]"
        ) from error
    place = home(x, "x") if _framework(x) == "torch" else NUMPY
    with place.current():
        return cupy.from_dlpack(x)


def _from_torch(x: Any) -> NDArray:
    torch = sys.modules["torch"]
    # Subclasses that dispatch for themselves (fake, distributed, nested) and functionalized
    # tensors export memory that is not theirs, and some do so without an error.
    dispatches = type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if dispatches or torch._is_functional_tensor(x):
        raise TypeError(
            "it is fake, nested, distributed or functionalized, without plain memory of its own; "
            "call zipfneg outside tracing, on plain tensors"
        )
    if x.requires_grad or torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            "it requires grad, and a view would cut it from its graph; pass x.detach(), and apply "
            "the returned gradients yourself"
        )
    if x.is_neg() or x.is_conj():
        raise TypeError("it is a lazy negative or conjugate; pass x.resolve_conj().resolve_neg()")
    if x.dtype == torch.bfloat16:
        return _from_torch(x.view(torch.int16)).view(ml_dtypes.bfloat16)
    # By DLPack, NumPy takes the tensors of older PyTorch versions for read-only.
    return x.numpy() if x.device.type == "cpu" else _from_dlpack(x)


def _from_jax(x: Any) -> NDArray:
    jax = sys.modules["jax"]
    if isinstance(x, jax.core.Tracer):
        raise TypeError("it is a JAX tracer, not an array: call zipfneg outside jit, grad and vmap")
    if len(x.devices()) > 1:
        raise TypeError("it lives on several devices; pass the part of one, x.addressable_data(i)")
    if x.dtype == ml_dtypes.bfloat16 and next(iter(x.devices())).platform == "cpu":
        return np.asarray(x)  # JAX does not export bfloat16; on the CPU this is a view
    return _from_dlpack(x)


def _from_tensorflow(x: Any) -> NDArray:
    tf = sys.modules["tensorflow"]
    if isinstance(x, tf.Variable):
        raise TypeError("it is a tf.Variable, which may change; pass x.value()")
    if not hasattr(x, "numpy"):
        raise TypeError("it is a symbolic tensor, not an array: call zipfneg outside tf.function")
    if not (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool or x.dtype.is_complex):
        raise TypeError(f"{x.dtype.name} is not numeric")  # to export strings aborts the process
    if ":CPU:" not in x.device:
        return _from_dlpack(x)
    # A view like DLPack's, but of every dtype; of a tensor without dimensions a copy.
    view = np.asarray(x.__array__())
    view.flags.writeable = False  # TensorFlow's tensors never change
    return view


_VIEWS: dict[str | None, Callable[[Any], NDArray]] = {
    "numpy": _from_numpy,
    "cupy": lambda x: x,
    "torch": _from_torch,
    "jax": _from_jax,
    "tensorflow": _from_tensorflow,
}


class Home(NamedTuple):
    """Where a call's arrays came from, and its results go back to."""

    framework: str
    device: Any

    def __str__(self) -> str:
        return f"{self.framework} on {self.device}"

    @property
    def on_cuda(self) -> bool:
        return str(self.device).startswith("cuda")

    def that_of(self, name: str, x: Array) -> "Home":
        """Where `x` is, which must be on this device."""
        if SIMULATED:
            return self
        place = home(x, name)
        if place.framework not in ("cupy", "torch") or str(place.device) != self.device:
            raise TypeError(
                f"{name}: expected one of CuPy or PyTorch on {self.device}, got one of {place}; "
                f"nothing is moved silently: convert it"
            )
        return place

    @contextmanager
    def current(self) -> Iterator[None]:
        """CuPy's work within goes to this device, on the stream that is the caller's there."""
        if self.framework not in ("cupy", "torch") or not self.on_cuda:
            yield
            return
        import cupy

        index = int(str(self.device).partition(":")[2])
        stream: Any = nullcontext()
        if self.framework == "torch":
            theirs = sys.modules["torch"].cuda.current_stream(self.device)
            stream = cupy.cuda.ExternalStream(theirs.cuda_stream, index)
        with cupy.cuda.Device(index), stream:
            yield

    def give(self, array: NDArray) -> Array:
        """`array`, which nobody changes any more, as one of this framework on this device."""
        if self.framework == "numpy":
            return array
        if self.on_cuda and not isinstance(array, np.ndarray):  # made within `current`
            if self.framework == "cupy":
                return array
            if self.framework == "torch":
                return sys.modules["torch"].from_dlpack(array)
        # Frameworks may keep the memory they are given: it must be of no one else. A negative
        # stride aborts the process in torch, whose tensors are also writable whatever NumPy says.
        array = np.require(array, requirements=["C", "W", "O"])
        if self.framework == "torch":
            torch = sys.modules["torch"]
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        if self.framework == "jax":
            jax = sys.modules["jax"]
            return jax.device_put(narrowed(array, jax.config.jax_enable_x64), self.device)
        if self.framework == "tensorflow":
            tf = sys.modules["tensorflow"]
            with tf.device(self.device):
                return tf.convert_to_tensor(array)
        raise NotImplementedError(f"results cannot be returned to {self} in this version")


NUMPY = Home("numpy", "cpu")


def on_device(device: str) -> Home:
    """Where results go that are asked for on a device: to NumPy or CuPy."""
    name, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if device == "cpu":
        return NUMPY
    if name != "cuda" or not (device == "cuda" or index.isdecimal()):
        raise ValueError(
            f"device: expected one of 'cpu', 'cuda', 'cuda:0', 'cuda:1', …, got {device!r}"
        )
    if SIMULATED:
        return Home("numpy", device)
    try:
        import cupy

        num_devices = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise RuntimeError(
            f"device: {device!r} takes CuPy: install zipfneg[cu12] or zipfneg[cu13], after your "
            f"driver"
        ) from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"device: {device!r} takes an NVIDIA GPU and its driver: {error}"
        ) from error
    if int(index or 0) >= num_devices:
        raise ValueError(f"device: {device!r} is not among the {num_devices} of this machine")
    return Home("cupy", f"cuda:{index or cupy.cuda.runtime.getDevice()}")


def narrowed(array: NDArray, x64: bool) -> NDArray:
    """JAX without x64 would wrap wide integers silently; floats only lose digits."""
    if array.dtype == np.int64 and not x64:
        if array.size and max(-int(array.min()), int(array.max())) >= 2**31:
            raise OverflowError(
                "ids of 2**31 and more do not fit JAX's int32: enable jax_enable_x64"
            )
        return array.astype(np.int32)
    return array


def home(x: Array, name: str) -> Home:
    framework = _framework(x)
    if framework == "torch":
        device = x.device
    elif framework == "jax":
        device = next(iter(x.devices()))
    elif framework == "tensorflow":
        device = x.device
    elif framework == "numpy":
        return NUMPY
    elif framework == "cupy":
        device = f"cuda:{x.device.id}"
    else:
        raise TypeError(
            f"{name}: {_type_name(x)} is of no framework that results could be returned to; pass "
            f"zipfneg.as_array({name}) to work in NumPy"
        )
    return Home(framework, device)


def borrow(arrays: dict[str, Array | None], *, cuda: bool = False) -> tuple[Home, dict[str, Any]]:
    """The common home of the given arrays, and their views; None stays None.

    Keys name the arrays in errors. `cuda`: CuPy's views are welcome, else NumPy's alone.
    """
    common: Home | None = None
    first = ""
    views: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is None:
            views[name] = None
            continue
        view = as_array(x, name)
        place = home(x, name)
        if common is None:
            common, first = place, name
        elif place != common:
            raise TypeError(
                f"{name}: expected an array of {common}, as {first} is, got one of {place}; "
                f"nothing is moved silently, so convert one of them"
            )
        if not isinstance(view, np.ndarray) and not (cuda and place.framework in ("cupy", "torch")):
            raise NotImplementedError(
                f"{name}: lives on {place}, and this version computes on the CPU only; move the "
                f"arrays there first"
            )
        views[name] = view
    return common or NUMPY, views


def view_of(name: str, x: Any, *, cuda: bool = False) -> tuple[Any, NDArray]:
    """Numbers and sequences are welcome where nothing is timed."""
    if isinstance(x, int | float | list | tuple | range):
        return NUMPY, np.asarray(x)
    place, views = borrow({name: x}, cuda=cuda)
    return place, views[name]
