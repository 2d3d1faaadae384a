"""The boundary: arrays of any framework in, the same framework and device out.

No framework is imported here. An array's framework is already loaded, or it could not exist; it
is looked up by the name of the array's type.
"""

import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .checks import NDArray

# An array of NumPy, CuPy, PyTorch, JAX or TensorFlow.
Array = Any

_FRAMEWORKS = {
    "numpy": "numpy",
    "cupy": "cupy",
    "torch": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "tensorflow": "tensorflow",
}


def _framework(x: Any) -> str | None:
    for cls in type(x).__mro__:
        name = _FRAMEWORKS.get(cls.__module__.partition(".")[0])
        if name is not None:
            return name
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
        For what is no array (a list, a data frame), cannot be viewed (a JAX tracer, a sparse or
        fake tensor) or would lose its meaning in a view: a tensor that requires grad, one with
        its lazy negative or conjugate bit set, a masked array, a ``tf.Variable``.

    Examples
    --------
    >>> import numpy as np, zipfneg
    >>> x = np.arange(3)
    >>> zipfneg.as_array(x) is x
    True
    """
    framework = _framework(x)
    try:
        if framework == "numpy":
            return _from_numpy(x, name)
        if framework == "cupy":
            return x
        if framework == "torch":
            return _from_torch(x, name)
        if framework == "jax":
            return _from_jax(x, name)
        if framework == "tensorflow":
            return _from_tensorflow(x, name)
        if hasattr(x, "__dlpack__"):
            return _from_dlpack(x)
    except (RuntimeError, BufferError, ValueError, AttributeError, NotImplementedError) as error:
        raise TypeError(
            f"{name}: this {_type_name(x)} cannot be viewed as an array: {error}"
        ) from error
    raise TypeError(
        f"{name}: expected an array (NumPy, CuPy, PyTorch, JAX, TensorFlow, or another exporter "
        f"of DLPack), got {_type_name(x)}; convert it first, for instance by numpy.asarray"
    )


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _from_numpy(x: Any, name: str) -> NDArray:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array would lose its mask; pass x.filled(...) instead")
    if not isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"{name}: expected an array, got {_type_name(x)}")
    return np.asarray(x)


def _from_dlpack(x: Any) -> NDArray:
    device_type, _ = x.__dlpack_device__()
    if device_type == 1:
        return np.from_dlpack(x)
    import cupy

    return cupy.from_dlpack(x)


def _from_torch(x: Any, name: str) -> NDArray:
    torch = sys.modules["torch"]
    if x.requires_grad:
        raise TypeError(
            f"{name}: this tensor requires grad, and a view would cut it from its graph; pass "
            f"{name}.detach() and apply the returned gradients yourself"
        )
    if x.is_neg() or x.is_conj():
        raise TypeError(
            f"{name}: this tensor is a lazy negative or conjugate; pass "
            f"{name}.resolve_conj().resolve_neg()"
        )
    if x.dtype == torch.bfloat16:
        return _from_dlpack(x.view(torch.int16)).view(ml_dtypes.bfloat16)
    return _from_dlpack(x)


def _from_jax(x: Any, name: str) -> NDArray:
    jax = sys.modules["jax"]
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name}: this is a JAX tracer, not an array: call zipfneg outside jit, grad and vmap"
        )
    if x.dtype == ml_dtypes.bfloat16 and next(iter(x.devices())).platform == "cpu":
        return np.asarray(x)  # JAX does not export bfloat16; on the CPU this is a view
    return _from_dlpack(x)


def _from_tensorflow(x: Any, name: str) -> NDArray:
    tf = sys.modules["tensorflow"]
    if isinstance(x, tf.Variable):
        raise TypeError(f"{name}: this is a tf.Variable; pass {name}.value()")
    if not hasattr(x, "numpy"):
        raise TypeError(
            f"{name}: this is a symbolic tensor, not an array: call zipfneg outside tf.function"
        )
    if x.dtype in (tf.bfloat16, tf.bool) and ":CPU:" in x.device:
        return x.numpy()  # not exported by DLPack in every version
    return _from_dlpack(x)


class Home(NamedTuple):
    """Where a call's arrays came from, and its results go back to."""

    framework: str
    device: Any

    def __str__(self) -> str:
        return f"{self.framework} on {self.device}"

    def give(self, array: NDArray) -> Array:
        """`array`, which the caller owns, as an array of this framework on this device."""
        if self.framework == "torch":
            torch = sys.modules["torch"]
            array = np.require(array, requirements=["C", "W"])
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        if self.framework == "jax":
            jax = sys.modules["jax"]
            return jax.device_put(_narrowed(array, jax.config.jax_enable_x64), self.device)
        if self.framework == "tensorflow":
            tf = sys.modules["tensorflow"]
            with tf.device(self.device):
                return tf.convert_to_tensor(array)
        return array


NUMPY = Home("numpy", "cpu")


def _narrowed(array: NDArray, x64: bool) -> NDArray:
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


def borrow(arrays: dict[str, Array | None]) -> tuple[Home, dict[str, Any]]:
    """The common home of the given arrays, and their NumPy views; None stays None.

    Keys name the arrays in errors.
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
                f"nothing is moved silently, so move one of them"
            )
        if not isinstance(view, np.ndarray):
            raise NotImplementedError(
                f"{name}: lives on {place}, and this version computes on the CPU only; move the "
                f"arrays there first"
            )
        views[name] = view
    return common or NUMPY, views
